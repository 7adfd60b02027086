"""The layer: a base layer whose output features are cut into chunks, each owned by a seed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kasmina_ext import flags, nested
from kasmina_ext._dispatch import blend_ops
from kasmina_ext.across_ranks import AcrossRanks
from kasmina_ext.arguments import integer, positive
from kasmina_ext.bank import BlueprintBank
from kasmina_ext.checkpoint.layer import LayerCheckpoints
from kasmina_ext.checkpoint.state_dict import adopt_triton_layout, forget_overflows, problems_in, unwrap_keys
from kasmina_ext.chunking import chunk_offsets, chunk_size_of, output_features
from kasmina_ext.grafting import AlphaSchedule, GraftingStrategy, GraftingStrategyFactory
from kasmina_ext.lifecycle import ExtendedLifecycle, LifecycleManager, TransitionRules
from kasmina_ext.optim import look_after
from kasmina_ext.report import SeedReport, seed_report
from kasmina_ext.state import ExtendedStateTensor
from kasmina_ext.state_layout import StateVar, fill_fresh, new_state, row_view
from kasmina_ext.telemetry import legacy_buffer
from kasmina_ext.transitions import SeedTransitions
from kasmina_ext.wrapper import TransparentWrapper


class KasminaLayer(SeedTransitions, BlueprintBank, LayerCheckpoints, AcrossRanks, TransparentWrapper):
    """``kasmina(base_layer(x))``: the output of ``base_layer``, with every grafted seed blended into its chunk.

    ======================  =======  ==============================================================
    buffer                  dtype    shape
    ======================  =======  ==============================================================
    ``seed_offsets``        int32    ``[S + 1]``
    ``state``               int32    ``[8, S]``: :class:`~kasmina_ext.state.StateVar`
    ``alpha``               float32  ``[S]``: blend factors
    ``telemetry``           float64  ``[S, 5]``: :class:`~kasmina_ext.telemetry.TelemetryColumn`
    ``grad_telemetry``      float64  ``[S, 3]``: :class:`~kasmina_ext.telemetry.GradTelemetryColumn`
    ``history``             int32    ``[S, 10, 2]``: a ring of transitions
    ``history_count``       int32    ``[S]``: transitions ever made
    ``performance_metrics`` float32  ``[S, 4]``: :class:`~kasmina_ext.state.PerformanceColumn`
    ======================  =======  ==============================================================

    and one parameter, the bank ``blueprint_weights [P, H]``. Attributes that the layer lacks
    (``weight``, ``bias``, ``in_features``, ...) are its base layer's. Casts (``.half()``,
    ``.to(dtype)``) reach the base layer and the bank; the buffers follow devices only.

    A ``state_dict`` holds these tensors and the base layer's: all that is needed to go on exactly where
    it was taken. It does not hold arguments: in a layer with another ``alpha_schedule``, ``ramp_epochs``,
    ``auto_advance`` or ``strategy`` these apply from then on. Loading checks values first: of
    a layer's own tensors either all are loaded or none. See :func:`kasmina_ext.load_state_dict`.

    Two attributes are the user's to change: ``lifecycle_manager``, which judges single requests, and
    ``transition_rules``, which judge requests in batches.

    Arguments:
        base_layer: any module that returns a tensor, or a tuple whose first element is one; that
            one is transformed. (Not the ``out_proj`` of nn.MultiheadAttention, which is never called.)
        chunk_size: features per seed, about: there are ``H / chunk_size`` seeds, rounded.
        num_seeds: how many instead.
        num_blueprints: rows of the bank.
        strategy: the :class:`~kasmina_ext.grafting.GraftingStrategy` that seeds start with; the
            bank starts neutral for it.
        alpha_schedule: with "linear", "cosine" or "sigmoid", entering GRAFTING sets a seed's alpha
            to 0, ``step_lifecycle`` moves it along the curve
            (:func:`kasmina_ext.grafting.ramp`) and entering STABILIZATION sets it to 1.
        ramp_epochs: how many epochs the curve takes; 0 or less: one step.
        auto_advance: whether ``step_lifecycle`` moves seeds from GRAFTING to STABILIZATION when
            they have been there for ``ramp_epochs``.
        hidden_dim, feature_dim: features of the base layer's output and their dimension, where the
            base layer does not tell.
        chunking: "balanced" (all features are owned) or "uniform" (equal chunks, the remainder is
            unowned).
        telemetry: whether to collect; may be changed later through ``telemetry_enabled``.
        enable_kernels: False makes this layer run the reference: plain PyTorch, which can be
            differentiated twice.
        device: moves the base layer and everything else; by default all goes where the base layer
            is.
        blueprint_dtype: of the bank; by default float32 (float64 where the base layer is float64),
            since a small step from a weight of 1 is lost in bfloat16.
        checkpoint_dir: where ``save_checkpoint`` writes and ``load_checkpoint`` reads.
    """

    BUFFER_DTYPES = {
        "seed_offsets": torch.int32,
        "state": torch.int32,
        "alpha": torch.float32,
        "telemetry": torch.float64,
        "grad_telemetry": torch.float64,
        "history": torch.int32,
        "history_count": torch.int32,
        "performance_metrics": torch.float32,
    }
    OWN_NAMES = frozenset({"base_layer", "blueprint_weights"})
    telemetry_resets = 0
    """How often the telemetry has begun afresh: who keeps a copy of it can tell that it is of another time."""

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        chunk_size: int = 16,
        num_seeds: int | None = None,
        num_blueprints: int = 2,
        strategy: GraftingStrategy | int | str = "affine",
        alpha_schedule: AlphaSchedule | int | str | None = None,
        ramp_epochs: int = 50,
        auto_advance: bool = False,
        hidden_dim: int | None = None,
        feature_dim: int | None = None,
        chunking: str = "balanced",
        telemetry: bool = True,
        enable_kernels: bool = True,
        device: torch.device | str | None = None,
        blueprint_dtype: torch.dtype | None = None,
        checkpoint_dir: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Module):
            raise TypeError(f"base_layer must be a torch.nn.Module, got {type(base_layer).__name__}")
        if isinstance(base_layer, NonDynamicallyQuantizableLinear):
            raise ValueError(
                "the out_proj of nn.MultiheadAttention is never called, only its weights are used, so a layer around it "
                "would do nothing: wrap the MultiheadAttention itself, whose output is the out_proj's"
            )
        chunk_size = positive("chunk_size", chunk_size)
        num_seeds = None if num_seeds is None else positive("num_seeds", num_seeds)
        num_blueprints = positive("num_blueprints", num_blueprints)
        hidden_dim = None if hidden_dim is None else positive("hidden_dim", hidden_dim)
        found = output_features(base_layer, hidden_dim, feature_dim)

        self.hidden_dim = found.hidden_dim
        self.feature_dim = found.feature_dim
        self._unbatched_rank = found.unbatched_rank
        self.num_seeds = num_seeds or max(1, (2 * self.hidden_dim + chunk_size) // (2 * chunk_size))
        self.chunk_size = chunk_size_of(self.hidden_dim, self.num_seeds)
        self.chunking = chunking
        self.num_blueprints = num_blueprints
        self.strategy = GraftingStrategy.parse(strategy)
        if self.strategy.rows > num_blueprints:
            raise ValueError(
                f"strategy {self.strategy.name} takes {self.strategy.rows} rows of the bank, "
                f"num_blueprints is {num_blueprints}"
            )
        self.alpha_schedule = AlphaSchedule.parse(alpha_schedule)
        self.ramp_epochs = integer("ramp_epochs", ramp_epochs)
        self.auto_advance = bool(auto_advance)
        self.telemetry_enabled = bool(telemetry)
        self.enable_kernels = bool(enable_kernels)
        self.lifecycle_manager = LifecycleManager()
        self.transition_rules = TransitionRules.gate()
        self.grafting_factory = GraftingStrategyFactory()
        self.checkpoint_dir = checkpoint_dir
        self._manager = None
        self._loaded_history_count: Tensor | None = None

        if device is not None:
            base_layer.to(device)
        home, dtype = _home_of(found.module, base_layer)
        home = home if device is None else torch.device(device)
        if blueprint_dtype is not None and not isinstance(blueprint_dtype, torch.dtype):
            raise TypeError(f"blueprint_dtype must be a torch.dtype, got {type(blueprint_dtype).__name__}")
        if blueprint_dtype is not None and not blueprint_dtype.is_floating_point:
            raise ValueError(f"blueprint_dtype must be a floating dtype, got {blueprint_dtype}")
        seeds = self.num_seeds
        buffers = {
            "seed_offsets": chunk_offsets(self.hidden_dim, seeds, chunking).to(home),
            "alpha": torch.empty(seeds, device=home, dtype=torch.float32),
            "telemetry": torch.empty((seeds, 5), device=home, dtype=torch.float64),
            "grad_telemetry": torch.empty((seeds, 3), device=home, dtype=torch.float64),
            **new_state(seeds, home),
        }
        for name in self.BUFFER_DTYPES:
            self.register_buffer(name, buffers[name])
        bank = torch.empty((num_blueprints, self.hidden_dim), device=home, dtype=blueprint_dtype or dtype)
        self.blueprint_weights = nn.Parameter(bank)
        # Last: from here on, attributes that the layer lacks are looked for in the base layer.
        self.base_layer = base_layer
        self._bring_rules()
        self.reset_parameters()
        look_after(self)

    def reset_parameters(self) -> None:
        """A new layer's seeds, telemetry and bank, in place (after ``to_empty``, say); the base layer is left alone."""
        self.check_own_bank()
        buffers = self._buffers
        with torch.no_grad():
            offsets = chunk_offsets(self.hidden_dim, self.num_seeds, self.chunking)
            buffers["seed_offsets"].copy_(offsets)
            fill_fresh(buffers)
            buffers["state"][StateVar.GRAFTING_STRATEGY] = int(self.strategy)
            buffers["alpha"].fill_(1.0)
        self.reset_telemetry()
        self._reset_bank()

    # ---- forward ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output, transformed: the tensor, or the first element of a tuple."""
        out = self._modules["base_layer"](*args, **kwargs)
        if isinstance(out, Tensor):
            return self._blend(out)
        if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
            blended = (self._blend(out[0]), *out[1:])
            if type(out) is tuple:
                return blended
            # Of other tuples, only named ones take their elements one by one (torch.return_types do not).
            return type(out)(*blended) if hasattr(out, "_fields") else type(out)(blended)
        raise TypeError(
            f"{type(self._modules['base_layer']).__name__} returned {type(out).__name__}; "
            "expected a tensor or a tuple whose first element is one"
        )

    def _blend(self, x: Tensor) -> Tensor:
        if x.is_nested:
            if self.feature_dim != -1:
                raise TypeError(f"of a nested tensor the features must be last, feature_dim is {self.feature_dim}")
            return nested.over_rows(self._blend, x)
        # Every forward comes here: dictionaries, since nn.Module's attribute lookup is slow.
        buffers = self._buffers
        bank = self._parameters.get("blueprint_weights")
        if bank is None:  # parametrized, pruned, or a replica of DataParallel
            bank = self.blueprint_weights
        if self.telemetry_enabled:
            seen, seen_gradients = buffers["telemetry"], buffers["grad_telemetry"]
        else:
            seen = seen_gradients = buffers["telemetry"].new_empty(0)
        op = blend_ops(x.device, x.dtype, self.enable_kernels).chunked_forward
        seeds = buffers["seed_offsets"], buffers["state"], buffers["alpha"], bank, seen, seen_gradients
        dim = self._dim_of_features(x)
        return op(x, *seeds) if dim == -1 else op(x.movedim(dim, -1), *seeds).movedim(-1, dim)

    def _dim_of_features(self, x: Tensor) -> int:
        return self.feature_dim - 1 if x.dim() == self._unbatched_rank else self.feature_dim

    def _features_last(self, x: Tensor) -> Tensor:
        return x.movedim(self._dim_of_features(x), -1)

    # ---- views of the state ----------------------------------------------------------------------

    lifecycle_states = row_view(StateVar.LIFECYCLE_STATE, "int32 ``[S]``, a view of the state.")
    blueprint_ids = row_view(StateVar.BLUEPRINT_ID, "int32 ``[S]``, a view of the state; -1: none.")
    grafting_strategies = row_view(StateVar.GRAFTING_STRATEGY, "int32 ``[S]``, a view of the state.")

    @property
    def state_tensor(self) -> Tensor:
        """int32 ``[S, 8]``, a view of the state: writing it is writing the state."""
        return self._buffers["state"].t()

    @property
    def extended_state(self) -> ExtendedStateTensor:
        """The state's API, on the layer's own tensors."""
        return ExtendedStateTensor.over(self._buffers, self.num_blueprints, self._follow_transitions)

    @property
    def device(self) -> torch.device:
        """Where the seeds live."""
        return self._buffers["state"].device

    @property
    def chunks_per_layer(self) -> int:
        """Seeds in this layer."""
        return self.num_seeds

    def get_active_seed_count(self) -> int:
        """How many seeds are not dormant. Waits for the device."""
        return int((self.lifecycle_states > ExtendedLifecycle.DORMANT).sum())

    def get_active_seeds_mask(self) -> Tensor:
        """bool ``[S]``: seeds whose blueprint is trained (TRAINING, GRAFTING, FINE_TUNING)."""
        return self.extended_state.get_active_seeds_mask()

    def get_performance_summary(self) -> dict[str, Any]:
        """A few facts, as numbers and text. Waits for the device."""
        active = self.get_active_seed_count()
        return {
            "total_seeds": self.num_seeds,
            "active_seeds": active,
            "active_ratio": active / self.num_seeds,
            "triton_enabled": self.enable_kernels and flags.compiled_path(self.device)[0],
            "chunk_size": self.chunk_size,
            "hidden_dim": self.hidden_dim,
            "device": str(self.device),
        }

    # ---- telemetry -------------------------------------------------------------------------------

    @property
    def telemetry_buffer(self) -> Tensor:
        """float32 ``[S, 4]``, derived: sum, sum of squares, count, batches."""
        return legacy_buffer(self._buffers["telemetry"])

    def reset_telemetry(self) -> None:
        """Forget all activations and gradients seen."""
        self._buffers["telemetry"].zero_()
        self._buffers["grad_telemetry"].zero_()
        self.telemetry_resets += 1

    def seed_report(self, per: str = "seed") -> SeedReport:
        """What each seed (``per="seed"``) or state (``per="state"``) is and has seen. Waits for the device.

        A dict of rows, NaN where nothing was measured; printed it is a table, and ``.show()`` prints
        it with rich on a terminal.
        """
        return seed_report(self, per)

    # ---- what nn.Module asks for -----------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        look_after(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KasminaLayer:
        super()._apply(fn, recurse)
        self._bring_rules()
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        unwrap_keys(self, state_dict, prefix)
        forget_overflows(self, state_dict, prefix)
        problems, absent = adopt_triton_layout(self, state_dict, prefix, missing_keys)
        problems += problems_in(self, state_dict, prefix)
        if problems:
            error_msgs += problems
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key not in absent]
        if f"{prefix}history_count" in state_dict:
            self._mark_loaded()

    def _mark_loaded(self) -> None:
        """What happened to the seeds before is in the optimizer's state that was saved with theirs."""
        count = self._buffers["history_count"]
        self._loaded_history_count = None if count.is_meta else count.clone()

    def extra_repr(self) -> str:
        schedule = f", alpha_schedule={self.alpha_schedule.name.lower()!r}, ramp_epochs={self.ramp_epochs}"
        return (
            f"hidden_dim={self.hidden_dim}, num_seeds={self.num_seeds}, "
            f"chunk_size={self.chunk_size}, chunking={self.chunking!r}, num_blueprints={self.num_blueprints}, "
            f"strategy={self.strategy.name.lower()!r}, feature_dim={self.feature_dim}"
        ) + (schedule if self.alpha_schedule else "")


class TritonChunkedKasminaLayer(KasminaLayer):
    """The drop-in for the Triton package's layer, with its defaults: uniform chunks and a bank of 10 random rows.

    ``enable_triton`` keeps its name and turns the compiled kernels on. All other arguments are
    keywords, as in :class:`KasminaLayer`; so are all methods.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        chunks_per_layer: int = 1000,
        device: torch.device | str | None = None,
        checkpoint_dir: str | PathLike[str] | None = None,
        enable_triton: bool = True,
        *,
        num_blueprints: int = 10,
        strategy: GraftingStrategy | int | str = "multiplicative",
        chunking: str = "uniform",
        alpha_schedule: AlphaSchedule | int | str | None = None,
        ramp_epochs: int = 50,
        auto_advance: bool = False,
        hidden_dim: int | None = None,
        feature_dim: int | None = None,
        telemetry: bool = True,
        blueprint_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            base_layer,
            num_seeds=positive("chunks_per_layer", chunks_per_layer),
            num_blueprints=num_blueprints,
            strategy=strategy,
            alpha_schedule=alpha_schedule,
            ramp_epochs=ramp_epochs,
            auto_advance=auto_advance,
            hidden_dim=hidden_dim,
            feature_dim=feature_dim,
            chunking=chunking,
            telemetry=telemetry,
            enable_kernels=enable_triton,
            device=device,
            blueprint_dtype=blueprint_dtype,
            checkpoint_dir=checkpoint_dir,
        )
        self.blueprint_registry: dict[int, Any] = {}
        """Yours: what a blueprint id stands for. The layer does not look at it."""

    @property
    def enable_triton(self) -> bool:
        """Whether this layer uses the compiled kernels where there are any."""
        return self.enable_kernels

    @enable_triton.setter
    def enable_triton(self, enable: bool) -> None:
        self.enable_kernels = bool(enable)

    def _reset_bank(self) -> None:
        bank = self.blueprint_weights
        self._write_bank(None, nn.init.normal_(torch.empty(bank.shape, dtype=bank.dtype, device=bank.device)))


def _home_of(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and bank dtype for new tensors: those of the first module that has a floating tensor; else the defaults,
    but the device of other tensors where there are any (quantised ones).
    """
    others: list[torch.device] = []
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                return tensor.device, wide
            others.append(tensor.device)
    wide = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return others[0] if others else torch.get_default_device(), wide
