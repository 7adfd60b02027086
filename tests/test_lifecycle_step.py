"""lifecycle_step: epochs, ramps and the way on to STABILIZATION, in closed form and against the plain-Python model."""

from __future__ import annotations

import math

import checks
import lifecycle_model as model
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lifecycle_checks import function
from lifecycle_model import INT_MAX, INT_MIN, Seed, Tensors

from kasmina_ext import grafting, ops

SCHEDULES = {"none": 0, "linear": 1, "cosine": 2, "sigmoid": 3}
CLOSED_FORMS = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "sigmoid": lambda t: (logistic(t) - logistic(0)) / (logistic(1) - logistic(0)),
}
with_schedules = pytest.mark.parametrize("schedule", SCHEDULES)
with_ramps = pytest.mark.parametrize("schedule", CLOSED_FORMS)


def logistic(t: float) -> float:
    return 1 / (1 + math.exp(-12 * (t - 0.5)))


def step(backend: str, tensors: Tensors, schedule: int | str, ramp_epochs: int, advance: bool = False) -> None:
    number = SCHEDULES.get(schedule, schedule)
    call = function(backend, "lifecycle_step")
    assert call(*tensors.lived, tensors.alpha, number, ramp_epochs, advance) is None


def grafting_after(epochs: list[int], device) -> Tensors:
    """Seeds in GRAFTING that a step brings to these epochs; alpha is what no ramp gives."""
    return model.to_tensors([Seed(model.GRAFTING, epochs=e - 1, alpha=7.0) for e in epochs], device)


# ---- the ramps -------------------------------------------------------------------------------------------------------


@with_ramps
@checks.backends
def test_ramps_in_closed_form(backend, device, schedule):
    for ramp_epochs in (1, 2, 3, 10, 50, 997):
        epochs = list(range(1, ramp_epochs + 3))
        tensors = grafting_after(epochs, device)
        step(backend, tensors, schedule, ramp_epochs)
        alpha = tensors.alpha.tolist()
        for e, got in zip(epochs, alpha, strict=True):
            exact = CLOSED_FORMS[schedule](min(1.0, e / ramp_epochs))
            # One rounding to float32; a float64 difference from 1 that is near it may bring another.
            assert abs(got - exact) <= 2**-24 * exact + 2**-50, (e, ramp_epochs)
        assert alpha[ramp_epochs - 1 :] == [1.0] * 3
        assert all(a <= b for a, b in zip(alpha, alpha[1:], strict=False)), "not monotone"
        assert ramp_epochs == 1 or 0 < alpha[0] < 1


@with_ramps
@checks.backends
def test_the_start_of_a_ramp_is_zero(backend, device, schedule):
    """Epochs that are not above 0 were written behind the library's back."""
    tensors = grafting_after([0, -5, INT_MIN + 1], device)
    step(backend, tensors, schedule, 10)
    assert tensors.alpha.tolist() == [0.0] * 3 and not tensors.alpha.signbit().any()


@with_ramps
@checks.backends
def test_long_ramps(backend, device, schedule):
    """t is a float64 quotient: a ramp of 2^31 epochs is as smooth as one of ten, one of 2^40 hardly begins."""
    epochs = [1, 2**20, 2**30, INT_MAX - 1, INT_MAX]
    for ramp_epochs in (2**31 - 1, 2**31, 2**40):
        tensors = grafting_after(epochs, device)
        step(backend, tensors, schedule, ramp_epochs, advance=True)
        expected = [model.ramp(SCHEDULES[schedule], e / ramp_epochs) for e in epochs]
        found = tensors.alpha.double().cpu()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=2**-22, atol=2**-50)
        # t decides, not alpha: (2^31 - 1) / 2^31 is 1 in float32
        done = [e >= ramp_epochs for e in epochs]
        assert tensors.state[0].eq(model.STABILIZATION).tolist() == done


@with_ramps
@checks.backends
def test_a_ramp_without_epochs_is_done_at_once(backend, device, schedule):
    for ramp_epochs in (0, -1, -(2**40)):
        tensors = grafting_after([-3, 0, 1, 9], device)
        step(backend, tensors, schedule, ramp_epochs)
        assert tensors.alpha.tolist() == [1.0] * 4


@with_ramps
def test_ramps_are_the_ones_that_python_offers(device, schedule):
    tensors = grafting_after(list(range(1, 40)), device)
    step("ops", tensors, schedule, 37)
    expected = torch.tensor([grafting.ramp(schedule, e / 37) for e in range(1, 40)])
    torch.testing.assert_close(tensors.alpha.cpu(), expected, rtol=2**-23, atol=0)


# ---- who is touched --------------------------------------------------------------------------------------------------


@with_schedules
@checks.backends
def test_only_seeds_in_grafting_have_their_alpha_moved(backend, device, schedule):
    lives = [*range(model.STATES), -1, 11, INT_MAX]
    tensors = model.to_tensors([Seed(life, epochs=4, alpha=0.625) for life in lives], device)
    step(backend, tensors, schedule, 10)
    assert tensors.state[2].tolist() == [5] * len(lives)
    others = [life for life in range(len(lives)) if life != model.GRAFTING]
    assert tensors.alpha[others].eq(0.625).all() and not tensors.count.any() and not tensors.history.any()
    # all of these ramps are at a half there
    assert tensors.alpha[model.GRAFTING] == (0.625 if schedule == "none" else 0.5)


@checks.backends
def test_no_schedule_leaves_alpha_alone(backend, device):
    odd = [0.0, -0.0, 0.3, math.nan, math.inf, -2.0]
    tensors = model.to_tensors([Seed(model.GRAFTING, epochs=3, alpha=a) for a in odd], device)
    before = tensors.alpha.view(torch.int32).clone()
    for ramp_epochs in (0, 2, 50):
        step(backend, tensors, "none", ramp_epochs)
    assert torch.equal(tensors.alpha.view(torch.int32), before)


@checks.backends
def test_epochs_stop_at_the_greatest_int32(backend, device):
    tensors = model.to_tensors([Seed(life, epochs=INT_MAX - 1) for life in range(model.STATES)], device)
    for _ in range(3):
        step(backend, tensors, "linear", INT_MAX)
        assert tensors.state[2].eq(INT_MAX).all()


@checks.backends
def test_epochs_rise_from_anywhere(backend, device):
    epochs = [INT_MIN, -1, 0, 41]
    tensors = model.to_tensors([Seed(epochs=e) for e in epochs], device)
    step(backend, tensors, 0, 1)
    assert tensors.state[2].tolist() == [e + 1 for e in epochs]


# ---- advance ---------------------------------------------------------------------------------------------------------


@with_schedules
@checks.backends
def test_advance_when_the_ramp_is_done(backend, device, schedule):
    tensors = model.to_tensors([Seed(model.GRAFTING, count=9), Seed(model.TRAINING)], device)
    for epoch in range(1, 7):
        step(backend, tensors, schedule, 4, advance=True)
        done = epoch >= 4
        first = model.from_tensors(tensors)[0]
        assert first.lifecycle == (model.STABILIZATION if done else model.GRAFTING)
        assert first.epochs == (epoch - 4 if done else epoch)
        assert (first.count, first.parent) == ((10, model.GRAFTING) if done else (9, 0))
        assert first.ring == [(0, 0)] * 9 + [(model.GRAFTING, model.STABILIZATION) if done else (0, 0)]
        assert schedule == "none" or (first.alpha == 1) == done
    assert model.from_tensors(tensors)[1] == Seed(model.TRAINING, epochs=6)


@checks.backends
def test_advance_asks_for_no_least_epochs(backend, device):
    for ramp_epochs in (1, 0, -7):
        tensors = model.to_tensors([Seed(model.GRAFTING, alpha=0.0)], device)
        step(backend, tensors, "cosine", ramp_epochs, advance=True)
        seed = model.from_tensors(tensors)[0]
        assert (seed.lifecycle, seed.epochs, seed.alpha, seed.count) == (model.STABILIZATION, 0, 1.0, 1)


@checks.backends
def test_without_advance_seeds_stay(backend, device):
    tensors = grafting_after([1, 50, INT_MAX], device)
    step(backend, tensors, "linear", 5)
    assert tensors.state[0].eq(model.GRAFTING).all() and not tensors.count.any()


# ---- against the model -----------------------------------------------------------------------------------------------

_epochs = st.one_of(st.integers(0, 12), st.sampled_from([-1, INT_MAX, INT_MAX - 1, INT_MIN]))
_seed = st.builds(
    Seed,
    lifecycle=st.one_of(st.just(model.GRAFTING), st.integers(-1, 11)),
    epochs=_epochs,
    parent=st.integers(0, 10),
    count=st.integers(0, 40),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
)


@checks.backends
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    seeds=st.lists(_seed, max_size=6),
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 12), st.booleans()), min_size=1, max_size=6),
)
def test_matches_the_model(backend, device, seeds, steps):
    tensors = model.to_tensors(seeds, device)
    seeds = model.from_tensors(tensors)
    for schedule, ramp_epochs, advance in steps:
        step(backend, tensors, schedule, ramp_epochs, advance)
        for seed in seeds:
            seed.step(schedule, ramp_epochs, advance)
        assert model.differences(seeds, tensors) == []


@pytest.mark.sanitizer
@with_schedules
@pytest.mark.parametrize("num_seeds", [0, 1, 300, 5000])
@checks.backends
def test_sizes(backend, device, num_seeds, schedule):
    """Twice: the same bits."""
    tensors = model.random_tensors(num_seeds, np.random.default_rng(num_seeds), device)
    again, seeds = tensors.clone(), model.from_tensors(tensors)
    for _ in range(2):
        step(backend, tensors, schedule, 60, advance=True)
        step(backend, again, schedule, 60, advance=True)
        for seed in seeds:
            seed.step(SCHEDULES[schedule], 60, True)
    assert again.same(tensors)
    assert model.differences(seeds, tensors) == []
    assert num_seeds < 300 or tensors.state[0].eq(model.STABILIZATION).any()


def test_ten_million_seeds(device):
    checks.needs_memory(device, gib=2)
    many = 10_000_000
    state = torch.zeros(8, many, dtype=torch.int32, device=device)
    history = torch.zeros(many, 10, 2, dtype=torch.int32, device=device)
    count, alpha = torch.zeros(many, dtype=torch.int32, device=device), torch.zeros(many, device=device)
    state[0, 1::3], state[2, 1::3] = model.GRAFTING, 49
    ops.lifecycle_step(state, history, count, alpha, 1, 50, True)
    grafting = torch.arange(many, device=device) % 3 == 1
    assert torch.equal(state[0], torch.where(grafting, model.GRAFTING + 1, 0).int())
    assert torch.equal(alpha, grafting.float()) and torch.equal(count, grafting.int())
    assert torch.equal(state[2], (~grafting).int()) and not state[5:].any()


def test_every_path_gives_the_same_state(device):
    """Integers exactly; alpha too but for the last bit of a cosine or an exponential."""
    for schedule in range(4):
        start = model.random_tensors(30_000, np.random.default_rng(schedule))
        here, there = start.clone(), Tensors(*(t.to(device) for t in (*start.lived, start.alpha)))
        for _ in range(3):
            step("reference", here, schedule, 70, advance=True)
            step("ops", there, schedule, 70, advance=True)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here.lived, there.lived, strict=True))
        torch.testing.assert_close(here.alpha, there.alpha.cpu(), rtol=2**-22, atol=0)


# ---- the call --------------------------------------------------------------------------------------------------------


@checks.backends
def test_version_counters_move(backend, device):
    tensors = model.to_tensors([Seed(model.GRAFTING)], device)
    everything = (*tensors.lived, tensors.alpha)
    before = [t._version for t in everything]
    step(backend, tensors, "linear", 1, advance=True)
    assert all(t._version > v for t, v in zip(everything, before, strict=True))


@pytest.mark.parametrize("change", ["lifecycle_step", "state_update"])
@checks.backends
def test_a_change_between_forward_and_backward_is_an_error(backend, device, change):
    """The gradients would be those of another state: autograd notices."""
    tensors = model.to_tensors([Seed(model.GRAFTING, 0, 3, alpha=0.5)], device)
    bank = torch.ones(2, 4, device=device, requires_grad=True)
    x, offsets = torch.ones(3, 4, device=device), torch.tensor([0, 4], dtype=torch.int32, device=device)
    nothing = torch.empty(0, dtype=torch.float64, device=device)

    def forward() -> torch.Tensor:
        call = function(backend, "chunked_forward")
        return call(x, offsets, tensors.state, tensors.alpha, bank, nothing, nothing).sum()

    def reconstruction() -> torch.Tensor:
        return function(backend, "reconstruction_loss")(x, x + 1, offsets, tensors.state, bank).sum()

    def changes() -> None:
        if change == "lifecycle_step":
            return step(backend, tensors, "linear", 10)
        request = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([0], [[0, 1, 0, 0]], [2]))
        rules = torch.zeros(11, 11, dtype=torch.int32, device=device)
        return function(backend, "state_update")(*tensors.lived, *request, rules, 2)

    forward().backward()
    losses = (forward, reconstruction) if backend == "ops" else (forward,)
    for loss in losses:
        changed = loss()
        changes()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            changed.backward()
        loss().backward()


@checks.backends
def test_nothing_waits_for_the_device(backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensors = model.random_tensors(5000, np.random.default_rng(3), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for schedule in range(4):
            step(backend, tensors, schedule, 30, advance=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_layer_of_seeds_in_a_hundred_epochs(device):
    """The whole way of one seed, from the first epoch of its ramp to long after it."""
    tensors = model.to_tensors([Seed(model.GRAFTING, alpha=0.0)], device)
    path = []
    for _ in range(100):
        ops.lifecycle_step(*tensors.lived, tensors.alpha, 2, 50, True)
        path.append(float(tensors.alpha[0]))
    assert path[:50] == sorted(path[:50]) and path[49:] == [1.0] * 51
    assert model.from_tensors(tensors)[0].epochs == 50
