"""Growing under transformers' Trainer: ``Trainer(..., callbacks=[GrowthCallback(budget=0.1)])``."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_ext.checkpoint import CheckpointManager, CheckpointNotFound
from kasmina_ext.distributed import prepare_ddp
from kasmina_ext.extras import missing_extra
from kasmina_ext.integrations.loop import GrowthLoop, finite
from kasmina_ext.layer import KasminaLayer

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import send_to_device
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise missing_extra("kasmina_ext.integrations.transformers", "transformers", "transformers") from error

_FOLDER = "growth"  # in a checkpoint
_RUN = "kasmina_ext.GrowthCallback"  # in trainer_state.json


class GrowthCallback(GrowthLoop, TrainerCallback):
    """Grows the model of a :class:`transformers.Trainer`; arguments as in
    :class:`~kasmina_ext.integrations.loop.GrowthLoop`.

    .. code-block:: python

        optimizer = torch.optim.AdamW(kasmina_ext.param_groups(model, lr=1e-3))
        grow = GrowthCallback(budget=0.1, tick_every=50, sinks=[JsonlSink("seeds.jsonl")])
        Trainer(model, arguments, ..., optimizers=(optimizer, None), callbacks=[grow]).train()

    * It ticks after each optimizer step, however many batches that took; not where a gradient scaler skipped
      it. The controller is told the loss that the model returns (of a compiled model, none).
    * Seeds are judged when the Trainer evaluates, on the batches that it evaluates on and by the loss that
      the model returns, if not said otherwise. ``eval_set`` is a key of the Trainer's ``eval_dataset``.
      Metrics have ``eval_seeds_*`` then; they were measured before the judging.
    * ``seeds_alive`` is in the logs of training, and so is what ``evaluate_every`` found: in ``log_history``, and
      for callbacks that come after this one.
      Those of ``report_to`` come before: use ``sinks``, or move this one to the front of
      ``trainer.callback_handler.callbacks``.
    * Each checkpoint has a folder ``growth``, with the state of the controller. ``resume_from_checkpoint`` goes on
      with it; that is looked for in ``output_dir``. Where it lies elsewhere, give this callback
      ``resume_from``, too. FileNotFoundError where it is not there.
    * Under DDP, telemetry stays each rank's own, if the Trainer gets this callback when it is made.
    """

    _has_own_loss = True

    def __init__(self, *arguments: Any, resume_from: str | PathLike[str] | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._resume_from = resume_from
        self._run = ""
        self._training = False
        self._hook: Any = None
        self._is_sum = False
        self._judged_at = -1
        self._news: dict[str, float] = {}

    # ---- beginning and end -------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if args.world_size > 1 and any(isinstance(module, KasminaLayer) for module in model.modules()):
            prepare_ddp(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        self._begin(
            model,
            [optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer],
            self._saved(args, state) if state.global_step else None,
        )
        self._run = uuid.uuid4().hex
        state.stateful_callbacks[_RUN] = {"args": {}, "attributes": {"run": self._run}}
        self._training, self._judged_at = True, -1
        self._remove_hook()
        if args.n_gpu <= 1:  # else the model's replicas run, in threads
            self._hook = model.register_forward_hook(self._see_loss, with_kwargs=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False
        self._remove_hook()
        self._end(state.is_world_process_zero)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # ---- training ----------------------------------------------------------------------------------------------------

    def _see_loss(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
        if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point():
            self._add_loss(loss)
            self._is_sum = kwargs.get("num_items_in_batch") is not None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forget_losses()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            return
        self._stepped(self._loss_of_step(args), state.is_world_process_zero)
        if self._is_due:
            self._news = self._judge_on(args, state, model, self._given_batches())

    def _loss_of_step(self, args: TrainingArguments) -> Tensor | float | None:
        """The mean over the items, if the model was told how many these are; else over the batches."""
        if not self._num_losses:
            return None
        if not self._is_sum:
            return self._losses / self._num_losses
        return self._losses * (args.world_size if args.average_tokens_across_devices else 1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if self._training and "loss" in logs:
            self._put(state, logs, {**self._news, "seeds_alive": self._alive()})
            self._news = {}

    def _put(self, state: TrainerState, logs: dict[str, Any], values: dict[str, float]) -> None:
        """Into what the callbacks after this one see, and into the history."""
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    # ---- judging -----------------------------------------------------------------------------------------------------

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: nn.Module,
        eval_dataloader: Iterable[Any],
        **kwargs: Any,
    ) -> None:
        wanted = self._eval_set is None or f"eval_{self._eval_set}_runtime" in metrics
        if not self._training or not wanted or self._evaluate_every is not None or self._judged_at == state.global_step:
            return
        self._judged_at = state.global_step
        given = self._given_batches()
        found = self._judge_on(args, state, model, eval_dataloader if given is None else given)
        self._put(state, metrics, {f"eval_{name}": value for name, value in found.items()})

    def _judge_on(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, batches: Iterable[Any]
    ) -> dict[str, float]:
        place = partial(send_to_device, device=args.device)
        return finite(self._judge(model, batches, self._loss_fn or loss_of, place, state.is_world_process_zero))

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._training or not args.should_save or args.save_only_model or state.is_hyper_param_search:
            return
        content = {"run": self._run, "step": state.global_step, "controller": self.controller.state_dict()}
        manager = CheckpointManager(_checkpoint(args, state) / _FOLDER, max_checkpoints_per_seed=1)
        manager.save_layer("controller", "latest", content)

    def _saved(self, args: TrainingArguments, state: TrainerState) -> Mapping[str, Any] | None:
        """Of the checkpoint that the Trainer goes on from, which it does not name: known are only its step and its run."""
        known = state.stateful_callbacks.get(_RUN)
        if known is None:
            warnings.warn("this checkpoint was saved without a GrowthCallback: growth begins afresh", stacklevel=3)
            return None
        wanted = (known["attributes"]["run"], state.global_step)
        folders = [self._resume_from, args.resume_from_checkpoint, _checkpoint(args, state)]
        folders = [Path(folder) for folder in folders if isinstance(folder, (str, PathLike))]
        for folder in folders:
            try:
                content = CheckpointManager(folder / _FOLDER).load_layer("latest", "controller")["content"]
            except CheckpointNotFound:
                continue
            if (content.get("run"), content.get("step")) == wanted:
                return content["controller"]
        raise FileNotFoundError(
            f"no state of the controller at step {state.global_step} of this run in {' or '.join(map(str, folders))}: give "
            "GrowthCallback resume_from= the path that the Trainer got as resume_from_checkpoint="
        )


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What the model itself returns as the loss of a batch."""
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output[0]
    if loss is None:
        raise ValueError("the model returns no loss for these batches: give GrowthCallback a loss_fn(model, batch)")
    return loss


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
