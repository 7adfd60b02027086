"""The bank of blueprints: what writes it, and what it is compared with while seeds train."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_ext import reference
from kasmina_ext._dispatch import blend_ops
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.placement import gathered, is_sharded, whole, write
from kasmina_ext.seed_arguments import SeedIds, on_device
from kasmina_ext.state import ExtendedStateTensor
from kasmina_ext.state_layout import StateVar
from kasmina_ext.telemetry import TelemetryColumn

# Plain numbers: a tensor compared with a member of an enumeration is False to the compiler.
_MULTIPLICATIVE, _ADDITIVE, _MIXED, _AFFINE = map(int, GraftingStrategy)

# The shards that FSDP2 keeps of a layer's bank while the gathered one stands in its place. Not in the layer: it can be
# pickled and copied, this cannot.
_shards: WeakKeyDictionary[BlueprintBank, ReferenceType[Tensor]] = WeakKeyDictionary()


class BlueprintBank:
    """The part of :class:`~kasmina_ext.layer.KasminaLayer` that looks after ``blueprint_weights [P, H]``."""

    num_seeds: int
    num_blueprints: int
    hidden_dim: int
    strategy: GraftingStrategy
    enable_kernels: bool
    blueprint_weights: Tensor
    extended_state: ExtendedStateTensor

    def __setattr__(self, name: str, value: Any) -> None:
        """FSDP2 puts the gathered bank in place of its shards by assignment, for the time of a pass."""
        if name == "blueprint_weights" and not is_sharded(value):
            before = self.__dict__.get("_parameters", {}).get(name)
            if is_sharded(before):
                _shards[self] = ref(before)
        super().__setattr__(name, value)

    @property
    def own_bank(self) -> Tensor | None:
        """The bank that an optimizer trains: ``blueprint_weights``, or its shards while FSDP2 has gathered it. None
        where it is computed (parametrized, pruned).
        """
        bank = self._parameters.get("blueprint_weights")
        shards = _shards[self]() if self in _shards else None
        # FSDP2 can also leave it sharded over fewer processes after a forward, which does not last either.
        lasts = bank is None or shards is None or (is_sharded(bank) and bank.device_mesh == shards.device_mesh)
        return bank if lasts else shards

    @property
    def lasting_bank(self) -> Tensor:
        """:attr:`own_bank`, or what is computed in its place."""
        bank = self.own_bank
        return self.blueprint_weights if bank is None else bank

    def whole_bank(self) -> Tensor:
        """``[P, H]``, a constant. Where the bank is sharded, every process must ask: its parts are gathered."""
        return whole(self.lasting_bank)

    def _reset_bank(self) -> None:
        """Neutral for the layer's strategy: nothing changes when a seed is grafted."""
        bank = self.blueprint_weights
        rows = neutral_rows(self.strategy, self.num_blueprints).to(bank.device)
        self._write_bank(None, rows[:, None].expand(bank.shape))

    def _make_neutral(self, chosen: Tensor) -> None:
        """Where ``chosen [S]``, the blueprint becomes its strategy's neutral element, in the seed's own features only.

        MIXED has none: it starts at the mean of what the seed has seen, 0 where nothing was
        measured.
        """
        first = neutral_first(self._buffers["state"], self._buffers["telemetry"])
        owner, is_first, is_second = self._rows_of(chosen)
        self._write_bank(is_first | is_second, torch.where(is_first, first[owner], 0.0))

    def blueprint_mask(self, chosen: Tensor) -> Tensor:
        """bool ``[P, H]``: the elements of the bank that the seeds where ``chosen [S]`` use. Does not wait."""
        _, is_first, is_second = self._rows_of(chosen)
        return is_first | is_second

    def _rows_of(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each feature's owner ``[H]``, and where in the bank the first and the second rows of the chosen seeds are."""
        owner, owned = reference.feature_owner(self._buffers["seed_offsets"], self.hidden_dim)
        return owner, *rows_of(chosen, self._buffers["state"], owner, owned, self.num_blueprints)

    def _write_bank(self, mask: Tensor | None, values: Tensor) -> None:
        """The one place that writes the bank: ``values`` where ``mask`` (None: everywhere), both ``[P, H]``. Where the
        bank is sharded, each process that calls this writes its part.
        """
        self.check_own_bank()
        lasting, bank = self.lasting_bank, self.blueprint_weights
        write(lasting, values, mask)
        if bank is not lasting and not is_sharded(bank):  # the next pass may use it as it is
            write(bank, values, mask)

    def check_own_bank(self) -> None:
        """RuntimeError where the bank cannot be written: it is computed (parametrized, pruned), or flattened by FSDP1."""
        shape, right = list(self.blueprint_weights.shape), [self.num_blueprints, self.hidden_dim]
        if "blueprint_weights" in self._parameters:
            problem = f"blueprint_weights has shape {shape} instead of {right}" if shape != right else ""
        elif "blueprint_weights" in self.__dict__ and "blueprint_weights_orig" not in self._parameters:
            problem = "blueprint_weights is no parameter of the layer any more"
        else:
            raise RuntimeError(
                "blueprint_weights is parametrized: what is written to it would be lost; "
                "to germinate seeds, pass keep_blueprints=True"
            )
        if problem:
            raise RuntimeError(
                f"{problem}, so it cannot be written: shard with torch.distributed.fsdp.fully_shard, not with "
                "FullyShardedDataParallel"
            )

    # ---- what an optimizer remembers, and is about to use ----------------------------------------

    def reset_optimizer_state(self, optimizer: Optimizer, seed_ids: SeedIds = None) -> None:
        """Zero what ``optimizer`` remembers of the blueprints that these seeds use: a new one must not inherit it.

        That is every tensor of the bank's shape in its state, in lists and dicts, too: the moments
        of Adam, AdamW or Lion, the momentum of SGD. What has another shape (flattened or quantized
        moments, counters of steps) stays. An optimizer that does not train the bank, or has not
        stepped yet, has nothing to forget. ValueError for a seed that does not exist. With a mask
        (bool ``[S]``) it never waits for the device.
        """
        mask = self.blueprint_mask(self._chosen(seed_ids))
        for moment in self.moments(optimizer):
            write(moment, 0.0, mask)

    def moments(self, optimizer: Optimizer) -> list[Tensor]:
        """What ``optimizer`` remembers of the bank, element by element: tensors of its shape, sharded where it is."""
        bank = self.lasting_bank
        return [moment.detach() for moment in _of_shape(bank.shape, optimizer.state.get(bank))]

    @property
    def gathers_gradient(self) -> bool:
        """Whether the bank has a ``.grad`` now."""
        bank = self.own_bank
        return bank is not None and bank.grad is not None

    def forget_gradient(self, chosen: Tensor) -> None:
        """Zero the bank's ``.grad`` for the blueprints of the seeds where ``chosen [S]``, or for the elements where
        ``chosen [P, H]``: it is of what they were.

        Never waits for the device. Not while a CUDA graph is captured, since the next replay may
        find another tensor there.
        """
        if self.gathers_gradient and not (chosen.is_cuda and torch.cuda.is_current_stream_capturing()):
            write(self.lasting_bank.grad, 0.0, chosen if chosen.dim() == 2 else self.blueprint_mask(chosen))

    def _chosen(self, seed_ids: SeedIds) -> Tensor:
        device, seeds = self._buffers["state"].device, self.num_seeds
        if isinstance(seed_ids, Tensor) and seed_ids.dtype == torch.bool and seed_ids.shape == (seeds,):
            return on_device(device, seed_ids)
        chosen = torch.zeros(seeds, dtype=torch.bool, device=device)
        chosen[self.extended_state.ids(seed_ids)] = True
        return chosen

    # ---- training a blueprint before it is grafted -----------------------------------------------

    def reconstruction_loss(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """How far the blueprints of seeds in TRAINING are from reproducing their chunks: ``[S]``, 0 for all other seeds.

        The mean of ``(g(x, w) - target)^2`` over the chunk and all rows, with ``g`` what the seed
        would put out at alpha 1. ``x`` are activations that the base layer put out, in the layer's
        own layout; ``target`` is like ``x``, by default ``x`` itself: a teacher's activations, say,
        or the undamaged network's. Both are taken as constants, so the gradient reaches the bank
        only: add the sum to the loss of the task. float32; float64 for a float64 ``x``. Where the bank
        is sharded it is gathered, so every process must call this.
        """
        target = x if target is None else target
        if target.shape != x.shape:
            raise ValueError(f"target must have the shape of x, {list(x.shape)}, got {list(target.shape)}")
        buffers, bank = self._buffers, self.blueprint_weights
        features_last = self._features_last(x)
        return blend_ops(x.device, x.dtype, self.enable_kernels).reconstruction_loss(
            features_last,
            features_last if target is x else self._features_last(target),
            buffers["seed_offsets"],
            buffers["state"],
            gathered(bank) if is_sharded(bank) else bank,
        )


def rows_of(chosen: Tensor, state: Tensor, owner: Tensor, owned: Tensor, num_blueprints: int) -> tuple[Tensor, Tensor]:
    """Where in a bank, bool ``[P, H]``, the first and the second rows of the seeds where ``chosen [S]`` are; ``owner [H]``
    and ``owned [H]`` say whose the features are.
    """
    blueprint = state[StateVar.BLUEPRINT_ID][owner]
    features = chosen[owner] & owned & (blueprint >= 0)
    affine = state[StateVar.GRAFTING_STRATEGY][owner] == _AFFINE
    row = torch.arange(num_blueprints, device=state.device)[:, None]
    return features & (row == blueprint), features & affine & (row == blueprint + 1)


def neutral_first(state: Tensor, telemetry: Tensor) -> Tensor:
    """float64 ``[S]``: the first row of what each seed's strategy starts from; the second is 0."""
    measured = telemetry[:, TelemetryColumn.COUNT] > 0
    mean = torch.where(measured, telemetry[:, TelemetryColumn.MEAN], 0.0)
    strategy = state[StateVar.GRAFTING_STRATEGY]
    scales = (strategy == _MULTIPLICATIVE) | (strategy == _AFFINE)
    return torch.where(strategy == _MIXED, mean, scales.to(mean.dtype))


def neutral_rows(strategy: GraftingStrategy, num_blueprints: int) -> Tensor:
    """``[P]``: what the weights of each row are in a bank that changes nothing."""
    return torch.tensor([strategy.neutral[p % strategy.rows] for p in range(num_blueprints)], device="cpu")


def _of_shape(shape: torch.Size, remembered: Any) -> Iterator[Tensor]:
    """The tensors of this shape in what an optimizer remembers of a parameter."""
    if isinstance(remembered, Tensor):
        if remembered.shape == shape:
            yield remembered
    elif isinstance(remembered, (Mapping, list, tuple, deque)):
        for each in remembered.values() if isinstance(remembered, Mapping) else remembered:
            yield from _of_shape(shape, each)
