"""state_update: verdicts and state against the plain-Python model, in every order and size that a batch may have."""

from __future__ import annotations

import checks
import lifecycle_model as model
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lifecycle_checks import function
from lifecycle_model import INT_MAX, INT_MIN, POLICIES, Seed, Tensors

from kasmina_ext import ops
from kasmina_ext.lifecycle import TransitionRules

ANY = torch.tensor(model.table(POLICIES["any"]), dtype=torch.int32)
STRICT = torch.tensor(model.table(POLICIES["strict"]), dtype=torch.int32)
BITS = {"lifecycle": 1, "blueprint": 2, "epochs": 4, "strategy": 8}


def ints(values, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32).to(device)


def apply(backend: str, tensors: Tensors, ids, values, mask, rules, blueprints: int = 4) -> list[int]:
    """One batch; the device is that of the tensors."""
    device = tensors.state.device
    requests = ints(ids, device), ints(values, device).reshape(-1, 4), ints(mask, device), ints(rules, device)
    verdicts = function(backend, "state_update")(*tensors.lived, *requests, blueprints)
    assert verdicts.dtype == torch.int32 and verdicts.device == tensors.state.device and verdicts.is_contiguous()
    return verdicts.tolist()


def single(backend: str, device, seed: Seed, rules=ANY, blueprints: int = 4, **request: int) -> tuple[int, Seed]:
    """One request for one seed; the columns that are not named hold what would be refused."""
    tensors = model.to_tensors([seed], device)
    values = [request.get(name, INT_MIN) for name in BITS]
    verdicts = apply(backend, tensors, [0], values, [sum(BITS[name] for name in request)], rules, blueprints)
    return verdicts[0], model.from_tensors(tensors)[0]


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_rules_of_the_package_are_the_tables_of_the_specification(policy):
    assert getattr(TransitionRules, policy)().tensor.tolist() == model.table(POLICIES[policy])


@pytest.mark.parametrize("policy", POLICIES)
@checks.backends
def test_every_pair_at_every_limit(backend, device, policy):
    """All 11 x 11 pairs, and states that do not exist, with epochs just below, at and above each limit of any policy."""
    limits = {least for rules in POLICIES.values() for least in rules.values()}
    epochs = sorted({max(0, limit + d) for limit in limits for d in (-1, 0, 1)} | {INT_MAX})
    states = [*range(model.STATES), -1, 11, INT_MIN, INT_MAX]
    cases = [(source, to, e) for source in states for to in states for e in epochs]
    tensors = model.to_tensors([Seed(lifecycle=source, epochs=e, count=3) for source, _, e in cases], device)
    values = [(to, 9, -9, 9) for _, to, _ in cases]
    rules = getattr(TransitionRules, policy)().tensor
    verdicts = apply(backend, tensors, range(len(cases)), values, [1] * len(cases), rules)
    found = model.from_tensors(tensors)
    for (source, to, e), verdict, seed in zip(cases, verdicts, found, strict=True):
        least = POLICIES[policy].get((source, to))
        expected = model.ILLEGAL if least is None else model.TOO_EARLY if e < least else model.APPLIED
        assert verdict == expected, (source, to, e)
        if verdict == model.APPLIED and source != to:
            ring = [(0, 0)] * model.RING
            ring[3] = (source, to)
            assert seed == Seed(lifecycle=to, parent=source, ring=ring, count=4), (source, to, e)
        else:
            assert seed == Seed(lifecycle=source, epochs=e, count=3), (source, to, e)


# ---- rule by rule ----------------------------------------------------------------------------------------------------


@checks.backends
def test_verdicts_in_their_order(backend, device):
    """A request that is wrong in every way is refused for the first; each thing put right, for the next."""
    seed = Seed(lifecycle=model.TRAINING, blueprint=2, epochs=99, strategy=1)
    wrong = {"lifecycle": model.FOSSILIZED, "blueprint": 4, "epochs": -1, "strategy": 4}
    for right, verdict in [
        ({}, model.ILLEGAL),
        ({"lifecycle": model.GRAFTING}, model.TOO_EARLY),
        ({"lifecycle": model.CANCELLED}, model.TOO_EARLY),
    ]:
        assert single(backend, device, seed, STRICT, **{**wrong, **right}) == (verdict, seed)
    seed.epochs, wrong["lifecycle"] = 100, model.GRAFTING
    for name, verdict in [
        ("blueprint", model.BAD_BLUEPRINT),
        ("strategy", model.BAD_STRATEGY),
        ("epochs", model.BAD_EPOCHS),
    ]:
        assert single(backend, device, seed, STRICT, **wrong) == (verdict, seed)
        wrong[name] = 0
    verdict, after = single(backend, device, seed, STRICT, **wrong)
    ring = [(model.TRAINING, model.GRAFTING)] + [(0, 0)] * 9
    assert (verdict, after) == (0, Seed(model.GRAFTING, 0, 0, 0, model.TRAINING, ring=ring, count=1))


@checks.backends
def test_a_column_is_read_only_where_the_mask_says_so(backend, device):
    """All 16 masks, with other bits set as well; what is not chosen holds what would be refused."""
    good = dict(lifecycle=model.CULLED, blueprint=3, epochs=7, strategy=2)
    for bits in range(16):
        chosen = {name: good[name] for name, bit in BITS.items() if bits & bit}
        for others in (0, 16, 1 << 30, INT_MIN, -16):
            tensors = model.to_tensors([Seed(model.TRAINING, 1, 12, 0)], device)
            values = [chosen.get(name, INT_MIN) for name in BITS]
            assert apply(backend, tensors, [0], values, [bits | others], ANY) == [0]
            expected = Seed(model.TRAINING, 1, 12, 0)
            if bits & 1:
                expected.move(model.CULLED)
            for name in chosen:
                setattr(expected, name, good[name])
            assert model.from_tensors(tensors) == [expected]


@checks.backends
def test_values_at_their_limits(backend, device):
    seed = Seed(lifecycle=5, epochs=3)
    for blueprints in (0, 1, 10, INT_MAX, 2**31, 2**40, 2**63 - 1, -1, -(2**40)):
        for blueprint in (INT_MIN, -2, -1, 0, 9, 10, max(0, min(blueprints - 1, INT_MAX)), INT_MAX):
            verdict, after = single(backend, device, seed, blueprints=blueprints, blueprint=blueprint)
            good = -1 <= blueprint < blueprints
            assert verdict == (0 if good else model.BAD_BLUEPRINT)
            assert after.blueprint == (blueprint if good else -1)
    for strategy in (INT_MIN, -1, 0, 1, 2, 3, 4, INT_MAX):
        verdict, after = single(backend, device, seed, strategy=strategy)
        assert (verdict, after.strategy) == ((0, strategy) if 0 <= strategy <= 3 else (model.BAD_STRATEGY, 0))
    for epochs in (INT_MIN, -1, 0, 1, INT_MAX):
        verdict, after = single(backend, device, seed, epochs=epochs)
        assert (verdict, after.epochs) == ((0, epochs) if epochs >= 0 else (model.BAD_EPOCHS, 3))


@checks.backends
def test_the_last_request_for_a_seed_is_the_only_one_considered(backend, device):
    """Whatever it asks: nothing (mask 0), or what is refused. Ids out of range supersede nobody."""
    for last_mask, last_to, verdict in ((0, 0, 0), (1, 99, model.ILLEGAL), (1, 1, 0), (16, 0, 0)):
        tensors = model.to_tensors([Seed(), Seed()], device)
        ids = [0, 1, 0, 2, -1, 0, INT_MIN, INT_MAX, 2]
        values = [(1, 0, 0, 0)] * 5 + [(last_to, 0, 0, 0)] + [(1, 0, 0, 0)] * 3
        found = apply(backend, tensors, ids, values, [1] * 5 + [last_mask] + [1] * 3, ANY)
        assert found == [6, 0, 6, 1, 1, verdict, 1, 1, 1]
        moved = Seed()
        moved.move(1)
        assert model.from_tensors(tensors) == [moved if last_to == 1 else Seed(), moved]


@checks.backends
def test_from_a_state_to_itself(backend, device):
    """Allowed: that column writes nothing, the others what they say. Not allowed: refused like any other."""
    seed = Seed(model.EVALUATING, 1, 40, 2, model.STABILIZATION, count=2)
    assert single(backend, device, seed, lifecycle=model.EVALUATING) == (0, seed)
    verdict, after = single(backend, device, seed, lifecycle=model.EVALUATING, epochs=3, blueprint=0)
    assert (verdict, after) == (0, Seed(model.EVALUATING, 0, 3, 2, model.STABILIZATION, count=2))
    assert single(backend, device, seed, STRICT, lifecycle=model.EVALUATING) == (model.ILLEGAL, seed)
    waiting = ANY.clone()
    waiting[model.EVALUATING, model.EVALUATING] = 41
    assert single(backend, device, seed, waiting, lifecycle=model.EVALUATING) == (model.TOO_EARLY, seed)


@checks.backends
def test_negative_rules_are_illegal_and_great_ones_wait_for_ever(backend, device):
    seed = Seed(model.DORMANT, epochs=INT_MAX - 1)
    for rule, verdict in ((-1, 2), (-2, 2), (INT_MIN, 2), (0, 0), (INT_MAX - 1, 0), (INT_MAX, 3)):
        rules = STRICT.clone()
        rules[0, 1] = rule
        assert single(backend, device, seed, rules, lifecycle=1)[0] == verdict


@checks.backends
def test_epochs_below_zero_are_fewer_than_none(backend, device):
    """Written behind the library's back."""
    assert single(backend, device, Seed(epochs=-1), lifecycle=1)[0] == model.TOO_EARLY


@checks.backends
def test_the_ring_holds_the_last_ten(backend, device):
    tensors, path = model.to_tensors([Seed()], device), []
    for turn in range(27):
        to = (turn * 3 + 1) % model.STATES
        source = int(tensors.state[0, 0])
        assert apply(backend, tensors, [0], [(to, 0, 0, 0)], [1], ANY) == [0]
        if to != source:
            path.append([source, to])
        assert tensors.count.tolist() == [len(path)] and tensors.state[4, 0] == path[-1][0]
        newest = [tensors.history[0, (len(path) - 1 - k) % 10].tolist() for k in range(min(10, len(path)))]
        assert newest == path[::-1][:10]
    assert len(path) > 20


@checks.backends
def test_a_count_past_its_end_wraps(backend, device):
    """... and its slot in the ring is the count modulo 10 as Python has it."""
    tensors = model.to_tensors([Seed(count=INT_MAX), Seed(count=INT_MIN), Seed(count=-1)], device)
    assert apply(backend, tensors, [0, 1, 2], [(1, 0, 0, 0)] * 3, [1] * 3, ANY) == [0, 0, 0]
    assert tensors.count.tolist() == [INT_MIN, INT_MIN + 1, 0]
    slots = [INT_MAX % 10, INT_MIN % 10, 9]
    assert [tensors.history[s, slot].tolist() for s, slot in enumerate(slots)] == [[0, 1]] * 3


# ---- against the model -----------------------------------------------------------------------------------------------

_number = st.one_of(st.integers(-2, 12), st.sampled_from([INT_MIN, INT_MAX]))
_mask = st.one_of(st.integers(0, 15), st.sampled_from([-1, -16, 16, 31, INT_MIN, INT_MAX]))
_rule = st.sampled_from([0, 0, 0, -1, 1, 3, INT_MIN, INT_MAX])
_seed = st.builds(
    Seed,
    lifecycle=st.one_of(st.integers(0, 10), _number),
    blueprint=_number,
    epochs=_number,
    strategy=_number,
    parent=_number,
    rest=st.lists(_number, min_size=3, max_size=3),
    ring=st.lists(st.tuples(_number, _number), min_size=10, max_size=10),
    count=st.one_of(st.integers(0, 40), st.sampled_from([INT_MIN, -1, INT_MAX])),
    alpha=st.just(0.25),
)


@st.composite
def _batches(draw):
    seeds = draw(st.lists(_seed, max_size=4))
    ids = st.one_of(st.integers(-1, len(seeds)), st.integers(0, max(0, len(seeds) - 1)), _number)
    state = st.one_of(st.integers(0, 10), st.integers(0, 10), _number)
    values = st.one_of(
        st.tuples(state, st.integers(-1, 3), st.integers(0, 9), st.integers(0, 3)), *[st.tuples(*[_number] * 4)]
    )
    requests = draw(st.lists(st.tuples(ids, values, _mask), max_size=10))
    rules = [[draw(_rule)] * model.STATES for _ in range(model.STATES)]
    for source, to in draw(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), max_size=5)):
        rules[source][to] = draw(_rule)
    return seeds, requests, rules, draw(st.sampled_from([4, 1, 0, -1, INT_MAX]))


@checks.backends
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batch=_batches())
def test_matches_the_model(backend, device, batch):
    seeds, requests, rules, blueprints = batch
    tensors = model.to_tensors(seeds, device)
    ids, values, mask = ([request[k] for request in requests] for k in range(3))
    found = apply(backend, tensors, ids, values, mask, rules, blueprints)
    seeds = model.from_tensors(model.to_tensors(seeds))
    assert found == model.update(seeds, ids, values, mask, rules, blueprints)
    assert model.differences(seeds, tensors) == []


# ---- many ------------------------------------------------------------------------------------------------------------


def random_requests(updates: int, num_seeds: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """ids (some out of range), values (some wrong) and masks."""
    ids = rng.integers(-2, num_seeds + 2, updates)
    values = np.stack([rng.integers(low, high, updates) for low, high in ((0, 11), (-1, 4), (0, 300), (0, 4))], 1)
    odd = rng.choice([-1, 11, -2, 4, INT_MIN, INT_MAX], values.shape)
    values = np.where(rng.random(values.shape) < 0.05, odd, values)
    return tuple(torch.from_numpy(a.astype(np.int32)) for a in (ids, values, rng.integers(0, 32, updates)))


@pytest.mark.sanitizer
@pytest.mark.parametrize("aliased", ["seed_ids", "values", "mask"])
@checks.backends
def test_requests_that_are_views_of_the_state(backend, device, aliased):
    """They are read as they were before the batch."""
    states, generator = 4, np.random.default_rng(7)
    for _ in range(20):
        tensors = model.random_tensors(states, generator, device)
        tensors.state[:4] = torch.from_numpy(generator.integers(0, 4, (4, states)).astype(np.int32)).to(device)
        start, seeds = tensors.clone(), model.from_tensors(tensors)
        requests = {
            "seed_ids": torch.arange(states),
            "values": torch.ones(states, 4),
            "mask": torch.full((states,), 15),
        }
        requests = {name: t.int().to(device) for name, t in requests.items()}
        view = {"seed_ids": tensors.state[1], "values": tensors.state[:4], "mask": tensors.count}
        requests[aliased] = view[aliased]
        plain = [t.tolist() for t in requests.values()]
        found = function(backend, "state_update")(*tensors.lived, *requests.values(), ANY.to(device), 4)
        assert found.tolist() == model.update(seeds, *plain, ANY.tolist(), 4)
        assert model.differences(seeds, tensors) == [] and not tensors.same(start)


@pytest.mark.parametrize("num_seeds", [1, 1000, 300_000])
def test_a_million_requests(device, num_seeds):
    """The same verdicts and the same state from every path, twice over; duplicates from none to a million."""
    rng = np.random.default_rng(num_seeds)
    start, requests = model.random_tensors(num_seeds, rng), random_requests(1_000_000, num_seeds, rng)
    rules = torch.where(ANY >= 0, torch.from_numpy(rng.integers(-1, 120, (11, 11)).astype(np.int32)), -1)
    outcomes = []
    cpu = torch.device("cpu")
    for backend, where in (("reference", cpu), ("reference", device), ("ops", cpu), ("ops", device), ("ops", device)):
        tensors = Tensors(*(t.to(where, copy=True) for t in (*start.lived, start.alpha)))
        arguments = [t.to(where) for t in (*requests, rules)]
        verdicts = function(backend, "state_update")(*tensors.lived, *arguments, 4)
        outcomes.append((verdicts.cpu(), tensors))
    for verdicts, tensors in outcomes[1:]:
        assert torch.equal(verdicts, outcomes[0][0]) and tensors.same(outcomes[0][1])
    found = torch.bincount(outcomes[0][0], minlength=8)
    assert (found > 0).all() if num_seeds > 1 else found[6] > 0  # every verdict was given


@checks.backends
def test_many_requests_against_the_model(backend, device):
    rng = np.random.default_rng(5)
    tensors, requests = model.random_tensors(8_000, rng, device), random_requests(20_000, 8_000, rng)
    seeds = model.from_tensors(tensors)
    found = apply(backend, tensors, *requests, STRICT)
    assert found == model.update(seeds, *(t.tolist() for t in requests), STRICT.tolist(), 4)
    assert model.differences(seeds, tensors) == []


@checks.backends
def test_duplicates_by_the_hundred_thousand(backend, device):
    """One seed in a hundred thousand requests of which all but the last are refused, or wanted by nobody."""
    updates = 100_000
    tensors = model.to_tensors([Seed(), Seed(), Seed()], device)
    values = torch.tensor([[1, 0, 0, 0]], dtype=torch.int32).repeat(updates, 1)
    values[-1] = torch.tensor([1, 2, 50, 3])
    found = apply(backend, tensors, torch.ones(updates), values, torch.full((updates,), 15), STRICT)
    assert found == [6] * (updates - 1) + [0]
    moved = Seed(1, 2, 50, 3, 0, ring=[(0, 1)] + [(0, 0)] * 9, count=1)
    assert model.from_tensors(tensors) == [Seed(), moved, Seed()]


@checks.backends
def test_many_seeds_few_requests(backend, device):
    seeds = 1_000_000
    tensors = Tensors(
        torch.zeros(8, seeds, dtype=torch.int32, device=device),
        torch.zeros(seeds, 10, 2, dtype=torch.int32, device=device),
        torch.zeros(seeds, dtype=torch.int32, device=device),
        torch.ones(seeds, device=device),
    )
    ids = [seeds - 1, 0, seeds, 123_456, seeds - 1]
    assert apply(backend, tensors, ids, [(1, 3, 7, 3)] * 5, [15] * 5, STRICT) == [6, 0, 1, 0, 0]
    for row, value in ((0, 1), (1, 3), (2, 7), (3, 3)):
        assert tensors.state[row].nonzero().flatten().tolist() == [0, 123_456, seeds - 1]
        assert tensors.state[row, -1] == value
    assert tensors.count.nonzero().flatten().tolist() == [0, 123_456, seeds - 1]
    assert tensors.history.sum() == 3 and tensors.history[ids[3], 0].tolist() == [0, 1]


def test_ten_million_requests_for_ten_million_seeds(device):
    """On the CPU they all name the last seeds, so that the others' memory is never touched."""
    checks.needs_memory(device, gib=4)
    many, named = 10_000_000, 10_000_000 if device.type == "cuda" else 50_000
    state = torch.zeros(8, many, dtype=torch.int32, device=device)
    history = torch.zeros(many, 10, 2, dtype=torch.int32, device=device)
    count = torch.zeros(many, dtype=torch.int32, device=device)
    ids = np.random.default_rng(1).integers(many - named, many, many, dtype=np.int32)
    values, mask = ints([1, 2, 3, 1], device).expand(many, 4), ints([15], device).expand(many)
    verdicts = function("ops", "state_update")(
        state, history, count, ints(ids, device), values, mask, STRICT.to(device), 4
    )
    last = np.full(many, -1)
    last[ids] = np.arange(many)
    assert np.array_equal(verdicts.cpu().numpy(), np.where(last[ids] == np.arange(many), 0, 6))
    chosen = torch.from_numpy((last >= 0)[-named:].astype(np.int32))
    for row, value in enumerate((1, 2, 3, 1)):
        assert torch.equal(state[row, -named:].cpu(), chosen * value)
    assert torch.equal(count[-named:].cpu(), chosen) and not state[4:, -named:].any()
    assert torch.equal(history[-named:, 0, 1].cpu(), chosen) and history[-named:].sum() == chosen.sum()
    assert not state[:, : many - named].any() and not count[: many - named].any()


# ---- the call --------------------------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("updates", [0, 1, 7, 600])
@pytest.mark.parametrize("num_seeds", [0, 1, 5, 300])
@checks.backends
def test_small_sizes(backend, device, num_seeds, updates):
    rng = np.random.default_rng([num_seeds, updates])
    tensors, requests = model.random_tensors(num_seeds, rng, device), random_requests(updates, num_seeds, rng)
    seeds = model.from_tensors(tensors)
    found = apply(backend, tensors, *requests, STRICT)
    assert found == model.update(seeds, *(t.tolist() for t in requests), STRICT.tolist(), 4)
    assert model.differences(seeds, tensors) == []


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between them, and the first dimension innermost."""
    room = torch.full([2 * n + 1 for n in reversed(t.shape)], 77, dtype=t.dtype, device=t.device)
    window = room[tuple(slice(1, None, 2) for _ in t.shape)]
    return window.permute(*reversed(range(t.dim()))).copy_(t)


@pytest.mark.sanitizer
@checks.backends
def test_requests_of_any_strides(backend, device):
    rng = np.random.default_rng(8)
    tensors, requests = model.random_tensors(40, rng, device), random_requests(200, 40, rng)
    arguments = [t.to(device) for t in (*requests, STRICT)]
    loose = [spread(t) for t in arguments]
    assert not any(t.is_contiguous() for t in loose)
    again, call = tensors.clone(), function(backend, "state_update")
    want = call(*tensors.lived, *arguments, 4)
    assert torch.equal(call(*again.lived, *loose, 4), want) and again.same(tensors)
    zero = ints([0], device)
    repeated = zero.expand(9), zero.expand(9, 4), zero.expand(9), zero.expand(11, 11)
    assert call(*tensors.lived, *repeated, 4).tolist() == [6] * 8 + [0]
    assert torch.equal(call(*tensors.lived, zero[:0], zero.expand(0, 4), zero[:0], repeated[3], 4), zero[:0])


@checks.backends
def test_version_counters_move(backend, device):
    tensors = model.to_tensors([Seed()], device)
    inputs = [ints(v, device) for v in ([0], [[1, 0, 0, 0]], [1], STRICT)]
    before = [t._version for t in (*tensors.lived, *inputs)]
    function(backend, "state_update")(*tensors.lived, *inputs, 4)
    moved = [t._version > v for t, v in zip((*tensors.lived, *inputs), before, strict=True)]
    assert moved == [True] * 3 + [False] * 4


@checks.backends
def test_no_request_is_no_write(backend, device):
    tensors = model.to_tensors([Seed()], device)
    before = [t._version for t in tensors.lived]
    assert apply(backend, tensors, [], np.empty((0, 4)), [], STRICT) == []
    assert [t._version for t in tensors.lived] == before


def test_version_counters_move_in_a_compiled_graph(device):
    tensors = model.to_tensors([Seed()], device)
    inputs = [ints(v, device) for v in ([0], [[1, 0, 0, 0]], [1], STRICT)]
    call = torch.compile(function("ops", "state_update"), backend="aot_eager", fullgraph=True)
    before = [t._version for t in tensors.lived]
    assert call(*tensors.lived, *inputs, 4).tolist() == [0] and tensors.state[0, 0] == 1
    assert all(t._version > v for t, v in zip(tensors.lived, before, strict=True))


@checks.backends
def test_what_autograd_or_inference_mode_forbids_to_write(backend, device):
    with torch.inference_mode():
        frozen = model.to_tensors([Seed()], device)
    inputs = [ints(v, device) for v in ([0], [[1, 0, 0, 0]], [1], STRICT)]
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        function(backend, "state_update")(*frozen.lived, *inputs, 4)
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        function(backend, "lifecycle_step")(*frozen.lived, frozen.alpha, 1, 50, False)
    tensors = model.to_tensors([Seed(3)], device)
    tensors.alpha.requires_grad_()
    with pytest.raises(RuntimeError, match="grad"):
        function(backend, "lifecycle_step")(*tensors.lived, tensors.alpha, 1, 50, False)
    with torch.no_grad():
        function(backend, "lifecycle_step")(*tensors.lived, tensors.alpha, 1, 50, False)


@checks.backends
def test_works_without_grad_and_in_inference_mode(backend, device):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert single(backend, device, Seed(), STRICT, lifecycle=1)[0] == 0


def test_temporary_memory_is_an_int32_for_each_seed():
    """... and the verdicts."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    updates, num_seeds, rng = 300_000, 200_000, np.random.default_rng(4)
    tensors = model.random_tensors(num_seeds, rng, "cuda")
    arguments = [t.cuda() for t in (*random_requests(updates, num_seeds, rng), STRICT)]
    for call, allowed in (
        (lambda: ops.state_update(*tensors.lived, *arguments, 4), 4 * (updates + num_seeds)),
        (lambda: ops.lifecycle_step(*tensors.lived, tensors.alpha, 2, 50, True), 0),
    ):
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        assert torch.cuda.max_memory_allocated() - before <= allowed + 4096, kept
        del kept


@checks.backends
def test_nothing_waits_for_the_device(backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rng = np.random.default_rng(3)
    tensors = model.random_tensors(5000, rng, "cuda")
    arguments = [t.cuda() for t in (*random_requests(20_000, 5000, rng), STRICT)]
    call = function(backend, "state_update")
    call(*tensors.lived, *arguments, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*tensors.lived, *arguments, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
