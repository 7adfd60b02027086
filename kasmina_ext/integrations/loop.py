"""What a training loop has to do for seeds, whoever's loop it is: :class:`GrowthLoop`, which the callbacks share."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_ext.arguments import at_least, positive
from kasmina_ext.controller import GrowthController
from kasmina_ext.credit import Credit
from kasmina_ext.evaluation import Evaluation
from kasmina_ext.measure import seed_layers
from kasmina_ext.policy import GrowthConfig, alive_in
from kasmina_ext.sinks import Sink, log_seeds

MakeController = Callable[[nn.Module, Optimizer | None], GrowthController]
HeldOut = Iterable[Any] | Callable[[], Iterable[Any]]
ModelLoss = Callable[[nn.Module, Any], Tensor]
"""The loss of one batch, or one for each sample, from which little data says more."""

_OWN_ARGUMENTS = frozenset({"config", "policy", "log", "record", "process_group"})


class GrowthLoop:
    """Grows a model while somebody else's loop trains it: ticks, judges, logs, is saved and goes on.

    Arguments of both callbacks:
        controller: a :class:`~kasmina_ext.GrowthController`, or a function of model and optimizer that
            makes one. By default it is made when training begins, of all layers in the model and the
            optimizer that trains their banks, with the arguments that are not named here (``budget=0.1,
            tick_every=50, log="growth.jsonl"``, ...).
        held_out: batches to judge seeds by, or a function that gives them, each time anew; by default those
            that the loop evaluates on. In a job of several processes each brings as many of its own.
        loss_fn: ``loss_fn(model, batch)``, the loss of a batch or, better, one for each sample.
        evaluate_every: judge every so many optimizer steps, on ``held_out``, instead of whenever the loop
            evaluates.
        eval_set: which of several evaluation sets to judge by; by default the first.
        max_batches: at most so many batches are taken, the first ones: seeds are judged by many
            passes over them.
        sinks: where statistics go (:func:`kasmina_ext.sinks.log_seeds`), from the first rank only; give all
            ranks the same. They are closed when training ends.
        log_every: optimizer steps between two of these.
        top_k: seeds named in them.

    ``callback.controller`` is the controller as soon as there is one; ``callback.evaluation`` is what the last
    evaluation found.
    """

    def __init__(
        self,
        controller: GrowthController | MakeController | None = None,
        *,
        held_out: HeldOut | None = None,
        loss_fn: ModelLoss | None = None,
        evaluate_every: int | None = None,
        eval_set: str | int | None = None,
        max_batches: int = 32,
        sinks: Iterable[Sink] = (),
        log_every: int = 50,
        top_k: int = 10,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if controller is not None and arguments:
            raise TypeError(f"{sorted(arguments)[0]!r} is for a controller that is made here, and one was given")
        if not (controller is None or isinstance(controller, GrowthController) or callable(controller)):
            raise TypeError(f"controller must be a GrowthController, or make one, got {type(controller).__name__}")
        settings = {name: value for name, value in arguments.items() if name not in _OWN_ARGUMENTS}
        dataclasses.replace(arguments.get("config") or GrowthConfig(), **settings)  # wrong ones are told now, not later
        if isinstance(held_out, Iterator):
            raise TypeError("held_out must be batches that can be walked through again and again, not an iterator")
        if evaluate_every is not None and held_out is None:
            raise ValueError("evaluate_every needs held_out batches")
        if evaluate_every is not None and loss_fn is None and not self._has_own_loss:
            raise ValueError("evaluate_every needs a loss_fn(model, batch)")
        self._make, self._arguments = (None if isinstance(controller, GrowthController) else controller), arguments
        self.controller = controller if isinstance(controller, GrowthController) else None
        self._is_ours = self.controller is None
        self._held_out, self._loss_fn = held_out, loss_fn
        self._evaluate_every = None if evaluate_every is None else positive("evaluate_every", evaluate_every)
        self._eval_set, self._max_batches = eval_set, at_least("max_batches", max_batches, 2)
        self.sinks = list(sinks)
        self._log_every, self._top_k = positive("log_every", log_every), at_least("top_k", top_k, 0)
        self.evaluation: Evaluation | None = None
        self._losses: Tensor | float = 0.0
        self._num_losses = 0

    _has_own_loss = False
    """Whether the loop knows a loss where no ``loss_fn`` is given."""

    # ---- beginning ---------------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, optimizers: Sequence[Optimizer], saved: Mapping[str, Any] | None) -> None:
        """Before the first step, when model and optimizers are as they will be trained, and loaded if the run goes on;
        ``saved`` is then the controller's state.
        """
        layers = list(seed_layers(model if self._is_ours else self.controller.layers).values())
        optimizer = self._trainer_of(layers, optimizers)
        known = self.controller is not None and list(map(id, self.controller.layers)) == list(map(id, layers))
        if not known:
            self.controller = None  # nobody drives the layers meanwhile
            if self._make is not None:
                self.controller = self._make(model, optimizer)
            else:
                self.controller = GrowthController(model, optimizer, **self._arguments)
        elif self._is_ours or self.controller.optimizer is None:
            self.controller.optimizer = optimizer
        if saved is not None:
            self.controller.load_state_dict(saved)
        self._forget_losses()

    def _trainer_of(self, layers: Sequence[Any], optimizers: Sequence[Optimizer]) -> Optimizer | None:
        """The optimizer that trains the banks; warnings for what would wear them away, or leave them as they are."""
        banks = {id(layer.own_bank) for layer in layers}
        for optimizer in optimizers:
            groups = [group for group in optimizer.param_groups if any(id(p) in banks for p in group["params"])]
            if any(group.get("weight_decay") for group in groups):
                text = "weight decay wears seeds away: make the optimizer with kasmina_ext.param_groups(model)"
                warnings.warn(text, stacklevel=4)
            if groups:
                return optimizer
        warnings.warn("no optimizer of this loop trains the seeds' blueprints", stacklevel=4)
        return optimizers[0] if len(optimizers) == 1 else None

    # ---- stepping ----------------------------------------------------------------------------------------------------

    def _add_loss(self, loss: Tensor | float) -> None:
        """Of one batch of those that the next optimizer step is made from."""
        self._losses = self._losses + (loss.detach().double() if isinstance(loss, Tensor) else float(loss))
        self._num_losses += 1

    def _forget_losses(self) -> None:
        self._losses, self._num_losses = 0.0, 0

    def _stepped(self, loss: Tensor | float | None, first_rank: bool) -> None:
        """Once per optimizer step, after it."""
        self.controller.step(loss)
        if self.sinks and self.controller.steps % self._log_every == 0:
            self._log_seeds(first_rank)

    @property
    def _is_due(self) -> bool:
        """Whether this is a step to judge after, of those that the loop does not evaluate after itself."""
        return self._evaluate_every is not None and self.controller.steps % self._evaluate_every == 0

    def _log_seeds(self, first_rank: bool, credit: Credit | None = None) -> None:
        """Every rank: a sharded bank is gathered."""
        layers = dict(zip(self.controller.names, self.controller.layers, strict=True))
        log_seeds(layers, self.controller.steps, self.sinks if first_rank else [], self._top_k, credit)

    def _end(self, first_rank: bool) -> None:
        self.controller.flush()
        if first_rank:
            self._close_sinks()

    def _close_sinks(self) -> None:
        for sink in self.sinks:
            sink.close()

    def _alive(self) -> int:
        """Waits for the device."""
        return int(sum(alive_in(layer.lifecycle_states).sum().cpu() for layer in self.controller.layers))

    # ---- judging -----------------------------------------------------------------------------------------------------

    def _judge(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss_fn: ModelLoss,
        place: Callable[[Any], Any],
        first_rank: bool,
    ) -> dict[str, float]:
        """Evaluate on batches that ``place`` has moved to the device; what it found, in a few numbers. {} before the first
        tick, when there is nothing to judge.
        """
        if not self.controller.ticks:
            return {}
        with torch.inference_mode(False), torch.enable_grad():  # what is made here is used in training
            placed = map(place, first_of(batches, self._max_batches))
            self.evaluation = self.controller.evaluate(placed, partial(loss_fn, model))
        found = {
            "loss": self.evaluation.loss,
            "loss_before": self.evaluation.loss_before,
            "loss_without": self.evaluation.loss_without,
            "advanced": self.evaluation.advanced,
            "fossilized": self.evaluation.fossilized,
            "culled": self.evaluation.culled,
            "alive": self.evaluation.alive,
        }
        found = {f"seeds_{name}": float(value) for name, value in found.items()}
        if self.sinks:
            if first_rank:
                for sink in self.sinks:
                    sink.scalars(self.controller.steps, {name.replace("_", "/", 1): v for name, v in found.items()})
                    sink.event(self.controller.steps, {"evaluation": str(self.evaluation)})
            self._log_seeds(first_rank, self.evaluation.credit)
        return found

    def _given_batches(self) -> Iterable[Any] | None:
        return self._held_out() if callable(self._held_out) else self._held_out


def first_of(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """The first ``count`` at most, of a loader that is to notice that no more are wanted."""
    iterator = iter(batches)
    yield from islice(iterator, count)
    if hasattr(iterator, "close"):
        iterator.close()
    if hasattr(batches, "gradient_state"):  # accelerate's count as being walked through until their end
        batches.end()


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Without what a loop's own logger could not write as JSON."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
