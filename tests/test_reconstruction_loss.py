"""reconstruction_loss and its derivative, against closed forms in long double, and what autograd's users expect of it."""

from __future__ import annotations

import cases
import checks
import numpy as np
import oracle
import pytest
import torch
from cases import Case, Inputs, build
from lifecycle_checks import check_big_reconstruction, function
from oracle import LONG
from torch.autograd import gradcheck, gradgradcheck

TRAINING = 2
STRATEGIES = ("mul", "add", "mid", "affine")
HUGE = 1e15  # squares of float32 numbers above may overflow: what comes out is inf or nothing that can be foreseen
SLACK = 2**9  # roundings that the sums may make: the length of either stage of a two-stage sum of 2^18 terms


def training(case: Case, device: torch.device | str) -> Inputs:
    """The inputs of a case with most of its grafted seeds in TRAINING instead; `grad_y` will be the target."""
    inputs = build(case, device)
    lifecycle = inputs.state[0]
    lifecycle.copy_(torch.where((lifecycle >= 3) & (lifecycle < 7), TRAINING, lifecycle))
    return inputs


def loss_of(backend: str, inputs: Inputs, weights: torch.Tensor | None = None, x=None, target=None) -> torch.Tensor:
    x, target = inputs.x if x is None else x, inputs.grad_y if target is None else target
    weights = inputs.weights if weights is None else weights
    return function(backend, "reconstruction_loss")(x, target, inputs.offsets, inputs.state, weights)


def derivative(backend: str, inputs: Inputs, grad_loss: torch.Tensor) -> torch.Tensor:
    call = function(backend, "reconstruction_loss_backward")
    return call(grad_loss, inputs.x, inputs.grad_y, inputs.offsets, inputs.state, inputs.weights)


def takes_part(state: np.ndarray, s: int, blueprints: int) -> bool:
    life = state.copy()
    life[0, s] = 3 if life[0, s] == TRAINING else 0
    return oracle.is_grafted(life, s, blueprints)


def closed_form(inputs: Inputs, grad_loss: np.ndarray):
    """(loss, its tolerance, gradient, its tolerance); a tolerance of NaN: anything goes, of inf: nothing finite."""
    x, target, weights = (oracle.values_of(t).astype(LONG) for t in (inputs.x, inputs.grad_y, inputs.weights))
    x, target = (t.reshape(-1, t.shape[-1]) if t.size else t.reshape(0, t.shape[-1]) for t in (x, target))
    offsets, state = inputs.offsets.tolist(), inputs.state.cpu().numpy()
    narrow = inputs.x.dtype != torch.float64
    unit, least = (LONG(2.0**-24), LONG(2.0**-149)) if narrow else (LONG(2.0**-53), oracle.DENORMAL)
    bank = torch.finfo(inputs.weights.dtype)
    rows, seeds = x.shape[0], len(offsets) - 1
    loss, loss_error = np.zeros(seeds, LONG), np.zeros(seeds, LONG)
    grad, grad_error = np.zeros(weights.shape, LONG), np.zeros(weights.shape, LONG)
    for s in range(seeds):
        own, n = slice(offsets[s], offsets[s + 1]), rows * (offsets[s + 1] - offsets[s])
        if not n or not takes_part(state, s, weights.shape[0]):
            continue
        p, strategy = int(state[1, s]), int(state[3, s])
        w, ones = weights[p, own], np.ones(own.stop - own.start, LONG)
        slope = {0: w, 1: ones, 2: ones / 2, 3: w}[strategy]
        added = {0: 0 * ones, 1: w, 2: w / 2, 3: weights[p + 1, own] if strategy == 3 else w}[strategy]
        parts = slope * x[:, own], added + 0 * x[:, own], target[:, own]
        r, size = parts[0] + parts[1] - parts[2], sum(map(np.abs, parts))
        e = 4 * unit * size  # a product, a sum and a difference, each rounded once
        loss[s] = (r * r).sum() / n
        loss_error[s] = (2 * abs(r) * e + e * e).sum() / n + (SLACK * unit) * loss[s] + 2 * least
        wild = ~np.isfinite(size)
        if not np.isfinite(size).all() or size.max() > HUGE:
            loss_error[s] = np.inf if wild.any() else np.nan
        outer = {0: [x[:, own]], 1: [1], 2: [LONG(0.5)], 3: [x[:, own], 1]}[strategy]
        for row, by in enumerate(outer):
            scale = 2 * LONG(grad_loss[s]) / n
            value = scale * (r * by).sum(0)
            error = abs(scale) * (abs(e * by) + SLACK * unit * abs(r * by) + 2 * least).sum(0)
            error += LONG(bank.eps) * abs(value) + LONG(bank.smallest_normal) * LONG(bank.eps) + 4 * least
            foreseen = (size.max(0) < HUGE) & (abs(by * x[:, own]).max(0) < HUGE) & (abs(value) < bank.max / 2)
            error = np.where(wild.any(0), np.inf if scale else np.nan, np.where(foreseen, error, np.nan))
            grad[p + row, own], grad_error[p + row, own] = value, error
    return loss, loss_error, grad, grad_error


def complaints(what: str, got: torch.Tensor, expected: np.ndarray, error: np.ndarray) -> list[str]:
    found = oracle.values_of(got).astype(LONG)
    with np.errstate(invalid="ignore"):
        right = np.where(error == 0, found == 0, abs(found - expected) <= error)
    right = np.where(np.isnan(error), True, np.where(error == np.inf, ~np.isfinite(found), right))
    return [
        f"{what}{list(map(int, at))}: {found[tuple(at)]}, expected {expected[tuple(at)]} +- {error[tuple(at)]}"
        for at in np.argwhere(~right)[:5]
    ]


def check_case(case: Case, backend: str, device) -> list[str]:
    """The loss, and its gradient by autograd and by the derivative's own operator."""
    inputs = training(case, device)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    drawn = np.random.default_rng(case.rng).standard_normal(case.seeds).astype(np.float32)
    drawn[case.seeds // 2 :: 5] = 0
    grad_loss = torch.from_numpy(drawn).to(device, wide)
    with np.errstate(all="ignore"):
        loss, loss_error, grad, grad_error = closed_form(inputs, drawn)
    weights = inputs.weights.detach().requires_grad_()
    found = loss_of(backend, inputs, weights)
    assert (found.dtype, found.device, tuple(found.shape)) == (wide, inputs.x.device, (case.seeds,))
    found.backward(grad_loss)
    direct = derivative(backend, inputs, grad_loss)
    assert (direct.dtype, direct.shape) == (weights.dtype, weights.shape) and direct.is_contiguous()
    wrong = complaints("loss", found, loss, loss_error) + complaints("grad", weights.grad, grad, grad_error)
    return wrong + complaints("derivative", direct, grad, grad_error)


@checks.with_cases
@checks.backends
def test_closed_forms(backend, device, case):
    assert check_case(case, backend, device) == []


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", cases.SANITIZER_CASES, ids=str)
def test_small_cases(device, case):
    assert check_case(case, "ops", device) == []


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("states", STRATEGIES)
@checks.backends
def test_each_strategy_by_hand(backend, device, states, dtype):
    """Two features, two rows: numbers that every dtype holds."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype, device=device)
    target = torch.tensor([[0.0, 2.0], [1.0, 1.0]], dtype=dtype, device=device)
    bank = torch.tensor([[2.0, -1.0], [1.0, 0.5]], dtype=dtype, device=device, requires_grad=True)
    state = torch.zeros(8, 1, dtype=torch.int32, device=device)
    state[0], state[3] = TRAINING, STRATEGIES.index(states)
    residual, gradient = {
        "mul": ([[2, -4], [5, -5]], [[8.5, -14], [0, 0]]),
        "add": ([[3, -1], [4, 2]], [[3.5, 0.5], [0, 0]]),
        "mid": ([[1.5, -1.5], [1.5, 0.5]], [[0.75, -0.25], [0, 0]]),
        "affine": ([[3, -3.5], [6, -4.5]], [[10.5, -12.5], [4.5, -4]]),
    }[states]
    loss = function(backend, "reconstruction_loss")(x, target, torch.tensor([0, 2], dtype=torch.int32, device=device), state, bank)  # fmt: skip
    assert loss.tolist() == [sum(r * r for row in residual for r in row) / 4]
    loss.sum().backward()
    assert bank.grad.tolist() == gradient


# ---- who takes part --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@checks.backends
def test_seeds_not_in_training_stay_out_of_it(backend, device, poison):
    """In every other state, or without a blueprint: 0 exactly, no gradient, though all that is theirs is NaN."""
    inputs = build(Case((9, 60), 20, chunks="balanced", states="grafted"), device)
    inputs.state[0] = torch.tensor([*range(11), -1, 12, *[TRAINING] * 7], device=device)
    inputs.state[3] = torch.arange(20, device=device) % 4
    inputs.state[1] = 1
    inputs.state[1, 13], inputs.state[3, 14], inputs.state[1, 15] = -1, 4, 3  # seed 15: AFFINE in the last row
    inputs.state[1, 16], inputs.state[3, 17] = 4, -1
    taking_part = torch.tensor([s in (2, 18, 19) for s in range(20)], device=device)
    grad_loss = torch.ones(20, device=device)
    want_loss, want_grad = loss_of(backend, inputs), derivative(backend, inputs, grad_loss)
    theirs = taking_part.repeat_interleave(3)
    assert torch.equal(want_loss != 0, taking_part) and torch.equal(want_grad.ne(0).any(0), theirs)
    for tensor in (inputs.x, inputs.grad_y, inputs.weights):
        tensor[..., ~theirs] = poison
        assert checks.same_bits(loss_of(backend, inputs), want_loss)
        assert checks.same_bits(derivative(backend, inputs, grad_loss), want_grad)
    grad_loss[~taking_part] = poison  # of a loss that is constant
    assert checks.same_bits(derivative(backend, inputs, grad_loss), want_grad)


@checks.backends
def test_what_is_not_finite_is_told_to_its_own_seed_only(backend, device):
    inputs = training(Case((9, 40), 4, chunks="balanced", states="grafted", blueprints=2), device)
    inputs.state[1] = 0
    grad_loss = torch.ones(4, device=device)
    want_loss, want_grad = loss_of(backend, inputs), derivative(backend, inputs, grad_loss)
    inputs.x[4, 13] = torch.nan  # seed 1 owns features 10 to 19
    loss, grad = loss_of(backend, inputs), derivative(backend, inputs, grad_loss)
    others = [0, 2, 3]
    assert loss[1].isnan() and torch.equal(loss[others], want_loss[others])
    apart = [f for f in range(40) if f != 13]
    assert grad[0, 13].isnan() and torch.equal(grad[:, apart], want_grad[:, apart])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@checks.backends
def test_a_neutral_blueprint_reconstructs_its_input(backend, device, dtype):
    """The loss is 0 exactly, and so is its gradient."""
    inputs = training(Case((20, 30), 4, dtype=dtype, states="grafted", values="mean1000"), device)
    inputs.state[1] = 0
    inputs.state[3] = torch.tensor([0, 1, 3, 0], device=device)
    owner = torch.repeat_interleave(torch.arange(4, device=device), inputs.offsets.diff().long())
    weights = torch.zeros_like(inputs.weights)
    weights[0] = (inputs.state[3][owner] != 1).to(dtype)
    loss = loss_of(backend, inputs, weights.requires_grad_(), target=inputs.x)
    loss.sum().backward()
    assert not loss.any() and not weights.grad.any()


# ---- empty ones ------------------------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    "case",
    [
        Case((0, 8), 3),
        Case((3, 0, 8), 3),
        Case((4, 0), 3),
        Case((4, 8), 0),
        Case((4, 8), 3, blueprints=0),
        Case((4, 8), 3, chunks="empty"),
        Case((0, 8), 3, dtype=torch.float64),
    ],
    ids=str,
)
@checks.backends
def test_nothing_to_reconstruct(backend, device, case):
    inputs = training(case, device)
    weights = inputs.weights.detach().requires_grad_()
    loss = loss_of(backend, inputs, weights)
    assert loss.shape == (case.seeds,) and loss.dtype == (weights.dtype) and not loss.any()
    loss.sum().backward()
    assert weights.grad.shape == weights.shape and not weights.grad.any()
    grad = derivative(backend, inputs, torch.ones_like(loss))
    assert grad.shape == weights.shape and not grad.any()


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
@checks.backends
def test_the_target_may_be_strided_in_any_way(backend, device, dtype):
    """Each layout of x with each of the target, the same numbers: the same loss but for the order of the sums."""
    layouts = [name for name, rank in cases.LAYOUTS.items() if rank <= 3]
    layouts = [name for name in layouts if not name.startswith(("expanded", "overlapping"))]  # these change the numbers
    base = Case((5, 7, 33), 4, dtype=dtype, weights_dtype=torch.float32, states="grafted")
    grad_loss = torch.ones(4, device=device)
    want = None
    for layout in layouts:
        for target_layout in layouts:
            case = Case(**{**base.__dict__, "layout": layout, "grad_layout": target_layout})
            inputs = training(case, device)
            found = loss_of(backend, inputs), derivative(backend, inputs, grad_loss)
            want = found if want is None else want
            for got, expected in zip(found, want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@checks.backends
def test_target_of_one_row_for_all(backend, device):
    """Strides of 0 and a target that is x itself."""
    inputs = training(Case((12, 20), 3, states="grafted"), device)
    row = inputs.grad_y[:1].expand(12, 20)
    assert checks.same_bits(loss_of(backend, inputs, target=row), loss_of(backend, inputs, target=row.contiguous()))
    itself = loss_of(backend, inputs, target=inputs.x)
    assert checks.same_bits(itself, loss_of(backend, inputs, target=inputs.x.clone()))


# ---- autograd --------------------------------------------------------------------------------------------------------


def doubles(device, states: str, layout: str = "contiguous") -> tuple[Inputs, torch.Tensor]:
    """The loss is quadratic in the bank: central differences are exact for any step, so the step is large."""
    case = Case((3, 2, 7), 3, dtype=torch.float64, states=states, chunks="balanced", layout=layout, rng=2)
    inputs = build(case, device)
    inputs.state[0] = TRAINING
    return inputs, inputs.weights.clone().requires_grad_()


@pytest.mark.parametrize("layout", ["contiguous", "features_middle"])
@pytest.mark.parametrize("states", STRATEGIES)
@checks.backends
def test_gradcheck(backend, device, states, layout):
    inputs, weights = doubles(device, states, layout)
    assert gradcheck(lambda w: loss_of(backend, inputs, w), weights, eps=0.25, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("states", STRATEGIES)
def test_gradgradcheck_of_the_reference(device, states):
    inputs, weights = doubles(device, states)
    assert gradgradcheck(lambda w: loss_of("reference", inputs, w), weights, eps=0.25, atol=1e-9, rtol=1e-9)


def test_second_derivative_names_the_way_out(device):
    inputs, weights = doubles(device, "mul")
    (dw,) = torch.autograd.grad(loss_of("ops", inputs, weights).sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="reconstruction_loss_backward has no derivative.*enable_triton=False"):
        dw.sum().backward()


@checks.backends
def test_the_gradient_reaches_the_bank_alone(backend, device):
    inputs = training(Case((12, 20), 3, states="grafted"), device)
    x, target = inputs.x.detach().requires_grad_(), inputs.grad_y.detach().requires_grad_()
    assert not loss_of(backend, inputs, x=x, target=target).requires_grad
    weights = inputs.weights.detach().requires_grad_()
    loss_of(backend, inputs, weights, x, target).sum().backward()
    assert x.grad is None and target.grad is None and weights.grad.any()
    with torch.no_grad():
        assert not loss_of(backend, inputs, weights, x, target).requires_grad


@checks.backends
def test_func_grad(backend, device):
    inputs, weights = doubles(device, "affine")
    (want,) = torch.autograd.grad(loss_of(backend, inputs, weights).sum(), weights)
    for _ in range(2):
        found = torch.func.grad(lambda w: loss_of(backend, inputs, w).sum())(weights.detach())
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    value = torch.func.grad_and_value(lambda w: loss_of(backend, inputs, w).sum())(weights.detach())[1]
    torch.testing.assert_close(value, loss_of(backend, inputs).sum(), rtol=0, atol=0)


def _dual(f, w):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(w, torch.ones_like(w)))


BEYOND = {
    "jvp": lambda f, w: torch.func.jvp(f, (w,), (torch.ones_like(w),)),
    "dual numbers": _dual,
    "grad of grad": lambda f, w: torch.func.grad(lambda w: torch.func.grad(f)(w).sum())(w),
    "jvp of grad": lambda f, w: torch.func.jvp(torch.func.grad(f), (w,), (torch.ones_like(w),)),
    "grad of jvp": lambda f, w: torch.func.grad(lambda w: torch.func.jvp(f, (w,), (torch.ones_like(w),))[1])(w),
}


@pytest.mark.parametrize("beyond", BEYOND)
def test_more_than_one_backward_is_an_error_not_a_zero(device, beyond):
    inputs, weights = doubles(device, "affine")
    with pytest.raises(RuntimeError, match="kasmina_ext.reference"):
        BEYOND[beyond](lambda w: loss_of("ops", inputs, w).sum(), weights.detach())
    BEYOND[beyond](lambda w: loss_of("reference", inputs, w).sum(), weights.detach())

    def backward(backend: str, grad_loss: torch.Tensor) -> torch.Tensor:
        return derivative(backend, inputs, grad_loss).square().sum()

    ones = torch.ones(inputs.state.size(1), dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="kasmina_ext.reference"):
        BEYOND[beyond](lambda g: backward("ops", g), ones)
    BEYOND[beyond](lambda g: backward("reference", g), ones)


def test_the_references_derivative_has_one_itself(device):
    """It is what the operators' error sends people to."""
    inputs, weights = doubles(device, "affine")
    grad_loss = torch.rand(inputs.state.size(1), dtype=torch.float64, device=device).requires_grad_()
    call = function("reference", "reconstruction_loss_backward")

    def found(grad_loss, weights):
        return call(grad_loss, inputs.x, inputs.grad_y, inputs.offsets, inputs.state, weights)

    assert gradcheck(found, (grad_loss, weights)) and found(grad_loss, weights).requires_grad


@checks.backends
def test_far_more_seeds_than_features(backend, device):
    """Nearly all of a hundred thousand chunks are empty."""
    inputs = training(Case((6, 24), 3, states="grafted"), device)
    want, grad_loss = loss_of(backend, inputs), torch.ones(3, device=device)
    slope = derivative(backend, inputs, grad_loss)
    many = 100_000
    crowd = inputs.offsets.new_zeros(many + 1)
    crowd[-3:] = inputs.offsets[1:]
    crowd[-4] = inputs.offsets[0]
    state = torch.zeros(8, many, dtype=torch.int32, device=device)
    state[0], state[:, -3:] = TRAINING, inputs.state
    call = (inputs.x, inputs.grad_y, crowd, state, inputs.weights)
    losses = function(backend, "reconstruction_loss")(*call)
    assert torch.equal(losses[-3:], want) and not losses[:-3].any()
    again = function(backend, "reconstruction_loss_backward")(torch.ones(many, device=device), *call)
    assert torch.equal(again, slope)


def test_vmap_is_refused(device):
    inputs, weights = doubles(device, "mul")
    with pytest.raises(RuntimeError, match="reconstruction_loss cannot be vmapped"):
        torch.func.vmap(lambda w: loss_of("ops", inputs, w))(weights.detach().repeat(2, 1, 1))


@checks.backends
def test_gradient_descent_reconstructs(backend, device):
    """What it is for: from random blueprints to neutral ones."""
    inputs = training(Case((64, 24), 3, states="grafted", chunks="balanced"), device)
    inputs.state[3], inputs.state[1] = torch.tensor([0, 1, 3], device=device), 0
    weights = inputs.weights.detach().requires_grad_()
    first = loss_of(backend, inputs, weights, target=inputs.x).detach()
    for _ in range(200):
        (step,) = torch.autograd.grad(loss_of(backend, inputs, weights, target=inputs.x).sum(), weights)
        weights = (weights - 2.0 * step).detach().requires_grad_()
    last = loss_of(backend, inputs, weights, target=inputs.x)
    assert (last < 1e-6).all() and (first > 0.1).all()


# ---- the call --------------------------------------------------------------------------------------------------------


@checks.backends
def test_the_same_bits_every_time(backend, device):
    for case in (Case((3000, 70), 9, dtype=torch.bfloat16), Case((64, 900), 30), Case((8, 6, 6, 50), 5, layout="nchw")):
        inputs, grad_loss = training(case, device), torch.ones(case.seeds, device=device)
        want = loss_of(backend, inputs), derivative(backend, inputs, grad_loss)
        for _ in range(5):
            assert torch.equal(loss_of(backend, inputs), want[0])
            assert torch.equal(derivative(backend, inputs, grad_loss), want[1])


@checks.backends
def test_nothing_is_written(backend, device):
    inputs = training(Case((12, 20), 3), device)
    tensors = (inputs.x, inputs.grad_y, inputs.offsets, inputs.state, inputs.weights)
    before = [(t.clone(), t._version) for t in tensors]
    loss = loss_of(backend, inputs, inputs.weights.requires_grad_())
    loss.sum().backward()
    for tensor, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values) and tensor._version == version


@checks.backends
def test_nothing_waits_for_the_device(backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs = training(Case((300, 200), 12), "cuda")
    weights = inputs.weights.requires_grad_()
    loss_of(backend, inputs, weights).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(backend, inputs, weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements(device):
    checks.needs_memory(device, gib=10 if device.type == "cuda" else 2)
    assert check_big_reconstruction(device) == []
