"""Growing under Lightning: ``Trainer(callbacks=[GrowthCallback(budget=0.1, loss_fn=...)])``.

For ``lightning`` and for ``pytorch_lightning``: for the one that is imported already, or else the one that is installed.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_ext.distributed import prepare_ddp
from kasmina_ext.extras import missing_extra
from kasmina_ext.integrations.loop import GrowthLoop, finite
from kasmina_ext.layer import KasminaLayer

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> list[type]:
    imported = [getattr(sys.modules.get(name), "Callback", None) for name in _PACKAGES]
    found = [kind for kind in imported if kind is not None]
    problem: ImportError | None = None
    for name in _PACKAGES:
        if found:
            break
        try:
            found = [importlib.import_module(name).Callback]
        except ImportError as error:
            problem = problem or error
    if not found:
        raise missing_extra("kasmina_ext.integrations.lightning", "lightning", "lightning") from problem
    return found


class GrowthCallback(GrowthLoop, *_callback_classes()):
    """Grows a LightningModule while it is fitted; arguments as in :class:`~kasmina_ext.integrations.loop.GrowthLoop`.

    .. code-block:: python

        grow = GrowthCallback(
            loss_fn=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="none"),
            budget=0.1, tick_every=50, sinks=[TensorBoardSink("runs")],
        )
        Trainer(callbacks=[grow]).fit(module, train_loader, val_loader)

    * It ticks once for each step of the optimizer that trains the blueprints, when the batch it was made in
      is over: with gradient accumulation, and under manual optimization too (then the controller is told a
      loss if ``training_step`` returns one). Steps that a gradient scaler skips do not count.
    * Seeds are judged at the end of each validation in ``fit``, by ``loss_fn`` on the batches of the first
      validation loader, or of ``eval_set``, its number or key. There is no judging without ``loss_fn``.
    * ``self.log`` gets ``seeds_alive`` every ``log_every`` steps, and ``seeds_*`` after each judging: for loggers and for
      EarlyStopping.
    * The controller's state is in every checkpoint, and ``fit(ckpt_path=...)`` goes on with it.
    * Under DDP, telemetry stays each rank's own for layers that are there before ``configure_model``; call
      :func:`kasmina_ext.prepare_ddp` at the end of that for others.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._saved: Mapping[str, Any] | None = None
        self._steps = 0
        self._hook: Any = None
        self._told = False

    # ---- beginning and end -------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        layers = any(isinstance(module, KasminaLayer) for module in pl_module.modules())
        if stage == "fit" and trainer.world_size > 1 and layers:
            prepare_ddp(pl_module)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._begin(pl_module, trainer.optimizers, self._saved)
        self._saved = None
        self._remove_hook()
        optimizer = self.controller.optimizer
        if optimizer is None:
            raise ValueError("there is no optimizer to count the steps of: none trains the seeds' blueprints")
        self._hook = optimizer.register_step_post_hook(self._count)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self._remove_hook()
        self._end(trainer.is_global_zero)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        self._remove_hook()
        if trainer.is_global_zero:
            self._close_sinks()

    def _count(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self._steps += 1

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._steps = None, 0

    # ---- training ----------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning has divided it by the number of batches of a step.
            self._add_loss(loss * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1))
        steps, self._steps = self._steps, 0
        for left in reversed(range(steps)):
            # Of several steps in one batch, the last is told the loss.
            self._stepped(self._loss_of_step() if not left else None, trainer.is_global_zero)
            if self.controller.steps % self._log_every == 0:
                self._log(pl_module, {"seeds_alive": self._alive()})
            if self._is_due:
                found = self._judge_on(trainer, pl_module, self._given_batches(), 0)
                self._log(pl_module, found)
        if steps:
            self._forget_losses()

    def _loss_of_step(self) -> Tensor | float | None:
        return self._losses / self._num_losses if self._num_losses else None

    def _log(self, pl_module: nn.Module, values: dict[str, float]) -> None:
        pl_module.log_dict({name: float(value) for name, value in finite(values).items()}, batch_size=1)

    # ---- judging -----------------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._evaluate_every is not None:
            return
        if self._loss_fn is None:
            if not self._told:
                warnings.warn("seeds are not judged: GrowthCallback has no loss_fn(module, batch)", stacklevel=2)
            self._told = True
            return
        batches, number = self._given_batches(), 0
        if batches is None:
            batches, number = self._validation_loader(trainer)
        self._log(pl_module, self._judge_on(trainer, pl_module, batches, number))

    def _validation_loader(self, trainer: Any) -> tuple[Iterable[Any], int]:
        """The one to judge on, and its number."""
        loaders = trainer.val_dataloaders
        if isinstance(loaders, Mapping):
            keys = list(loaders)
            key = keys[0] if self._eval_set is None else self._eval_set
            return loaders[key], keys.index(key)
        if isinstance(loaders, Sequence):
            return loaders[self._eval_set or 0], self._eval_set or 0
        return loaders, 0

    def _judge_on(self, trainer: Any, pl_module: nn.Module, batches: Iterable[Any], number: int) -> dict[str, float]:
        def place(batch: Any) -> Any:
            batch = trainer.precision_plugin.convert_input(batch)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=number)

        def loss_fn(module: nn.Module, batch: Any) -> Tensor:
            with trainer.precision_plugin.val_step_context():
                return self._loss_fn(module, batch)

        return self._judge(pl_module, batches, loss_fn, place, trainer.is_global_zero)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._saved is not None:  # loaded, and not begun yet
            return {"controller": self._saved}
        return {} if self.controller is None else {"controller": self.controller.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["controller"]
