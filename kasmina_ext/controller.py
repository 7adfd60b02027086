"""A controller that grows a network by itself: where the gradient asks for it, keeping what has proven its worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_ext._dispatch import lifecycle_ops
from kasmina_ext.blueprints import Blueprints
from kasmina_ext.credit import Credit, grafted, measured_credit
from kasmina_ext.culling import Expendable, find_expendable
from kasmina_ext.events import EventLog, Sink
from kasmina_ext.lifecycle import ExtendedLifecycle, Verdict
from kasmina_ext.measure import Layers, Layout, LossFunction, Measurement, roots_of, seed_layers
from kasmina_ext.policy import (
    MEASURED_NUMBERS,
    NUMBERS,
    STAY,
    GrowthConfig,
    Measured,
    Policy,
    Seeds,
    alive_in,
    checked_budget,
    decided_by,
    default_policy,
)
from kasmina_ext.state_layout import NO_ID, StateVar
from kasmina_ext.telemetry import potential

_S = ExtendedLifecycle
_FORMAT = 1
# On entering these, what an optimizer remembers of the blueprint has no meaning any more.
_RESETTING = (_S.GERMINATED, _S.FOSSILIZED, _S.CULLED, _S.CANCELLED, _S.ROLLED_BACK)


@dataclass(frozen=True)
class Evaluation:
    """What :meth:`GrowthController.evaluate` found and did."""

    loss: float
    """Of the batches, after what was culled has gone."""
    loss_before: float
    """As the seeds were."""
    loss_without: float
    """With no seed at all."""
    advanced: int
    fossilized: int
    culled: int
    """Rolled back ones included."""
    alive: int
    """GERMINATED to FOSSILIZED, afterwards."""
    credit: Credit | None
    """Of the seeds as they were; None where the settings say ``points=0``."""

    def __str__(self) -> str:
        text = (
            f"loss {self.loss:.6g}, before culling {self.loss_before:.6g}, without seeds {self.loss_without:.6g}; "
            f"{self.advanced} advanced, {self.fossilized} fossilized, {self.culled} culled, {self.alive} alive"
        )
        return text if self.credit is None else f"{text}\n{self.credit}"


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
        layers: KasminaLayers, a model that contains them, or a list of either.
        optimizer: what trains the banks, if its moments are to start afresh where blueprints begin
            and end. It should know nothing of weight decay: see :func:`kasmina_ext.param_groups`.
        config: a :class:`~kasmina_ext.policy.GrowthConfig`; its fields may also be given as keywords.
        policy: a function to decide instead of the default policy: see
            :data:`~kasmina_ext.policy.Policy`. It sees all seeds, in every tick and evaluation.
        log: a file for the event log (JSON lines are appended), or a function of each event's dict.

    The decisions of a tick are one batch of requests for each layer, judged on the device by the
    rules. The controller ticks in the place of ``layer.step_lifecycle()``: do not call both; alpha
    ramps where a layer has an ``alpha_schedule``. Two runs with the same seeds, data and settings
    decide alike. Telemetry must be on: without it nothing germinates. Ranks of a distributed job
    see different gradients: give them the same telemetry, or let one decide.
    """

    def __init__(
        self,
        layers: Layers,
        optimizer: Optimizer | None = None,
        config: GrowthConfig | None = None,
        *,
        policy: Policy | None = None,
        log: Sink = None,
        **settings: Any,
    ) -> None:
        self._roots = roots_of(layers)
        named = seed_layers(self._roots)
        config = GrowthConfig() if config is None else config
        unknown = settings.keys() - {field.name for field in dataclasses.fields(config)}
        if unknown:
            raise TypeError(f"GrowthController has no setting {sorted(unknown)[0]!r}")
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
        self._log = EventLog(log, {name: layer.num_seeds for name, layer in named.items()}, decided_by(self.policy))
        self._blueprints = [Blueprints(layer) for layer in self.layers]
        self._ramp = self.rules.least_epochs(_S.GRAFTING, _S.STABILIZATION) or 0
        self._budget = self.config.budget
        self._watched = [layer._buffers["grad_telemetry"].clone() for layer in self.layers]
        self._reconstruction: list[Tensor] | None = None
        self._losses = torch.zeros(2, dtype=torch.float64, device=self._layout.device)
        self._lives = torch.zeros(self._layout.total, dtype=torch.int32, device=self._layout.device)
        self._random = torch.Generator(self._layout.device)

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
            return self._layout.total
        return sum(blueprints.total_parameters for blueprints in self._blueprints)

    def step(self, loss: Tensor | float | None = None, reconstruction: Tensor | Sequence[Tensor] | None = None) -> bool:
        """Once per optimizer step, after it; every ``tick_every`` steps a tick. Whether this was one.

        ``loss``, for the log and for policies, is averaged until the next tick. ``reconstruction``
        are the results of ``layer.reconstruction_loss``, one ``[S]`` for each layer (or the tensor,
        if there is one layer), where the training uses it; otherwise the controller goes by the
        mean and variance of what the seeds saw, which is exact for neutral blueprints.

        Never waits for a CUDA device as long as losses and layers lie on it. (A policy of your own
        may; so may a log file's disk, at ticks only.)
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
            self._log.poll()
            if self.steps % self.config.tick_every:
                return False
            self._tick()
            return True

    def _tick(self) -> None:
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
            for blueprints in self._blueprints:
                blueprints.take_snapshot()
        until = self.config.until
        self._decide(self._seeds(germinates=watched and (until is None or self.ticks <= until)))
        if watched:
            # From here on, what the gradient says to the network as it has become.
            self._watched = [layer._buffers["grad_telemetry"].clone() for layer in self.layers]
        self._losses.zero_()
        self._reconstruction = None

    # ---- on held-out batches -----------------------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[Any], loss_fn: LossFunction) -> Evaluation:
        """Judge the seeds by ``loss_fn(batch)`` on held-out batches: keep, fossilize or cull. Waits for the device.

        At least two batches; small ones are better, and one loss for each sample is better than
        their mean. They are kept in memory meanwhile. Passes through the network, each over all
        batches: two forward, and ``points`` forward and backward for the credit; then in every round
        of the culling one forward and backward, and one forward for each of ``exact`` candidates and
        for each proposal. Nothing but the seeds' states is touched, and the moments of blueprints
        that end: see :func:`kasmina_ext.credit`.
        """
        with torch.no_grad():
            seeds = self._seeds(germinates=False)
            with Measurement(self._roots, batches, loss_fn) as measurement:
                if measurement.num_batches < 2:
                    raise ValueError("evaluate needs at least 2 batches to tell what is chance; split the one given")
                alpha = measurement.alpha
                before, without = measurement.losses(alpha), measurement.losses(0 * alpha)
                account = None
                if self.config.points:
                    account = measured_credit(measurement, without - before, self.config.points)
                found = self._cull(measurement, seeds)
            loss, loss_without = found.losses.mean().item(), without.mean().item()
            measured = Measured(
                cost=found.cost,
                error=found.error,
                expendable=found.removed,
                group_cost=found.group_cost,
                group_error=found.group_error,
                credit=found.cost * torch.nan if account is None else self._layout.join(account.mean),
                error_rate=found.nonfinite / measurement.num_batches,
                improvement=1 - loss / loss_without if loss_without else 0.0,
            )
            entered = self._decide(dataclasses.replace(seeds, measured=measured))
            counts = torch.stack([(entered == state).sum() for state in range(len(_S))]).tolist()
            alive = int(alive_in(self._lifecycles()).sum())
        self._log.flush()
        return Evaluation(
            loss=loss,
            loss_before=before.mean().item(),
            loss_without=loss_without,
            advanced=counts[_S.FINE_TUNING],
            fossilized=counts[_S.FOSSILIZED],
            culled=counts[_S.CULLED] + counts[_S.ROLLED_BACK],
            alive=alive,
            credit=account,
        )

    def _cull(self, measurement: Measurement, seeds: Seeds) -> Expendable:
        """Who is expendable, and who must go since the budget has shrunk."""
        in_output = grafted(seeds.lifecycle)
        # What has no part in the output yet goes first.
        waiting = seeds.among(_S.GERMINATED, _S.TRAINING) & seeds.may(_S.CANCELLED)
        surplus = -int(seeds.room) - int(torch.where(waiting, seeds.price, 0).sum())
        removable = seeds.may(_S.CULLED)
        if surplus > 0:
            removable |= seeds.may(_S.ROLLED_BACK)
        return find_expendable(
            measurement,
            alive=in_output,
            candidates=in_output & removable,
            z=self.config.z,
            share=self.config.group,
            exact=self.config.exact,
            prices=seeds.price,
            surplus=surplus,
        )

    # ---- going on later ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the controller knows beside the layers' own buffers, for :meth:`load_state_dict`; events still on
        their way are written first. Copies on the CPU, safe for ``torch.load(weights_only=True)``. Waits for the device.
        """
        self._log.flush()
        return self._state(lambda tensor: tensor.detach().to("cpu", copy=True))

    def _state(self, kept: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """:meth:`state_dict` of tensors as ``kept`` makes them; does not wait for the device itself."""
        return {
            "format": _FORMAT,
            "config": self.config.as_dict(),
            "layers": self._sizes(),
            "budget": self._budget,
            "steps": self.steps,
            "ticks": self.ticks,
            "lives": kept(self._lives),
            "losses": kept(self._losses),
            "watched": [kept(tensor) for tensor in self._watched],
            "reconstruction": None if self._reconstruction is None else [kept(each) for each in self._reconstruction],
            "snapshots": [[kept(tensor) for tensor in blueprints.snapshots] for blueprints in self._blueprints],
        }

    def _sizes(self) -> dict[str, int]:
        return {name: layer.num_seeds for name, layer in zip(self.names, self.layers, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with the settings and the policy of this controller.

        Layers and optimizer are loaded on their own. ValueError, and nothing changed, for a state
        of other layers or another format.
        """
        self.check_state_dict(state)

        def moved(tensors: Iterable[Tensor]) -> list[Tensor]:
            return [tensor.to(layer.device, copy=True) for tensor, layer in zip(tensors, self.layers, strict=True)]

        self._budget = checked_budget(state["budget"])
        self.steps, self.ticks = state["steps"], state["ticks"]
        self._lives = state["lives"].to(self._layout.device, copy=True)
        self._losses = state["losses"].to(self._layout.device, copy=True)
        self._watched = moved(state["watched"])
        given = state["reconstruction"]
        self._reconstruction = None if given is None else moved(given)
        for blueprints, layer, snapshots in zip(self._blueprints, self.layers, state["snapshots"], strict=True):
            blueprints.snapshots = [snapshot.to(layer.device, copy=True) for snapshot in snapshots]

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError for what :meth:`load_state_dict` would refuse. Changes nothing."""
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise ValueError(f"this is no controller's state of format {_FORMAT}")
        missing = self._state(lambda tensor: tensor).keys() - state.keys()
        if missing:
            raise ValueError(f"the controller's state has no {sorted(missing)[0]!r}")
        if state["layers"] != self._sizes():
            raise ValueError(f"the state is of layers {state['layers']}, the controller drives {self._sizes()}")
        for name in ("steps", "ticks"):
            if type(state[name]) is not int or state[name] < 0:
                raise ValueError(f"the state's {name} must be an integer of at least 0, got {state[name]!r}")
        checked_budget(state["budget"])
        like = [layer._buffers["grad_telemetry"] for layer in self.layers]
        banks = [layer.blueprint_weights for layer in self.layers]
        _expect("lives", [state["lives"]], [self._lives])
        _expect("losses", [state["losses"]], [self._losses])
        _expect("watched", state["watched"], like)
        if state["reconstruction"] is not None:
            _expect("reconstruction", state["reconstruction"], [seen[:, 0] for seen in like])
        snapshots = state["snapshots"]
        if not isinstance(snapshots, (list, tuple)) or len(snapshots) != len(banks):
            raise ValueError(f"the state's snapshots must be of {len(banks)} banks")
        for of_bank, bank in zip(snapshots, banks, strict=True):
            if not isinstance(of_bank, (list, tuple)) or len(of_bank) > 2:
                raise ValueError("the state's snapshots must be two of each bank at most")
            if any(not isinstance(each, Tensor) or each.shape != bank.shape for each in of_bank):
                raise ValueError("the state's snapshots are of other banks")

    # ---- deciding ----------------------------------------------------------------------------------------------------

    def _seeds(self, *, germinates: bool) -> Seeds:
        """What the policy is to see."""
        layout = self._layout
        state = layout.buffer("state").clone()
        self._follow_layers()
        traits = [blueprints.traits() for blueprints in self._blueprints]
        parameters, reconstruction, stability, nonfinite = (
            layout.join([getattr(trait, name) for trait in traits])
            for name in ("parameters", "reconstruction", "stability", "nonfinite")
        )
        if self._reconstruction is not None:
            reconstruction = layout.join(self._reconstruction)
        return Seeds(
            layer=self._layer_numbers(),
            lifecycle=state[StateVar.LIFECYCLE_STATE],
            epochs=state[StateVar.EPOCHS_IN_STATE],
            errors=state[StateVar.ERROR_COUNT],
            lives=self._lives.clone(),
            alpha=layout.buffer("alpha").clone(),
            parameters=parameters,
            potential=layout.join(
                [potential(layer, since) for layer, since in zip(self.layers, self._watched, strict=True)]
            ),
            activations=layout.buffer("telemetry").clone(),
            reconstruction=reconstruction,
            stability=stability,
            nonfinite=nonfinite,
            rules=self.rules.on(layout.device),
            price=torch.ones_like(parameters) if self.config.budget_in == "seeds" else parameters,
            budget=self.budget,
            tick=self.ticks,
            step=self.steps,
            loss=self._losses[0] / self._losses[1],
            germinates=germinates,
            config=self.config,
            _random=self._random,
        )

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

    def _decide(self, seeds: Seeds) -> Tensor:
        """Ask the policy, request what it wants, log what came of it: int32 ``[T]``, the states entered, else -1."""
        wanted = self.policy(seeds)
        if not isinstance(wanted, Tensor) or wanted.shape != seeds.lifecycle.shape or wanted.is_floating_point():
            raise TypeError(f"a policy must return integers [{self._layout.total}], one for each seed")
        wanted = self._within_budget(seeds, wanted.to(seeds.lifecycle.dtype))
        verdicts = []
        for layer, targets in zip(self.layers, self._layout.split(wanted), strict=True):
            every = torch.arange(layer.num_seeds, dtype=torch.int32, device=layer.device)
            ids = torch.where(targets == STAY, NO_ID, every)
            verdicts.append(layer.request_state_transitions(ids, targets, rules=self.rules))
        applied = (self._layout.join(verdicts) == Verdict.APPLIED) & (wanted != seeds.lifecycle)
        entered = torch.where(applied, wanted, STAY)
        self._lives += entered == _S.GERMINATED
        self._follow_up(seeds, entered)
        self._record(seeds, entered, applied)
        return entered

    def _within_budget(self, seeds: Seeds, wanted: Tensor) -> Tensor:
        """Whatever the policy: no germination for which there is no room."""
        begins = ~seeds.alive & (wanted >= _S.GERMINATED) & (wanted <= _S.FOSSILIZED)
        # Those whose potential is not known come last, in the order of the seeds.
        known = torch.where(seeds.potential > 0, seeds.potential, torch.finfo(torch.float64).tiny)
        return torch.where(begins & ~seeds.best(begins, known, seeds.room), STAY, wanted)

    def _follow_up(self, seeds: Seeds, entered: Tensor) -> None:
        resets = torch.zeros_like(entered, dtype=torch.bool)
        for state in _RESETTING:
            resets |= entered == state
        ends = resets & (entered > _S.FOSSILIZED)
        masks = (resets, ends & (seeds.nonfinite > 0))
        for layer, ended, broken in zip(self.layers, *(self._layout.split(mask) for mask in masks), strict=True):
            if self.optimizer is not None:
                layer.reset_optimizer_state(self.optimizer, ended)
            layer._make_neutral(broken)

    def _record(self, seeds: Seeds, entered: Tensor, applied: Tensor) -> None:
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


def _expect(name: str, given: Any, like: Sequence[Tensor]) -> None:
    """ValueError unless the state's entry ``given`` is one tensor for each of ``like``, of its shape and dtype."""
    if not isinstance(given, (list, tuple)) or len(given) != len(like):
        raise ValueError(f"the state's {name} must be {len(like)} tensors")
    for tensor, model in zip(given, like, strict=True):
        if not isinstance(tensor, Tensor) or tensor.shape != model.shape or tensor.dtype != model.dtype:
            what = f"{list(tensor.shape)}, {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"the state's {name} must be {list(model.shape)}, {model.dtype}; got {what}")
