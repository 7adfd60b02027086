"""The one table of cases, and the generator of random ones, that drive the operators' tests on every device and backend.

A `Case` names everything about a call; `build` turns it into tensors, the same on every device, and `Inputs.problem()`
hands them to the oracle (tests/checks.py runs and compares). Random cases are drawn through a `Draw`, so that NumPy (scripts/run_oracle.py) and hypothesis
(tests/test_random_cases.py) share one generator.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import oracle
import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def short(dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}
    return names[dtype]


# ---------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """`shape` is logical, features last. See the `_make_*` functions below for the words in the other fields."""

    shape: tuple[int, ...]
    seeds: int
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype | None = None  # None: that of x
    chunks: str = "ragged"
    blueprints: int = 4
    states: str = "mixed"
    alphas: str = "mixed"
    values: str = "normal"
    weights: str = "normal"
    telemetry: str = "used"
    rng: int = 0

    def __str__(self) -> str:
        weights = "" if self.weights_dtype in (None, self.dtype) else f"-w_{short(self.weights_dtype)}"
        words = ["x".join(map(str, self.shape)), f"S{self.seeds}", short(self.dtype) + weights]
        for name in ("layout", "grad_layout", "chunks", "states", "alphas", "values", "weights", "telemetry"):
            if getattr(self, name) != getattr(Case, name):
                words.append(("g_" if name == "grad_layout" else "") + getattr(self, name))
        if self.blueprints != Case.blueprints:
            words.append(f"P{self.blueprints}")
        return "-".join(words)


@dataclass
class Inputs:
    """The tensors of one call."""

    x: torch.Tensor
    grad_y: torch.Tensor
    offsets: torch.Tensor
    state: torch.Tensor
    alpha: torch.Tensor
    weights: torch.Tensor
    telemetry: torch.Tensor
    grad_telemetry: torch.Tensor
    _problem: oracle.Problem | None = field(default=None, repr=False)

    @property
    def seeds(self) -> tuple[torch.Tensor, ...]:
        return self.offsets, self.state, self.alpha, self.weights

    def problem(self) -> oracle.Problem:
        if self._problem is None:
            self._problem = oracle.Problem(self.x, *self.seeds, self.grad_y)
        return self._problem

    def requiring_grad(self) -> Inputs:
        """The same values as leaves of a graph; x keeps its strides."""
        leaves = {name: getattr(self, name).detach().requires_grad_() for name in ("x", "alpha", "weights")}
        copies = {name: getattr(self, name).clone() for name in ("telemetry", "grad_telemetry")}
        return replace(self, **leaves, **copies)


def build(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The tensors of a case: a function of the case alone, whatever the device."""
    rng = np.random.default_rng(case.rng)
    device = torch.device(device)
    features, seeds = case.shape[-1], case.seeds
    weights_dtype = case.weights_dtype or case.dtype
    offsets = _make_offsets(case.chunks, seeds, features, rng)
    x_bits = _make_bits(case.values, case.shape, case.dtype, rng)
    g_bits = _make_bits(case.values if case.values != "mean1000" else "normal", case.shape, case.dtype, rng)
    weights_bits = _make_bits(case.weights, (case.blueprints, features), weights_dtype, rng)
    state = _make_state(case.states, seeds, case.blueprints, rng)
    alpha = _make_alpha(case.alphas, seeds, rng)
    telemetry, grad_telemetry = _make_telemetry(case.telemetry, seeds, rng)
    return Inputs(
        x=_arrange(x_bits, case.layout, device).view(case.dtype),
        grad_y=_arrange(g_bits, case.grad_layout, device).view(case.dtype),
        offsets=torch.from_numpy(offsets).to(device),
        state=torch.from_numpy(state).to(device),
        alpha=torch.from_numpy(alpha).to(device),
        weights=_arrange(weights_bits, "contiguous", device).view(weights_dtype),
        telemetry=torch.from_numpy(telemetry).to(device),
        grad_telemetry=torch.from_numpy(grad_telemetry).to(device),
    )


# ---------------------------------------------------------------------------------------------------- makers

CHUNKS = ("uniform", "balanced", "ragged", "tail", "empty", "first", "last")


def _make_offsets(chunks: str, seeds: int, features: int, rng) -> np.ndarray:
    if chunks == "uniform":  # the remainder is unowned; with more seeds than features the last own nothing
        size = max(1, features // max(seeds, 1))
        offsets = np.minimum(np.arange(seeds + 1) * size, features)
    elif chunks == "balanced":
        offsets = np.arange(seeds + 1) * features // max(seeds, 1)
    elif chunks == "ragged":  # cut points anywhere, equal ones too; the whole of H is owned
        offsets = np.r_[0, np.sort(rng.integers(0, features + 1, seeds))]
        offsets[-1:] = features if seeds else 0
    elif chunks == "tail":  # ragged, and the last part is unowned
        offsets = np.r_[0, np.sort(rng.integers(0, features // 2 + 1, seeds))]
    elif chunks == "empty":
        offsets = np.zeros(seeds + 1)
    elif chunks == "first":  # the first seed owns all
        offsets = np.r_[0, np.full(seeds, features)]
    elif chunks == "last":
        offsets = np.r_[np.zeros(seeds), features if seeds else 0]
    else:
        raise ValueError(chunks)
    return offsets.astype(np.int32)


STATES = ("mixed", "grafted", "idle", "fossil", "illegal", "mul", "add", "mid", "affine", "edge")


def _make_state(states: str, seeds: int, blueprints: int, rng) -> np.ndarray:
    state = rng.integers(0, 100, (8, seeds))
    lifecycle, blueprint, strategy = oracle.LIFECYCLE_ROW, oracle.BLUEPRINT_ROW, oracle.STRATEGY_ROW
    state[lifecycle] = rng.integers(3, 8, seeds)
    state[blueprint] = rng.integers(0, max(blueprints - 1, 1), seeds)
    state[strategy] = rng.integers(0, 4, seeds)
    if states == "mixed":
        wild = rng.random((3, seeds)) < 0.15
        state[lifecycle] = np.where(wild[0], rng.integers(0, 11, seeds), state[lifecycle])
        state[blueprint] = np.where(wild[1], rng.integers(-1, blueprints + 2, seeds), state[blueprint])
        state[strategy] = np.where(wild[2], rng.integers(-1, 5, seeds), state[strategy])
    elif states == "idle":
        state[lifecycle] = rng.choice([0, 1, 2, 8, 9, 10], seeds)
    elif states == "fossil":
        state[lifecycle] = 7
    elif states == "illegal":
        state[lifecycle] = rng.choice([-5, 11, 3, 4, 5, 6, 7, INT_MAX, INT_MIN], seeds)
        state[blueprint] = rng.choice([-1, 0, blueprints - 1, blueprints, INT_MAX, INT_MIN, 10**6], seeds)
        state[strategy] = rng.choice([-1, 0, 1, 2, 3, 4, INT_MAX, INT_MIN], seeds)
    elif states == "edge":  # AFFINE at the bank's last row, which would read beyond it, among neighbours that do not
        state[strategy] = rng.choice([2, 3], seeds)
        state[blueprint] = rng.choice([max(blueprints - 2, 0), blueprints - 1], seeds)
    elif states in (names := ("mul", "add", "mid", "affine")):
        state[strategy] = names.index(states)
    elif states != "grafted":
        raise ValueError(states)
    return state.astype(np.int32)


ALPHAS = ("mixed", "zero", "one", "ramp", "denormal", "wild")


def _make_alpha(alphas: str, seeds: int, rng) -> np.ndarray:
    drawn = rng.random(seeds).astype(np.float32)
    if alphas == "mixed":
        return np.where(rng.random(seeds) < 0.4, rng.choice([0, 1], seeds), drawn).astype(np.float32)
    if alphas == "zero":
        return np.zeros(seeds, np.float32)
    if alphas == "one":
        return np.ones(seeds, np.float32)
    if alphas == "ramp":
        return drawn
    if alphas == "denormal":
        return rng.choice(np.array([1e-45, 3e-39, 1.1754942e-38, 0.99999994], np.float32), seeds)
    if alphas == "wild":  # written behind the library's back
        choices = np.array([-0.0, -0.5, 1.5, 3e38, np.inf, -np.inf, np.nan, 0.5, 1], np.float32)
        return rng.choice(choices, seeds)
    raise ValueError(alphas)


VALUES = ("normal", "mean1000", "special", "bits", "tiny", "large", "zeros", "constant", "outlier")


def _make_bits(values: str, shape: tuple[int, ...], dtype: torch.dtype, rng) -> torch.Tensor:
    """Raw bits, as integers: numbers pass through no arithmetic on their way to a device."""
    size = dtype.itemsize
    if values == "bits":  # every pattern: NaNs with payloads, signalling ones, denormals, infinities
        raw = rng.integers(0, 2 ** (8 * size), shape, dtype=np.uint64, endpoint=False).astype(oracle.BITS[size])
        return torch.from_numpy(raw.view(f"i{size}"))
    tiny, big = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    drawn = rng.standard_normal(shape)
    if values == "mean1000":
        drawn = drawn + 1000
    elif values == "special":
        odd = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, tiny / 4, -tiny, big, -big], shape)
        drawn = np.where(rng.random(shape) < 0.1, odd, drawn)
    elif values == "tiny":
        drawn = drawn * tiny
    elif values == "large":  # squares overflow the type, sums of a few rows do not
        drawn = drawn * (big / 1e4 if dtype != torch.float64 else 1e140)
    elif values == "zeros":
        drawn = rng.choice([0.0, -0.0], shape)
    elif values == "constant":
        drawn = np.full(shape, 0.1)
    elif values == "outlier" and drawn.size:
        drawn.flat[0] = 1e4
    elif values == "near_one":
        drawn = 1 + 0.1 * drawn
    elif values == "neutral":
        drawn = np.ones(shape)
    elif values not in ("normal", "outlier"):
        raise ValueError(values)
    bits = oracle.round_to_bits(np.ascontiguousarray(drawn, dtype=np.float64), dtype)
    return torch.from_numpy(bits.view(f"i{size}").reshape(shape))


def _make_telemetry(telemetry: str, seeds: int, rng) -> tuple[np.ndarray, np.ndarray]:
    if telemetry == "off":
        return np.zeros((0, 5)), np.zeros((0, 3))
    first, second = np.zeros((seeds, 5)), np.zeros((seeds, 3))
    if telemetry == "used":  # what earlier batches left; a third of the seeds has seen nothing finite
        seen = rng.random(seeds) > 0.3
        first[:, 0] = np.where(seen, rng.integers(1, 100, seeds), 0)
        first[:, 1] = np.where(seen, rng.standard_normal(seeds), 0)
        first[:, 2] = np.where(first[:, 0] > 1, rng.random(seeds) * 100, 0)
        first[:, 3:] = rng.integers(1, 9, (seeds, 2))
        second[:] = rng.random((seeds, 3))
        second[:, 2] = rng.integers(0, 9, seeds)
    elif telemetry != "fresh":
        raise ValueError(telemetry)
    return first, second


# ---------------------------------------------------------------------------------------------------- layouts

# name -> the least rank it makes sense for
LAYOUTS = {
    "contiguous": 1,
    "misaligned": 1,
    "every_other_feature": 1,
    "inner_slice": 1,
    "expanded_features": 1,
    "transposed": 2,
    "every_other_row": 2,
    "expanded_rows": 2,
    "overlapping": 2,
    "swapped_rows": 3,
    "features_first": 2,
    "features_middle": 3,
    "channels_last": 4,
    "nchw": 4,
    "odd_size1_strides": 2,
}


def _arrange(values: torch.Tensor, layout: str, device: torch.device) -> torch.Tensor:
    """The contiguous `values` in another layout on `device`; layouts with stride 0 or overlaps change the values."""
    values = values.to(device)
    rank, shape = values.dim(), values.shape

    def embedded(room: tuple[int, ...], window: tuple[slice, ...]) -> torch.Tensor:
        base = torch.full(room, 0x5A5A, dtype=values.dtype, device=device)
        return base[window].copy_(values)

    def permuted(order: list[int]) -> torch.Tensor:  # `order`: the dimensions from outermost to innermost
        inverse = [order.index(d) for d in range(rank)]
        return values.permute(order).contiguous().permute(inverse)

    if layout == "contiguous":
        return values.contiguous()
    if layout == "misaligned":
        return torch.cat((values.new_zeros(1), values.reshape(-1)))[1:].view(shape)
    if layout == "every_other_feature":
        window = (slice(None),) * (rank - 1) + (slice(1, 2 * shape[-1] + 1, 2),)
        return embedded((*shape[:-1], 2 * shape[-1] + 3), window)
    if layout == "inner_slice":
        window = (slice(None),) * (rank - 1) + (slice(3, shape[-1] + 3),)
        return embedded((*shape[:-1], shape[-1] + 5), window)
    if layout == "expanded_features":
        return values[..., :1].clone().expand(shape)
    if layout in ("transposed", "features_first"):
        return permuted([rank - 1, *range(rank - 1)])
    if layout == "every_other_row":
        return embedded((2 * shape[0] + 1, *shape[1:]), (slice(1, 2 * shape[0] + 1, 2),))
    if layout == "expanded_rows":
        return values[:1].clone().expand(shape)
    if layout == "overlapping":  # each row starts one element after the one before, like unfold
        flat = values.reshape(-1)[: sum(shape) + 1].clone()
        strides = [1] * rank if min(shape) else list(values.stride())
        return torch.as_strided(torch.cat((flat, flat.new_zeros(sum(shape)))), shape, strides)
    if layout == "swapped_rows":
        return permuted([1, 0, *range(2, rank)])
    if layout in ("features_middle", "nchw"):
        return permuted([0, rank - 1, *range(1, rank - 1)])
    if layout == "channels_last":
        memory_format = torch.channels_last if rank == 4 else torch.channels_last_3d
        return values.movedim(-1, 1).contiguous(memory_format=memory_format).movedim(1, -1)
    if layout == "odd_size1_strides":  # a stride that nothing depends on
        strides = [7919 if n == 1 else st for n, st in zip(shape, values.contiguous().stride(), strict=True)]
        return torch.as_strided(values.contiguous(), shape, strides)
    raise ValueError(layout)


# ---------------------------------------------------------------------------------------------------- the table


def _table() -> list[Case]:
    f32, f64, bf16, f16 = DTYPES
    cases = []
    # Every dtype of x with every dtype of the bank, aligned and not to the vector width.
    for dtype in DTYPES:
        for weights_dtype in DTYPES:
            cases.append(Case((37, 96), 7, dtype=dtype, weights_dtype=weights_dtype))
    # Every layout, in a wide and a narrow type, the gradient in another layout than x.
    grad_layouts = ("contiguous", "transposed", "expanded_rows", "every_other_feature", "misaligned")
    for n, (layout, rank) in enumerate(LAYOUTS.items()):
        shape = {1: (45, 40), 2: (45, 40), 3: (5, 7, 33), 4: (3, 4, 5, 24)}[rank]
        dtype = DTYPES[n % 4]
        cases.append(Case(shape, 6, layout=layout, grad_layout=layout, dtype=dtype, rng=n))
        cases.append(Case(shape, 6, layout=layout, grad_layout=grad_layouts[n % 5], dtype=DTYPES[(n + 2) % 4], rng=n))
    cases += [
        Case((2, 3, 4, 5, 16), 5, layout="channels_last", grad_layout="features_middle", dtype=bf16),
        Case((2, 3, 4, 5, 16), 5, layout="features_middle", grad_layout="swapped_rows"),
        Case((6, 10, 3, 8), 4, layout="swapped_rows", grad_layout="nchw", dtype=f16),
    ]
    # Ranks and sizes of one.
    for shape in ((40,), (1,), (1, 1, 1), (1, 40), (40, 1), (5, 1, 17), (1, 9, 1, 33), (2, 1, 1, 1, 3)):
        cases.append(Case(shape, 3, chunks="balanced"))
    cases.append(Case((1, 6, 1, 20), 3, layout="odd_size1_strides", grad_layout="odd_size1_strides"))
    cases.append(Case((40,), 3, layout="every_other_feature", grad_layout="expanded_features", dtype=bf16))
    # Chunk maps: remainder, empty chunks, more seeds than features, one seed for all, one for each, none.
    for chunks in CHUNKS:
        cases.append(Case((19, 70), 8, chunks=chunks, dtype=bf16, rng=1))
    cases += [
        Case((19, 70), 1, chunks="uniform"),
        Case((19, 70), 70, chunks="uniform", dtype=f16),
        Case((19, 10), 33, chunks="uniform"),
        Case((19, 10), 33, chunks="ragged", dtype=f64),
        Case((8, 1100), 1000, chunks="ragged", dtype=bf16),
        Case((4, 4100), 3, chunks="tail", dtype=f32),
    ]
    # Nothing at all, of each kind.
    for shape, seeds in (
        ((0, 8), 3),
        ((4, 0), 3),
        ((0, 0), 3),
        ((4, 8), 0),
        ((0,), 2),
        ((0,), 0),
        ((3, 0, 8), 2),
        ((0, 3, 8), 0),
    ):
        cases.append(Case(shape, seeds, chunks="uniform"))
    cases += [Case((6, 12), 4, blueprints=0), Case((6, 12), 4, blueprints=1, states="edge")]
    # States, alphas, values.
    for n, states in enumerate(STATES):
        cases.append(Case((23, 64), 16, states=states, dtype=DTYPES[n % 4], chunks="balanced"))
    for n, alphas in enumerate(ALPHAS):
        cases.append(Case((23, 64), 16, alphas=alphas, states="grafted", dtype=DTYPES[n % 4], chunks="balanced"))
        cases.append(Case((23, 64), 16, alphas=alphas, states="grafted", values="special", weights="special"))
    for dtype in DTYPES:
        for values in ("special", "bits"):
            cases.append(Case((31, 48), 12, values=values, weights=values, states="grafted", dtype=dtype))
            cases.append(Case((31, 48), 12, values=values, states="idle", dtype=dtype))
        cases.append(Case((31, 48), 12, values="zeros", weights="neutral", dtype=dtype))
        cases.append(Case((31, 48), 12, values="large", dtype=dtype, telemetry="fresh"))
        cases.append(Case((31, 48), 12, values="tiny", weights="special", dtype=dtype, telemetry="fresh"))
    for values in ("mean1000", "constant", "outlier"):
        cases.append(Case((200, 48), 6, values=values, telemetry="fresh"))
    # Telemetry off; larger ones, so that every thread, block and partial has work.
    cases += [
        Case((23, 64), 16, telemetry="off"),
        Case((1000, 256), 16, dtype=bf16, telemetry="fresh"),
        Case((300, 999), 40, dtype=f32, telemetry="fresh"),
        Case((5000, 24), 5, dtype=f16),
        Case((3, 20000), 77, dtype=bf16),
        Case((64, 24, 24, 32), 8, layout="nchw", grad_layout="channels_last", dtype=f32),
    ]
    return cases


CASES = _table()

# Small ones that touch every kernel: what compute-sanitizer runs.
SANITIZER_CASES = [
    *[Case((33, 40), 5, dtype=dtype, rng=3) for dtype in DTYPES],
    *[Case((9, 37), 4, dtype=dtype, layout="misaligned", grad_layout="misaligned") for dtype in DTYPES],
    Case((3, 5, 6, 10), 4, layout="nchw", grad_layout="nchw", dtype=torch.bfloat16),
    Case((12, 20), 4, layout="transposed", grad_layout="contiguous"),
    Case((12, 20), 30, chunks="ragged", states="illegal", dtype=torch.float16),
    Case((12, 20), 4, chunks="tail", states="edge", layout="every_other_row"),
    Case((700, 24), 3, values="special", weights="special", dtype=torch.bfloat16),
    Case((2, 3000), 9, states="grafted", weights_dtype=torch.float64),
    Case((24,), 3, chunks="empty"),
]


# ---------------------------------------------------------------------------------------------------- random cases


class Draw(Protocol):
    """Where random decisions come from."""

    def integer(self, low: int, high: int) -> int: ...  # both ends included

    def choice(self, options): ...


class NumpyDraw:
    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))

    def choice(self, options):
        return options[self.integer(0, len(options) - 1)]


def draw_case(draw: Draw) -> Case:
    """Any case of at most some tens of thousands of elements; the simplest choice of each is the first."""
    size = draw.choice(("small", "small", "small", "small", "many features", "many rows"))
    if size == "small":
        rank = draw.integer(1, 4)
        shape = tuple(draw.integer(0 if draw.integer(0, 15) == 15 else 1, 8) for _ in range(rank - 1))
        features = draw.integer(0 if draw.integer(0, 15) == 15 else 1, 80)
    elif size == "many features":
        rank, shape, features = 2, (draw.integer(1, 12),), draw.integer(1, 3000)
    else:
        rank, shape, features = 2, (draw.integer(1, 1500),), draw.integer(1, 24)
    layouts = tuple(name for name, least in LAYOUTS.items() if rank >= least)
    ordinary = draw.integer(0, 2) < 2
    return Case(
        shape=(*shape, features),
        seeds=draw.integer(0 if draw.integer(0, 15) == 15 else 1, draw.choice((4, 20, 2 * features + 4))),
        layout=draw.choice(layouts),
        grad_layout=draw.choice(layouts),
        dtype=draw.choice(DTYPES),
        weights_dtype=draw.choice((None, *DTYPES)),
        chunks=draw.choice(("ragged", *CHUNKS)),
        blueprints=draw.integer(0 if draw.integer(0, 15) == 15 else 1, 6),
        states=draw.choice(("mixed", "grafted") if ordinary else STATES),
        alphas=draw.choice(("mixed", "ramp") if ordinary else ALPHAS),
        values=draw.choice(("normal", "mean1000") if ordinary else VALUES),
        weights=draw.choice(("normal", "near_one") if ordinary else ("normal", "special", "bits", "neutral", "zeros")),
        telemetry=draw.choice(("used", "used", "fresh", "off")),
        rng=draw.integer(0, 2**32 - 1),
    )
