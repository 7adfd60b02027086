"""A controller that grows a network by itself: where the gradient asks for it, keeping what has proven its worth."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_ext._dispatch import lifecycle_ops
from kasmina_ext.blueprints import Blueprints, Traits, traits_of
from kasmina_ext.distributed import merged_telemetry
from kasmina_ext.evaluation import Evaluation, judge
from kasmina_ext.events import EventLog, Sink
from kasmina_ext.growth_state import FORMAT, taken_from
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle, Verdict, begins_or_ends
from kasmina_ext.measure import Layers, Layout, LossFunction, roots_of, seed_layers
from kasmina_ext.policy import (
    MEASURED_NUMBERS,
    NUMBERS,
    STAY,
    GrowthConfig,
    Observation,
    Policy,
    alive_in,
    checked_budget,
    decided_by,
    default_policy,
)
from kasmina_ext.ranks import Ranks
from kasmina_ext.seed_record import SeedRecord
from kasmina_ext.side_by_side import Sides
from kasmina_ext.state_layout import INT32_MAX, INT32_MIN, StateVar
from kasmina_ext.telemetry import potential_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_S = ExtendedLifecycle


_drivers: WeakKeyDictionary[KasminaLayer, ref[GrowthController]] = WeakKeyDictionary()
"""Who drives a layer."""


class GrowthController:
    """Drives every seed of every layer through its life: call :meth:`step` after each ``optimizer.step()``, and
    :meth:`evaluate` with held-out batches now and then.

    .. code-block:: python

        grow = GrowthController(model, optimizer, budget=0.1, tick_every=50, log="growth.jsonl")
        for batch in loader:
            ...
            loss.backward(); optimizer.step(); grow.step(loss)
        print(grow.evaluate(held_out, lambda batch: loss_of(model, batch)))

    Seeds germinate in ticks of :meth:`step`, where the gradient says that they would help, and are
    blended in; only :meth:`evaluate` keeps or culls, by what their removal does to the loss of
    held-out batches. Between evaluations seeds stay in EVALUATING or FINE_TUNING, where they are
    trained like any other. :func:`~kasmina_ext.policy.default_policy` says when what happens.

    Arguments:
        layers: KasminaLayers, a model that contains them, a list of either, or :class:`kasmina_ext.Seeds`.
        optimizer: what trains the banks, if its moments are to start afresh where blueprints begin
            and end. It should know nothing of weight decay: see :func:`kasmina_ext.param_groups`.
        config: a :class:`~kasmina_ext.policy.GrowthConfig`; its fields may also be given as keywords.
        policy: a function to decide instead of the default policy: see
            :data:`~kasmina_ext.policy.Policy`. It sees all seeds, in every tick and evaluation.
        log: a file for the event log (JSON lines are appended; OSError where it cannot be opened), or
            a function of each event's dict. If it raises later, the error comes out of the call that
            was to write, once, when all else of it is done; events wait for the next one that works.
        record: a :class:`~kasmina_ext.seed_record.SeedRecord` of these layers, which takes a snapshot in
            each tick and evaluation and is part of the controller's state.
        process_group: the processes that train the same network: by default, where torch.distributed is
            initialized, all of the job. False: this one alone.

    ValueError for a layer whose bank is parametrized (or flattened by FSDP1): no seed could germinate in
    it. One layer wants one controller: there is a warning where another that is still alive drives it
    already, and one where a share as budget is less than half a seed.

    The decisions of a tick are one batch of requests for each layer, judged on the device by the
    rules. The controller ticks in the place of ``layer.step_lifecycle()``: do not call both; alpha
    ramps where a layer has an ``alpha_schedule``. Two runs with the same seeds, data and settings
    decide alike. Telemetry must be on: without it nothing germinates.

    In a job of several processes every rank has a controller, and all decide alike: ticks go by the
    telemetry, losses and reconstruction losses of all ranks, evaluations by the held-out batches of
    all, of which each brings equally many of its own; the first rank's decision counts, and only it
    writes the log. So all ranks must call :meth:`step` and :meth:`evaluate` equally often. A sharded
    bank (FSDP2) is gathered in each tick. For one rank to decide alone, give it
    ``process_group=False`` and tell the others by :func:`kasmina_ext.distributed.sync_lifecycle`.
    """

    def __init__(
        self,
        layers: Layers,
        optimizer: Optimizer | None = None,
        config: GrowthConfig | None = None,
        *,
        policy: Policy | None = None,
        log: Sink = None,
        record: SeedRecord | None = None,
        process_group: ProcessGroup | Literal[False] | None = None,
        **settings: Any,
    ) -> None:
        self._roots = roots_of(layers)
        named = seed_layers(self._roots)
        config = GrowthConfig() if config is None else config
        known = sorted(field.name for field in dataclasses.fields(config))
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise TypeError(f"GrowthController has no setting {unknown[0]!r}; there are {', '.join(known)}")
        self.config = dataclasses.replace(config, **settings)
        self.names = list(named)
        self.layers = list(named.values())
        self.optimizer = optimizer
        self.policy: Policy = default_policy if policy is None else policy
        self.rules = self.config.life()
        self.steps = 0
        """Calls of :meth:`step`."""
        self.ticks = 0
        self._layout = Layout(self.layers)
        if record is not None and not record.is_of(self.layers):
            raise ValueError(f"the record is of other layers: {', '.join(map(repr, record.layers))}")
        self.record = record
        self._process_group = process_group
        self._known_alike = False
        self._check_banks()
        log = log if Ranks(process_group).rank == 0 else None
        self._log = EventLog(log, {name: layer.num_seeds for name, layer in named.items()}, decided_by(self.policy))
        self._blueprints = {layer: Blueprints(layer) for layer in self.layers}
        self._sides = Sides(self.layers)
        self._ramp = self.rules.least_epochs(_S.GRAFTING, _S.STABILIZATION) or 0
        self._budget = self.config.budget
        self._watch()
        self._reconstruction: list[Tensor] | None = None
        self._losses = torch.zeros(2, dtype=torch.float64, device=self._layout.device)
        self._lives = torch.zeros(self._layout.total, dtype=torch.int32, device=self._layout.device)
        self._random = torch.Generator(self._layout.device)
        self._take_over()
        if self._budget and self._total_price and not self.budget:
            warnings.warn(
                f"nothing can germinate: a budget of {self._budget:g} is none of {self._total_price} "
                f"{self.config.budget_in}; an integer says how many",
                stacklevel=2,
            )

    def _check_banks(self) -> None:
        for name, layer in zip(self.names, self.layers, strict=True):
            try:
                layer.check_own_bank()
            except RuntimeError as error:
                raise ValueError(f"layer {name!r} cannot grow: {error}") from None

    def _take_over(self) -> None:
        driven = [
            name
            for name, layer in zip(self.names, self.layers, strict=True)
            if (other := _drivers.get(layer)) is not None and other() is not None
        ]
        if driven:
            more = f" (and {len(driven) - 1} more)" if len(driven) > 1 else ""
            warnings.warn(
                f"layer {driven[0]!r}{more} is driven by another controller that is still alive: if both go on, it "
                "ticks twice",
                stacklevel=3,
            )
        for layer in self.layers:
            _drivers[layer] = ref(self)

    # ---- in training -------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> int:
        """Seeds (or parameters) alive at most. May be set, to a share or a number; a smaller one is met by the next
        :meth:`evaluate`.
        """
        if isinstance(self._budget, int):
            return self._budget
        return round(self._budget * self._total_price)

    @budget.setter
    def budget(self, budget: float | int) -> None:
        self._budget = checked_budget(budget)

    @property
    def _total_price(self) -> int:
        if self.config.budget_in == "seeds":
            return sum(blueprints.owners for blueprints in self._blueprints.values())
        return sum(blueprints.total_parameters for blueprints in self._blueprints.values())

    def step(self, loss: Tensor | float | None = None, reconstruction: Tensor | Sequence[Tensor] | None = None) -> bool:
        """Once per optimizer step, after it; every ``tick_every`` steps a tick. Whether this was one.

        ``loss``, for the log and for policies, is averaged until the next tick. ``reconstruction``
        are the results of ``layer.reconstruction_loss``, one ``[S]`` for each layer (or the tensor,
        if there is one layer), where the training uses it; otherwise the controller goes by the
        mean and variance of what the seeds saw, which is exact for neutral blueprints.

        Never waits for a CUDA device as long as losses and layers lie on it. (A policy of your own
        may; so may a log file's disk; so does, of several processes, the first tick.)
        """
        with torch.no_grad():
            self.steps += 1
            if loss is not None:
                loss = loss.detach().double().mean() if (is_tensor := isinstance(loss, Tensor)) else float(loss)
                self._losses[0] += loss.to(self._losses.device, non_blocking=True) if is_tensor else loss
                self._losses[1] += 1
            if reconstruction is not None:
                given = [reconstruction] if isinstance(reconstruction, Tensor) else list(reconstruction)
                if [tuple(each.shape) for each in given] != [(layer.num_seeds,) for layer in self.layers]:
                    raise ValueError("reconstruction must be one tensor [S] for each layer")
                self._reconstruction = [each.detach().double() for each in given]
            ticks = self.steps % self.config.tick_every == 0
            if ticks:
                self._tick()
            self._log.poll()  # last: if the log fails, nothing else is half done
            return ticks

    def _tick(self) -> None:
        self._check_banks()
        self.ticks += 1
        for layer in self.layers:
            buffers = layer._buffers
            lifecycle_ops(layer.device, layer.enable_kernels).lifecycle_step(
                buffers["state"],
                buffers["history"],
                buffers["history_count"],
                buffers["alpha"],
                int(layer.alpha_schedule),
                self._ramp,
                False,
            )
        watched = self.ticks % self.config.watch == 0
        if watched:
            for blueprints in self._blueprints.values():
                blueprints.take_snapshot()
        until = self.config.until
        with self._together() as ranks:
            germinates = watched and (until is None or self.ticks <= until)
            # The default policy asks for stability in evaluations only, and the log goes by what it asks for.
            stability = self.policy is not default_policy
            self._decide(self._seeds(ranks, germinates=germinates, stability=stability), ranks)
            if self.record is not None:
                self.record.take(self.steps)
        if watched:
            self._watch()
        self._losses.zero_()
        self._reconstruction = None

    def _watch(self) -> None:
        """From here on, what the gradient says to the network as it has become."""
        self._watched = [layer._buffers["grad_telemetry"].clone() for layer in self.layers]
        self._resets = [layer.telemetry_resets for layer in self.layers]

    def _watched_since(self) -> list[Tensor]:
        """Of each layer, zeros where its telemetry has begun afresh since: then all of it counts."""
        return [
            seen if layer.telemetry_resets == resets else torch.zeros_like(seen)
            for layer, seen, resets in zip(self.layers, self._watched, self._resets, strict=True)
        ]

    def flush(self) -> None:
        """Write all events that the log still waits for. Waits for the device; raises what the log raises."""
        self._log.flush()

    # ---- on held-out batches -----------------------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[Any], loss_fn: LossFunction) -> Evaluation:
        """Judge the seeds by ``loss_fn(batch)`` on held-out batches: keep, fossilize or cull. Waits for the device.

        At least two batches; small ones are better, and one loss for each sample is better than
        their mean. They are kept in memory meanwhile. Passes through the network, each over all
        batches: two forward, and ``points`` forward and backward for the credit; then in every round
        of the culling one forward and backward, and one forward for each of ``exact`` candidates and
        for each proposal; where a loss is not finite, a few more to find the seeds at fault. Nothing
        but the seeds' states is touched, and the moments and ``.grad`` of blueprints that end: see
        :func:`kasmina_ext.credit`.

        Batches (or samples) whose loss is not finite without any seed are left out, and counted in
        the result; if that is all of them, nothing is judged, as it says. A seed with which a loss is
        not finite, and without which it is, goes at once.
        """
        self._check_banks()
        with torch.no_grad(), self._together() as ranks:
            seeds = self._seeds(ranks, germinates=False, stability=True)
            found = judge(self._roots, batches, loss_fn, seeds, ranks)
            entered = self._decide(dataclasses.replace(seeds, measured=found.measured), ranks)
            if self.record is not None:
                self.record.take(self.steps, found.credit)
            counts = torch.stack([(entered == state).sum() for state in range(len(_S))]).tolist()
            alive = int(alive_in(self._lifecycles()).sum())
        self._log.poll(wait=True)
        return Evaluation(
            loss=found.loss,
            loss_before=found.loss_before,
            loss_without=found.loss_without,
            advanced=counts[_S.FINE_TUNING],
            fossilized=counts[_S.FOSSILIZED],
            culled=counts[_S.CULLED] + counts[_S.ROLLED_BACK],
            alive=alive,
            credit=found.credit,
            left_out=found.left_out,
        )

    # ---- going on later ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the controller knows beside the layers' own buffers, for :meth:`load_state_dict`; events still on
        their way are written first. Copies on the CPU, safe for ``torch.load(weights_only=True)``. Waits for the device.
        """
        self._log.poll(wait=True)
        return self._state(lambda tensor: tensor.detach().to("cpu", copy=True))

    def _state(self, kept: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """:meth:`state_dict` of tensors as ``kept`` makes them; does not wait for the device itself."""
        return {
            "format": FORMAT,
            "config": self.config.as_dict(),
            "layers": self._layer_sizes(),
            "budget": self._budget,
            "steps": self.steps,
            "ticks": self.ticks,
            "lives": kept(self._lives),
            "losses": kept(self._losses),
            "watched": [kept(tensor) for tensor in self._watched_since()],
            "reconstruction": None if self._reconstruction is None else [kept(each) for each in self._reconstruction],
            "snapshots": [
                [kept(tensor) for tensor in blueprints.snapshots] for blueprints in self._blueprints.values()
            ],
            "record": None if self.record is None else self.record._state(kept),
        }

    def _layer_sizes(self) -> dict[str, int]:
        return {name: layer.num_seeds for name, layer in zip(self.names, self.layers, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with the settings and the policy of this controller.

        Layers and optimizer are loaded on their own. ValueError, and nothing changed, for a state
        of other layers or another format, or one that is damaged.
        """
        taken = self._checked(state)
        self._budget, self.steps, self.ticks = taken["budget"], taken["steps"], taken["ticks"]
        self._lives, self._losses, self._watched = taken["lives"], taken["losses"], taken["watched"]
        self._reconstruction = taken["reconstruction"]
        self._resets = [layer.telemetry_resets for layer in self.layers]
        for blueprints, of_layer in zip(self._blueprints.values(), taken["snapshots"], strict=True):
            blueprints.snapshots = of_layer
        if self.record is not None and state.get("record") is not None:
            self.record.load_state_dict(state["record"])

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError for what :meth:`load_state_dict` would refuse. Changes nothing."""
        self._checked(state)

    def _checked(self, state: Mapping[str, Any]) -> dict[str, Any]:
        taken = taken_from(state, self.layers, self._layer_sizes(), self._lives, self._losses, self._watched)
        if self.record is not None and state.get("record") is not None:
            self.record.check_state_dict(state["record"])
        return taken

    # ---- deciding ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _together(self) -> Iterator[Ranks]:
        """Who decides. Inside, the layers' telemetry is that of all of them."""
        ranks = Ranks(self._process_group)
        if not self._known_alike:  # once: it waits for the device
            sizes = ", ".join(f"{name}: {size}" for name, size in self._layer_sizes().items())
            ranks.agree("layers and steps", f"{sizes} seeds at step {self.steps}")
            self._known_alike = True
        with merged_telemetry(self.layers, self._process_group):
            yield ranks

    def _seeds(self, ranks: Ranks, *, germinates: bool, stability: bool) -> Observation:
        """What the policy is to see; NaN for a ``stability`` that is not wanted."""
        layout = self._layout
        state = layout.buffer("state").clone()
        self._follow_layers()
        since = ranks.total(layout.join(self._watched_since()))
        losses = ranks.total(self._losses)
        traits = self._traits(stability)
        reconstruction = traits.reconstruction
        if self._reconstruction is not None:
            reconstruction = ranks.total(layout.join(self._reconstruction)) / ranks.size
        return Observation(
            layer=self._layer_numbers(),
            lifecycle=state[StateVar.LIFECYCLE_STATE],
            epochs=state[StateVar.EPOCHS_IN_STATE],
            errors=state[StateVar.ERROR_COUNT],
            lives=self._lives.clone(),
            alpha=layout.buffer("alpha").clone(),
            parameters=traits.parameters,
            potential=potential_of(state[StateVar.GRAFTING_STRATEGY], layout.buffer("grad_telemetry"), since),
            activations=layout.buffer("telemetry").clone(),
            reconstruction=reconstruction,
            stability=traits.stability,
            nonfinite=traits.nonfinite,
            rules=self.rules.on(layout.device),
            price=torch.ones_like(traits.parameters) if self.config.budget_in == "seeds" else traits.parameters,
            budget=self.budget,
            tick=self.ticks,
            step=self.steps,
            loss=losses[0] / losses[1],
            germinates=germinates,
            config=self.config,
            _random=self._random,
        )

    def _traits(self, stability: bool) -> Traits:
        of_sides = [
            traits_of(side, [self._blueprints[layer] for layer in side.layers], stability=stability)
            for side in self._sides
        ]
        return Traits(*map(self._sides.gather, zip(*of_sides, strict=True)))

    def _follow_layers(self) -> None:
        """To the device where they are now."""
        device = self._layout.device
        if self._random.device != device:
            self._random = torch.Generator(device)
            self._lives, self._losses = self._lives.to(device), self._losses.to(device)
        self._watched = [
            seen.to(layer.device, non_blocking=True) for seen, layer in zip(self._watched, self.layers, strict=True)
        ]

    def _lifecycles(self) -> Tensor:
        return self._layout.join([layer.lifecycle_states for layer in self.layers])

    def _layer_numbers(self) -> Tensor:
        device = self._layout.device
        return torch.cat([torch.full((size,), i, device=device) for i, size in enumerate(self._layout.sizes)])

    def _decide(self, seeds: Observation, ranks: Ranks) -> Tensor:
        """Ask the policy, request what it wants, log what came of it: int32 ``[T]``, the states entered, else -1."""
        wanted = self.policy(seeds)
        if not isinstance(wanted, Tensor) or wanted.shape != seeds.lifecycle.shape or not _of_integers(wanted):
            raise TypeError(f"a policy must return integers [{self._layout.total}], one for each seed")
        # What fits into no int32 is no state either; it must not wrap to one.
        wanted = wanted.long().clamp(INT32_MIN, INT32_MAX).to(seeds.lifecycle.dtype)
        wanted = ranks.broadcast(self._within_budget(seeds, wanted))
        sides = list(self._sides)
        requested = [
            side.request(targets, self.rules) for side, targets in zip(sides, self._sides.spread(wanted), strict=True)
        ]
        verdicts = self._sides.gather([each.verdicts for each in requested])
        applied = (verdicts == Verdict.APPLIED) & (wanted != seeds.lifecycle)
        entered = torch.where(applied, wanted, STAY)
        self._lives += entered == _S.GERMINATED
        resets = begins_or_ends(entered)
        broken = resets & (entered > _S.FOSSILIZED) & (seeds.nonfinite > 0)
        for side, made, of_side in zip(sides, requested, self._sides.spread(broken), strict=True):
            side.make_neutral(made, of_side)
        for side, made, of_side in zip(sides, requested, self._sides.spread(resets), strict=True):
            side.forget(made.state, begins_or_ends(made.changed), of_side, self.optimizer)
        if ranks.rank == 0:
            self._record(seeds, entered, applied)
        return entered

    def _within_budget(self, seeds: Observation, wanted: Tensor) -> Tensor:
        """Whatever the policy: no germination for which there is no room."""
        begins = ~seeds.alive & (wanted >= _S.GERMINATED) & (wanted <= _S.FOSSILIZED)
        # Those whose potential is not known come last, in the order of the seeds.
        known = torch.where(seeds.potential > 0, seeds.potential, torch.finfo(torch.float64).tiny)
        return torch.where(begins & ~seeds.best(begins, known, seeds.room), STAY, wanted)

    def _record(self, seeds: Observation, entered: Tensor, applied: Tensor) -> None:
        if not self._log.wanted:
            return
        columns = {
            "from": seeds.lifecycle,
            "to": entered,
            **{name: getattr(seeds, name) for name in NUMBERS},
        }
        head: dict[str, Any] = {"step": seeds.step, "tick": seeds.tick}
        if seeds.measured is not None:
            head |= {"z": self.config.z, "improvement": seeds.measured.improvement}
            columns |= {name: getattr(seeds.measured, name) for name in MEASURED_NUMBERS}
        self._log.record(head, applied, columns)


def _of_integers(tensor: Tensor) -> bool:
    return not (tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex())
