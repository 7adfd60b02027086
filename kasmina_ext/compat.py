"""The Triton package's two small layers and its kernel wrapper, on this package's operators.

They keep their names, arguments, buffers and strategy ids, which differ from layer to layer. What was wrong in them is
not kept: features that no seed owns pass through, gradients reach the input, inputs have any number of dimensions.
For new code there is :class:`kasmina_ext.KasminaLayer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from kasmina_ext._autograd import recomputing
from kasmina_ext._dispatch import blend_ops
from kasmina_ext.arguments import integer, positive
from kasmina_ext.checkpoint.state_dict import unwrap_keys, vector_problems
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.seed_arguments import checked_seed_id
from kasmina_ext.state_layout import NO_ID, StateVar
from kasmina_ext.telemetry import TelemetryColumn, legacy_buffer, reduce

if TYPE_CHECKING:
    import numpy as np

DEFAULT_BLUEPRINTS = 10
"""Rows of a bank whose size nobody gave."""
DEFAULT_BLEND = 0.5
"""The blend factor of "linear"."""
_UNKNOWN = -1  # as a strategy: the operators leave such a seed alone


def _offsets(num_seeds: int, chunk_size: int, hidden_dim: int, device: torch.device) -> Tensor:
    """int32 ``[S + 1]``: seed i owns ``[i chunk_size, (i + 1) chunk_size)``, as far as there are features."""
    starts = torch.arange(num_seeds + 1, device=device) * chunk_size
    return starts.clamp(max=hidden_dim).int()


def _state(lifecycle: Tensor, blueprint: Tensor, strategy: Tensor) -> Tensor:
    """int32 ``[8, S]`` with these three rows; the operators read no others."""
    state = lifecycle.new_zeros((len(StateVar), lifecycle.size(0)), dtype=torch.int32)
    state[StateVar.LIFECYCLE_STATE] = lifecycle
    state[StateVar.BLUEPRINT_ID] = blueprint
    state[StateVar.GRAFTING_STRATEGY] = strategy
    return state


def _blend(x: Tensor, offsets: Tensor, state: Tensor, alpha: Tensor, weights: Tensor, telemetry: Tensor) -> Tensor:
    nothing = telemetry.new_empty(0)
    return blend_ops(x.device, x.dtype).chunked_forward(x, offsets, state, alpha, weights, telemetry, nothing)


def _no_telemetry(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float64)


class _StrategyIds:
    """The ids of one of the old kernels: for each, the strategy that it means and whether the blend factor counts."""

    def __init__(self, *meanings: tuple[GraftingStrategy, bool]) -> None:
        self.meanings = meanings

    def __len__(self) -> int:
        return len(self.meanings)

    def translate(self, ids: Tensor, blend: Tensor) -> tuple[Tensor, Tensor]:
        """``(strategies int32 [S], alphas float32 [S])``; an id that there is not leaves its seed alone."""
        strategy, alpha = torch.full_like(ids, _UNKNOWN, dtype=torch.int32), torch.ones_like(blend)
        for number, (meant, blends) in enumerate(self.meanings):
            strategy = torch.where(ids == number, int(meant), strategy)
            alpha = torch.where(ids == number, blend, alpha) if blends else alpha
        return strategy, alpha


_SIMPLE_IDS = _StrategyIds(
    (GraftingStrategy.MULTIPLICATIVE, False),
    (GraftingStrategy.ADDITIVE, False),
    (GraftingStrategy.MIXED, False),
)
_BLENDED_IDS = _StrategyIds(
    (GraftingStrategy.MULTIPLICATIVE, True),  # "linear"
    (GraftingStrategy.MULTIPLICATIVE, False),
    (GraftingStrategy.ADDITIVE, False),
)


# What the old TritonKasminaLayer kept of its last forward, float32 [S] each.
_OLD_TELEMETRY = ("telemetry_sum", "telemetry_sumsq", "telemetry_count")


def _from_sums(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Telemetry ``[S, 5]`` of one batch; sums of squares in float32 may come out below what they can be."""
    mean = torch.where(count > 0, total / count, 0.0)
    seen = total.new_zeros((total.size(0), len(TelemetryColumn)))
    seen[:, TelemetryColumn.COUNT] = count
    seen[:, TelemetryColumn.MEAN] = mean
    seen[:, TelemetryColumn.M2] = (squares - total * mean).clamp(min=0)
    seen[:, TelemetryColumn.BATCHES] = 1
    return seen


# ---- the layers ----------------------------------------------------------------------------------


class _SmallLayer(nn.Module):
    """What the two layers share: ``num_seeds`` chunks of ``chunk_size`` features, and a random bank in a buffer."""

    VECTORS: ClassVar[tuple[str, str, str]]
    """Names of the lifecycle's, the blueprints' and the strategies' buffers."""
    BANK: ClassVar[str]
    STRATEGIES: ClassVar[_StrategyIds]

    def __init__(self, hidden_dim: int, num_seeds: int, chunk_size: int) -> None:
        super().__init__()
        self.hidden_dim = positive("hidden_dim", hidden_dim)
        self.num_seeds = positive("num_seeds", num_seeds)
        self.chunk_size = positive("chunk_size", chunk_size)

    def _register(self, **buffers: Tensor) -> None:
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def _ranges(self) -> dict[str, tuple[int, int]]:
        """Of each vector of ids, its least and greatest value."""
        bank = self._buffers[self.BANK]
        greatest = (len(ExtendedLifecycle) - 1, bank.size(0) - 1, len(self.STRATEGIES) - 1)
        return dict(zip(self.VECTORS, zip((0, NO_ID, 0), greatest, strict=True), strict=True))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Ids are checked before anything of the layer is written; any integer dtype, or whole floats, will do."""
        unwrap_keys(self, state_dict, prefix)
        problems = vector_problems(state_dict, prefix, self._ranges(), self.num_seeds)
        if problems:
            error_msgs += problems
            return
        for name in self._ranges():
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name].to(torch.int32)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _integers(self) -> Tensor:
        return torch.zeros(self.num_seeds, dtype=torch.int32)

    def _bank(self) -> Tensor:
        return torch.randn(DEFAULT_BLUEPRINTS, self.hidden_dim)

    def _checked_seed(
        self, seed_id: int, blueprint_id: int, strategy: int, bank: Tensor, strategies: _StrategyIds
    ) -> int:
        seed = checked_seed_id(seed_id, self.num_seeds)
        counts = (("blueprint_id", blueprint_id, bank.size(0)), ("strategy", strategy, len(strategies)))
        for name, value, count in counts:
            if not 0 <= integer(name, value) < count:
                raise ValueError(f"{name} must be in [0, {count}), got {value}")
        return seed

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_seeds={self.num_seeds}, chunk_size={self.chunk_size}"


class SimpleTritonLayer(_SmallLayer):
    """Seeds that are active or not: strategy 0 multiplies, 1 adds, 2 takes the mean of activation and weight.

    Buffers: ``lifecycle``, ``blueprint``, ``strategy`` (int32 ``[S]``) and ``weights [10, H]``.
    """

    VECTORS = ("lifecycle", "blueprint", "strategy")
    BANK, STRATEGIES = "weights", _SIMPLE_IDS

    def __init__(self, hidden_dim: int, num_seeds: int, chunk_size: int) -> None:
        super().__init__(hidden_dim, num_seeds, chunk_size)
        self._register(
            lifecycle=self._integers(), blueprint=self._integers(), strategy=self._integers(), weights=self._bank()
        )

    def activate_seed(self, seed_id: int, blueprint_id: int = 0, strategy: int = 0) -> None:
        """Graft a blueprint; ValueError for a seed, blueprint or strategy that does not exist."""
        seed = self._checked_seed(seed_id, blueprint_id, strategy, self.weights, _SIMPLE_IDS)
        self.lifecycle[seed] = int(ExtendedLifecycle.GRAFTING)
        self.blueprint[seed] = blueprint_id
        self.strategy[seed] = strategy

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)`` with every active seed's chunk transformed."""
        offsets = _offsets(self.num_seeds, self.chunk_size, self.hidden_dim, self.lifecycle.device)
        full = torch.ones_like(self.strategy, dtype=torch.float32)
        strategy, alpha = _SIMPLE_IDS.translate(self.strategy, full)
        state = _state(self.lifecycle, self.blueprint, strategy)
        return _blend(x, offsets, state, alpha, self.weights, _no_telemetry(x))


class TritonKasminaLayer(_SmallLayer):
    """Seeds with a blend factor: strategy 0 blends linearly by it, 1 multiplies, 2 adds.

    Buffers: ``lifecycle_states``, ``blueprint_ids``, ``grafting_strategies`` (int32 ``[S]``),
    ``blend_factors`` (float32 ``[S]``) and ``blueprint_weights [10, H]``.
    """

    VECTORS = ("lifecycle_states", "blueprint_ids", "grafting_strategies")
    BANK, STRATEGIES = "blueprint_weights", _BLENDED_IDS
    telemetry_enabled = True
    """Yours to change."""

    def __init__(self, hidden_dim: int, num_seeds: int, chunk_size: int) -> None:
        super().__init__(hidden_dim, num_seeds, chunk_size)
        self._register(
            lifecycle_states=self._integers(),
            blueprint_ids=self._integers(),
            grafting_strategies=self._integers(),
            blend_factors=torch.full((self.num_seeds,), DEFAULT_BLEND),
            blueprint_weights=self._bank(),
        )
        self._seen: Tensor | None = None

    def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
        """In the old layer the last forward's telemetry was three buffers; they become what :meth:`get_telemetry` shows."""
        unwrap_keys(self, state_dict, prefix)
        sums = [state_dict.pop(prefix + name, None) for name in _OLD_TELEMETRY]
        errors = args[-1]
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(errors) == before and all(
            isinstance(value, Tensor) and value.shape == (self.num_seeds,) for value in sums
        ):
            self._seen = _from_sums(*(value.detach().double() for value in sums))

    def set_seed_state(
        self,
        seed_id: int,
        lifecycle_state: ExtendedLifecycle | int | str,
        blueprint_id: int = 0,
        grafting_strategy: int = 0,
        blend_factor: float = DEFAULT_BLEND,
    ) -> None:
        """Put a seed in a state; ValueError for a seed, state, blueprint, strategy or factor that does not exist."""
        seed = self._checked_seed(seed_id, blueprint_id, grafting_strategy, self.blueprint_weights, _BLENDED_IDS)
        lifecycle_state = ExtendedLifecycle.parse(lifecycle_state)
        if not 0 <= blend_factor <= 1:
            raise ValueError(f"blend_factor must be in [0, 1], got {blend_factor}")
        self.lifecycle_states[seed] = int(lifecycle_state)
        self.blueprint_ids[seed] = blueprint_id
        self.grafting_strategies[seed] = grafting_strategy
        self.blend_factors[seed] = blend_factor

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)`` with every grafted seed's chunk transformed; remembers what went in, for :meth:`get_telemetry`,
        unless telemetry is off or this is a backward pass that computes activations again.
        """
        offsets = _offsets(self.num_seeds, self.chunk_size, self.hidden_dim, self.lifecycle_states.device)
        strategy, alpha = _BLENDED_IDS.translate(self.grafting_strategies, self.blend_factors.float())
        state = _state(self.lifecycle_states, self.blueprint_ids, strategy)
        if not self.telemetry_enabled:
            return _blend(x, offsets, state, alpha, self.blueprint_weights, _no_telemetry(x))
        seen = x.new_zeros((self.num_seeds, len(TelemetryColumn)), dtype=torch.float64)
        y = _blend(x, offsets, state, alpha, self.blueprint_weights, seen)
        # No other operators where it is computed again: selective checkpointing would complain of them.
        if torch.compiler.is_compiling() or not recomputing(x):
            self._seen = seen
        return y

    def get_telemetry(self) -> dict[str, np.ndarray]:
        """Of the last forward, a value for each seed: mean, variance, std (NaN where nothing was seen) and count."""
        seen = (
            torch.zeros((self.num_seeds, len(TelemetryColumn)), dtype=torch.float64)
            if self._seen is None
            else self._seen
        )
        mean, variance, std = reduce(seen).cpu().unbind(1)
        count = seen[:, TelemetryColumn.COUNT].cpu()
        return {"mean": mean.numpy(), "variance": variance.numpy(), "std": std.numpy(), "count": count.numpy()}


# ---- the kernel ----------------------------------------------------------------------------------


class KasminaForwardKernel:
    """The forward pass as a function on the caller's own tensors, with the strategy ids of :class:`TritonKasminaLayer`.

    ==============  ====================  =======================================================
    argument        dtype and shape       meaning
    ==============  ====================  =======================================================
    ``activations`` float ``[..., H]``
    ``state``       float ``[S, 8]``      columns as in the state, but column 4 is alpha
    ``weights``     float ``[P, H]``      the bank
    ``output``      float ``[..., H]``    written; None: a new tensor
    ``telemetry``   float ``[S, 4]``      sum, sum of squares, count, batches: added to; None: not
    ==============  ====================  =======================================================
    """

    ALPHA_COLUMN = 4

    def __init__(self, num_seeds: int, chunk_size: int, hidden_dim: int) -> None:
        self.num_seeds = positive("num_seeds", num_seeds)
        self.chunk_size = positive("chunk_size", chunk_size)
        self.hidden_dim = positive("hidden_dim", hidden_dim)

    def __call__(
        self,
        activations: Tensor,
        state: Tensor,
        weights: Tensor,
        output: Tensor | None = None,
        telemetry: Tensor | None = None,
    ) -> Tensor:
        """Returns ``output``, without a gradient. ValueError for a shape that does not fit, before anything is written."""
        self._expect("activations", activations, (*activations.shape[:-1], self.hidden_dim))
        self._expect("state", state, (self.num_seeds, len(StateVar)))
        self._expect("weights", weights, (weights.size(0), self.hidden_dim))
        if output is not None:
            self._expect("output", output, activations.shape)
        if telemetry is not None:
            self._expect("telemetry", telemetry, (self.num_seeds, 4))
        with torch.no_grad():
            columns = state.detach().t()
            ids = columns.to(torch.int32)
            strategy, alpha = _BLENDED_IDS.translate(
                ids[StateVar.GRAFTING_STRATEGY], columns[self.ALPHA_COLUMN].float()
            )
            seen = activations.new_zeros((self.num_seeds, len(TelemetryColumn)), dtype=torch.float64)
            y = _blend(
                activations,
                _offsets(self.num_seeds, self.chunk_size, self.hidden_dim, activations.device),
                _state(ids[StateVar.LIFECYCLE_STATE], ids[StateVar.BLUEPRINT_ID], strategy),
                alpha,
                weights,
                _no_telemetry(activations) if telemetry is None else seen,
            )
            if telemetry is not None:
                telemetry += legacy_buffer(seen).to(telemetry.dtype)
            return y if output is None else output.copy_(y)

    @staticmethod
    def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
