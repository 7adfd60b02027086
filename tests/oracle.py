"""An independent statement of the operators' semantics, in NumPy: what the tests compare every backend with.

It shares no code with the package. `y` and `dx` are computed bit for bit (float32 or float64 NumPy arithmetic, then a
rounding of our own); telemetry and the gradient sums in 80-bit long double, with the error that they may carry:

* telemetry: |mean error| <= 1e-6 (|mean| + std), M2 within 1e-4 where |mean| <= 1000 std; counts exact;
* gradient sums: any order of summation of n terms in a type of unit roundoff u errs by at most (n - 1) u sum|terms| to
  first order (Higham, Accuracy and Stability, 4.2), one more u for the rounding of each product.

Every `check_*` function returns a list of complaints, empty if all is well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

GRAFTING, FOSSILIZED = 3, 7
MULTIPLICATIVE, ADDITIVE, MIXED, AFFINE = 0, 1, 2, 3
LIFECYCLE_ROW, BLUEPRINT_ROW, STRATEGY_ROW = 0, 1, 3

BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
INT_VIEW = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ACCUMULATION = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.float32,
    torch.float16: np.float32,
}
LONG = np.longdouble
DENORMAL = LONG(5e-324)  # the least that float64 resolves


# ---------------------------------------------------------------------------------------------------- numbers


def bits_of(t: torch.Tensor) -> np.ndarray:
    """The raw bits of a tensor in logical order, as unsigned integers."""
    size = t.element_size()
    return t.detach().view(INT_VIEW[size]).cpu().contiguous().numpy().view(BITS[size])


def widen(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bits to numbers of the type's own precision or, for the half types, float32 (exact)."""
    if dtype == torch.bfloat16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == torch.float16:
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32 if dtype == torch.float32 else np.float64)


def values_of(t: torch.Tensor) -> np.ndarray:
    """A tensor's numbers in logical order."""
    return widen(bits_of(t), t.dtype)


def round_to_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Numbers rounded to nearest even in `dtype`, as bits (by way of float32 for the half types)."""
    with np.errstate(all="ignore"):
        if dtype == torch.float64:
            return values.astype(np.float64).view(np.uint64)
        single = values.astype(np.float32)
        if dtype == torch.float32:
            return single.view(np.uint32)
        if dtype == torch.float16:
            return single.astype(np.float16).view(np.uint16)
        bits = single.view(np.uint32).astype(np.uint64)
        odd = (bits >> np.uint64(16)) & np.uint64(1)
        rounded = (bits + np.uint64(0x7FFF) + odd) >> np.uint64(16)
        quiet_nan = (bits >> np.uint64(16)) | np.uint64(0x40)
        return np.where(np.isnan(single), quiet_nan, rounded).astype(np.uint16)


def round_to(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Numbers rounded to nearest even in `dtype`, as float64."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return widen(round_to_bits(np.asarray(values), dtype), dtype).astype(np.float64)


# ---------------------------------------------------------------------------------------------------- semantics


@dataclass
class Blend:
    """y = a x + b per feature, and whose feature it is."""

    grafted: np.ndarray  # bool [H]
    a: np.ndarray  # accumulation type [H]
    b: np.ndarray
    chunks: list[tuple[int, int]]  # [S]


def is_grafted(state: np.ndarray, s: int, num_blueprints: int) -> bool:
    lifecycle, blueprint, strategy = (int(state[row, s]) for row in (LIFECYCLE_ROW, BLUEPRINT_ROW, STRATEGY_ROW))
    rows = {MULTIPLICATIVE: 1, ADDITIVE: 1, MIXED: 1, AFFINE: 2}.get(strategy)
    if rows is None or not GRAFTING <= lifecycle <= FOSSILIZED:
        return False
    return 0 <= blueprint <= num_blueprints - rows


def blend_of(offsets, state, alpha, weights, acc) -> Blend:
    """The strategies' formulas, operation by operation in the accumulation type `acc`."""
    features = weights.shape[1]
    blend = Blend(np.zeros(features, bool), np.ones(features, acc), np.full(features, -0.0, acc), [])
    one, two = acc(1), acc(2)
    for s in range(len(offsets) - 1):
        lo, hi = int(offsets[s]), int(offsets[s + 1])
        blend.chunks.append((lo, hi))
        if not is_grafted(state, s, weights.shape[0]):
            continue
        own = slice(lo, hi)
        strategy, p, al = int(state[STRATEGY_ROW, s]), int(state[BLUEPRINT_ROW, s]), acc(alpha[s])
        w = weights[p, own].astype(acc)
        b = np.full(hi - lo, -0.0, acc)
        if strategy == MULTIPLICATIVE:
            a = (one - al) + al * w
        elif strategy == ADDITIVE:
            a, b = np.ones(hi - lo, acc), al * w
        elif strategy == MIXED:
            a, b = np.full(hi - lo, one - al / two), al * w / two
        else:
            a, b = (one - al) + al * w, al * weights[p + 1, own].astype(acc)
        blend.grafted[own] = True
        blend.a[own] = a
        blend.b[own] = np.where(b == 0, acc(-0.0), b)
    return blend


class Problem:
    """One call's inputs as NumPy arrays; x and grad_y as [N, H] (N is 1 for a 1-D x)."""

    def __init__(self, x, offsets, state, alpha, weights, grad_y=None):
        self.dtype, self.weights_dtype = x.dtype, weights.dtype
        self.acc = ACCUMULATION[x.dtype]
        self.unit = LONG(2.0) ** (-53 if self.acc is np.float64 else -24)
        self.features = x.shape[-1]
        self.rows = int(np.prod(x.shape[:-1], dtype=np.int64))
        self.x_bits = bits_of(x).reshape(self.rows, self.features)
        self.x = widen(self.x_bits, x.dtype)
        self.offsets = offsets.cpu().numpy()
        self.state = state.cpu().numpy()
        self.alpha = alpha.detach().cpu().numpy()
        self.weights = values_of(weights)
        with np.errstate(all="ignore"):
            self.blend = blend_of(self.offsets, self.state, self.alpha, self.weights, self.acc)
        if grad_y is not None:
            self.g_bits = bits_of(grad_y).reshape(self.rows, self.features)
            self.g = widen(self.g_bits, x.dtype)

    def forward_bits(self) -> np.ndarray:
        with np.errstate(all="ignore"):
            y = self.blend.a * self.x + self.blend.b
        return np.where(self.blend.grafted, round_to_bits(y, self.dtype), self.x_bits)

    def grad_x_bits(self) -> np.ndarray:
        with np.errstate(all="ignore"):
            dx = self.blend.a * self.g
        return np.where(self.blend.grafted, round_to_bits(dx, self.dtype), self.g_bits)


# ---------------------------------------------------------------------------------------------------- comparisons


def compare_bits(what, got: torch.Tensor, want: np.ndarray, payload: np.ndarray | None = None):
    """Equal bits; NaNs equal any NaN, but where `payload` (a mask over the features) is set every bit counts."""
    bits = bits_of(got).reshape(want.shape)
    wrong = bits != want
    both_nan = np.isnan(widen(bits, got.dtype)) & np.isnan(widen(want, got.dtype))
    wrong &= ~both_nan if payload is None else ~(both_nan & ~payload)
    if not wrong.any():
        return []
    at = tuple(int(i[0]) for i in np.nonzero(wrong))
    return [f"{what}: {wrong.sum()} of {wrong.size} differ, first at {at}: {bits[at]:#x}, expected {want[at]:#x}"]


def check_forward(problem: Problem, x: torch.Tensor, y: torch.Tensor, payload: bool) -> list[str]:
    complaints = []
    like = torch.empty_like(x)
    if (y.dtype, y.shape, y.stride()) != (like.dtype, like.shape, like.stride()):
        return [
            f"y is {y.dtype} {tuple(y.shape)} {y.stride()}, expected {like.dtype} {tuple(like.shape)} {like.stride()}"
        ]
    verbatim = ~problem.blend.grafted if payload else None
    return complaints + compare_bits("y", y, problem.forward_bits(), verbatim)


@dataclass
class Moments:
    """Telemetry of one seed in long double."""

    count: int = 0
    mean: LONG = LONG(0)
    m2: LONG = LONG(0)
    batches: int = 0
    nonfinite: int = 0

    @staticmethod
    def of(row) -> Moments:
        return Moments(int(row[0]), LONG(row[1]), LONG(row[2]), int(row[3]), int(row[4]))

    def join(self, other: Moments) -> Moments:
        """Chan's formula."""
        count = self.count + other.count
        joined = Moments(count, LONG(0), LONG(0), self.batches + other.batches, self.nonfinite + other.nonfinite)
        if count:
            delta = other.mean - self.mean
            joined.mean = (self.count * self.mean + other.count * other.mean) / LONG(count)
            joined.m2 = self.m2 + other.m2 + delta * delta * LONG(self.count) * LONG(other.count) / LONG(count)
        return joined


def moments_of(values: np.ndarray) -> Moments:
    """Two passes in long double over the finite elements."""
    finite = np.isfinite(values)
    kept = values[finite].astype(LONG)
    moments = Moments(kept.size, LONG(0), LONG(0), 1, int(values.size - kept.size))
    if kept.size:
        moments.mean = kept.sum() / LONG(kept.size)
        away = kept - moments.mean
        moments.m2 = (away * away).sum() - away.sum() ** 2 / LONG(kept.size)
    return moments


def telemetry_after(before: np.ndarray, x: np.ndarray, chunks, rows: int) -> list[Moments]:
    """x: [N, H]; `before`: [S, 5]."""
    expected = []
    for s, (lo, hi) in enumerate(chunks):
        moments = Moments.of(before[s])
        expected.append(moments.join(moments_of(x[:, lo:hi])) if rows else moments)
    return expected


def check_telemetry(expected: list[Moments], telemetry: torch.Tensor) -> list[str]:
    got = telemetry.detach().cpu().numpy()
    if got.shape != (len(expected), 5):
        return [f"telemetry is {got.shape}, expected {(len(expected), 5)}"]
    complaints = []
    for s, want in enumerate(expected):
        for column, name in ((0, "count"), (3, "batches"), (4, "nonfinite")):
            if got[s, column] != getattr(want, name):
                complaints.append(f"seed {s} {name} {got[s, column]}, expected {getattr(want, name)}")
        if want.count == 0 or want.m2 > 1e300 or abs(want.mean) > 1e300 / want.count:
            continue  # not measured, or float64 itself overflows
        std = np.sqrt(want.m2 / want.count)
        mean_slack = LONG(1e-6) * (abs(want.mean) + std) + DENORMAL
        m2_slack = LONG(1e-4) * want.m2 + DENORMAL * want.count
        if abs(want.mean) > 1000 * std:  # the same unit as the mean's bound: std within 1e-6 |mean|
            m2_slack += want.count * (LONG(1e-6) * want.mean) ** 2
        if not abs(got[s, 1] - want.mean) <= mean_slack:
            complaints.append(f"seed {s} mean {got[s, 1]!r}, expected {want.mean!r} within {mean_slack!r}")
        if not abs(got[s, 2] - want.m2) <= m2_slack or got[s, 2] < 0:
            complaints.append(f"seed {s} M2 {got[s, 2]!r}, expected {want.m2!r} within {m2_slack!r}")
    return complaints


# ---------------------------------------------------------------------------------------------------- gradients


@dataclass
class Sums:
    """u = sum G x and v = sum G per feature, with the error that each may carry."""

    u: np.ndarray
    v: np.ndarray
    u_size: np.ndarray  # sum |G x|
    v_size: np.ndarray
    u_slack: np.ndarray
    v_slack: np.ndarray
    sure: np.ndarray  # bool: no overflow possible on the way


def sums_of(problem: Problem) -> Sums:
    acc, unit = problem.acc, problem.unit
    with np.errstate(all="ignore"):
        g, x = problem.g.astype(LONG), problem.x.astype(LONG)
        product, size = g * x, abs(g * x)
        u, v, u_size, v_size = product.sum(0), g.sum(0), size.sum(0), abs(g).sum(0)
        gamma = (problem.rows + 2) * unit
        tiny = LONG(np.finfo(acc).smallest_subnormal) * (problem.rows + 1)  # products may underflow
        limit = LONG(np.finfo(acc).max) / 16
        finite = np.isfinite(u) & np.isfinite(v)
        # Data with NaN or Inf decide the class of the sum whatever the order; finite data must stay far from overflow.
        data_decides = ~np.isfinite(problem.g).all(0) | ~np.isfinite(problem.x).all(0)
        largest = np.where(np.isfinite(size), size, 0).sum(0), np.where(np.isfinite(g), abs(g), 0).sum(0)
        sure = (largest[0] < limit) & (largest[1] < limit) & (finite | data_decides)
    return Sums(u, v, u_size, v_size, gamma * u_size + tiny, gamma * v_size + tiny, sure)


def within(got: np.ndarray, want, slack, dtype: torch.dtype) -> np.ndarray:
    """Whether `got` is what rounding to `dtype` can make of a number in want +- slack; classes of non-finite agree."""
    want, slack = np.asarray(want, LONG), np.asarray(slack, LONG)
    with np.errstate(all="ignore"):
        low, high = round_to(want - slack, dtype), round_to(want + slack, dtype)
        inside = (got >= low) & (got <= high)
    infinite = np.isinf(want)
    return np.where(np.isnan(want), np.isnan(got), np.where(infinite, got == want, inside))


def complain(what, got, want, slack, ok) -> list[str]:
    if ok.all():
        return []
    at = tuple(int(i[0]) for i in np.nonzero(~ok))
    return [
        f"{what}: {(~ok).sum()} of {ok.size} differ, first at {at}: {got[at]!r}, expected {want[at]!r} within {slack[at]!r}"
    ]


def _undecided(factor, total: np.ndarray, error: np.ndarray) -> np.ndarray:
    """An infinite factor times a sum that may be zero or of either sign: NaN or Inf, as the sum's rounding has it."""
    return np.isinf(factor) & (abs(total) <= error)


def check_grad_weights(problem: Problem, sums: Sums, grad_weights: torch.Tensor) -> list[str]:
    shape = problem.weights.shape
    want, slack = np.zeros(shape, LONG), np.zeros(shape, LONG)
    sure = np.ones(shape, bool)
    for s, (lo, hi) in enumerate(problem.blend.chunks):
        if not is_grafted(problem.state, s, shape[0]) or problem.state[LIFECYCLE_ROW, s] == FOSSILIZED:
            continue
        if problem.rows == 0:
            continue  # zero: nothing depends on the bank, whatever alpha
        own, al = slice(lo, hi), LONG(problem.alpha[s])
        strategy, p = int(problem.state[STRATEGY_ROW, s]), int(problem.state[BLUEPRINT_ROW, s])
        of_u, of_v = (sums.u, sums.u_slack), (sums.v, sums.v_slack)
        flows = {
            MULTIPLICATIVE: [(p, of_u, LONG(1))],
            ADDITIVE: [(p, of_v, LONG(1))],
            MIXED: [(p, of_v, LONG(0.5))],
            AFFINE: [(p, of_u, LONG(1)), (p + 1, of_v, LONG(1))],
        }[strategy]
        for row, (total, error), factor in flows:
            with np.errstate(all="ignore"):
                want[row, own] = al * total[own] * factor
                # alpha * sum: four roundings (product, halving, float32, the half type's way through float32)
                slack[row, own] = abs(al) * error[own] + 4 * problem.unit * abs(want[row, own])
                slack[row, own] += LONG(np.finfo(problem.acc).smallest_subnormal)
            sure[row, own] = sums.sure[own] & ~(abs(want[row, own]) > np.finfo(problem.acc).max / 16)
            sure[row, own] &= ~_undecided(al, total[own], error[own])
    if problem.weights_dtype != torch.float64:  # and one more rounding, to float32 on the way to the half types
        slack += abs(np.where(np.isfinite(want), want, 0)) * LONG(2.0) ** -23
    got = values_of(grad_weights).astype(np.float64)
    if got.shape != shape or grad_weights.dtype != problem.weights_dtype:
        return [f"grad_weights is {grad_weights.dtype} {got.shape}, expected {problem.weights_dtype} {shape}"]
    ok = within(got, want, slack, problem.weights_dtype) | ~sure
    return complain("grad_weights", got, want, slack, ok)


def check_grad_alpha(problem: Problem, sums: Sums, grad_alpha: torch.Tensor) -> list[str]:
    count, unit = len(problem.blend.chunks), problem.unit
    want, slack, sure = np.zeros(count, LONG), np.zeros(count, LONG), np.ones(count, bool)
    for s, (lo, hi) in enumerate(problem.blend.chunks):
        if not is_grafted(problem.state, s, problem.weights.shape[0]) or problem.rows == 0:
            continue  # zero: without rows nothing depends on alpha, whatever the weights
        own = slice(lo, hi)
        strategy, p = int(problem.state[STRATEGY_ROW, s]), int(problem.state[BLUEPRINT_ROW, s])
        with np.errstate(all="ignore"):
            w = problem.weights[p, own].astype(problem.acc).astype(LONG)
            of_u, of_v = {
                MULTIPLICATIVE: (w - 1, None),
                ADDITIVE: (None, w),
                MIXED: (np.full(hi - lo, LONG(-0.5)), w / 2),
                AFFINE: (w - 1, None),
            }[strategy]
            if strategy == AFFINE:
                of_v = problem.weights[p + 1, own].astype(problem.acc).astype(LONG)
            # Only the terms of the formula: a zero factor would turn an infinite sum into a NaN.
            terms, sizes, errors, finite = (np.zeros(hi - lo, LONG) for _ in range(4))
            for factor, total, size, error in (
                (of_u, sums.u, sums.u_size, sums.u_slack),
                (of_v, sums.v, sums.v_size, sums.v_slack),
            ):
                if factor is not None:
                    terms = terms + factor * total[own]
                    part = abs(factor) * size[own]
                    sizes, finite = sizes + part, finite + np.where(np.isfinite(part), part, 0)
                    errors = errors + abs(factor) * error[own]
                    sure[s] &= not _undecided(factor, total[own], error[own]).any()
            want[s] = terms.sum()
            # w - 1, the products and their sum round too, then hi - lo terms are summed and rounded to float32
            slack[s] = errors.sum() + (hi - lo + 6) * unit * sizes.sum() + abs(want[s]) * LONG(2.0) ** -23
            slack[s] += (hi - lo) * LONG(np.finfo(problem.acc).smallest_subnormal)
            # A term may leave the range of the kernels' arithmetic beside an infinite one: inf - inf is a NaN there.
            sure[s] &= sums.sure[own].all() and finite.sum() < np.finfo(problem.acc).max / 16
    got = values_of(grad_alpha).astype(np.float64)
    if got.shape != (count,) or grad_alpha.dtype != torch.float32:
        return [f"grad_alpha is {grad_alpha.dtype} {got.shape}, expected float32 {(count,)}"]
    ok = within(got, want, slack, torch.float32) | ~sure
    return complain("grad_alpha", got, want, slack, ok)


def check_grad_telemetry(problem: Problem, sums: Sums, before: torch.Tensor, after: torch.Tensor) -> list[str]:
    was, got = before.cpu().numpy(), after.cpu().numpy()
    complaints = []
    for s, (lo, hi) in enumerate(problem.blend.chunks):
        own = slice(lo, hi)
        with np.errstate(all="ignore"):
            u, v = sums.u[own], sums.v[own]
            added = [(u * u).sum(), (v * v).sum()]
            slack = [
                (2 * abs(t) * e + e * e).sum() + (hi - lo + 2) * (LONG(2.0) ** -53 * total + DENORMAL)
                for t, e, total in ((u, sums.u_slack[own], added[0]), (v, sums.v_slack[own], added[1]))
            ]
        if not (sums.sure[own].all() and not any(1e300 < t < 2e308 for t in added)):
            continue  # whether it overflows depends on the order of summation
        counted = all(t <= 1e300 for t in added)
        for column, name in ((0, "sum u^2"), (1, "sum v^2")):
            want = was[s, column] + (added[column] if counted else 0)
            error = (slack[column] if counted else LONG(0)) + abs(want) * LONG(2.0) ** -52
            if not abs(got[s, column] - want) <= error:
                complaints.append(
                    f"grad telemetry of seed {s}, {name}: {got[s, column]!r}, expected {want!r} within {error!r}"
                )
        if got[s, 2] != was[s, 2] + counted:
            complaints.append(f"grad telemetry of seed {s}: {got[s, 2]} backwards, expected {was[s, 2] + counted}")
    return complaints


def check_grad_x(problem: Problem, x: torch.Tensor, grad_x: torch.Tensor, payload: bool) -> list[str]:
    like = torch.empty_like(x)
    if (grad_x.dtype, grad_x.shape, grad_x.stride()) != (like.dtype, like.shape, like.stride()):
        return [f"grad_x is {grad_x.dtype} {tuple(grad_x.shape)} {grad_x.stride()}, expected strides {like.stride()}"]
    return compare_bits("grad_x", grad_x, problem.grad_x_bits(), ~problem.blend.grafted if payload else None)
