"""Lightning's callback: a tick for each optimizer step, seeds judged after validation, runs that go on."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from growing import FAST, Run, equal
from models import needs
from threads import one_thread
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kasmina_ext as kx
from kasmina_ext.sinks import JsonlSink, read_jsonl

needs("lightning")

import lightning.pytorch as lightning  # noqa: E402

from kasmina_ext.integrations.lightning import GrowthCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")


class Module(lightning.LightningModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model, self.losses = run.model, []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(kx.param_groups(self, lr=0.05))


class Manual(Module):
    """Two steps a batch, of an optimizer of seeds and one of something else."""

    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> dict[str, Tensor]:
        seeds, other = self.optimizers()
        for optimizer in (seeds, other, seeds):
            optimizer.zero_grad()
            loss = super().training_step(batch, number)
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        self.model.last.requires_grad_()
        return [super().configure_optimizers(), torch.optim.SGD(self.model.last.parameters(), lr=0.01)]


def loss_fn(module: Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    assert not torch.is_inference_mode_enabled()
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


class Told(lightning.Callback):
    """What a callback's controller was told, step by step."""

    def __init__(self, callback: GrowthCallback) -> None:
        self.callback, self.losses = callback, []

    def on_train_start(self, trainer, module):
        step = self.callback.controller.step

        def told(loss=None):
            self.losses.append(None if loss is None else float(loss))
            return step(loss)

        self.callback.controller.step = told


def fitted(folder, *, kind=Module, callback=None, more=(), loaders=1, size=16, ckpt_path=None, run=None, **arguments):
    """A Trainer of what tests/growing.py grows, after ``fit``; with the run, the module and the callback."""
    run = run or Run()
    callback = callback or GrowthCallback(loss_fn=loss_fn, config=FAST, log=run.events.append)
    if getattr(callback, "controller", None) is not run.control:
        run.control = None  # one is enough
    settings = {
        "max_steps": 24,
        "accelerator": "gpu" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 2,
    }
    module = kind(run)
    trainer = lightning.Trainer(**settings | arguments, callbacks=[callback, *more])
    held = [
        DataLoader(TensorDataset(*(torch.cat(part)[number:] for part in zip(*run.held, strict=True))), 10)
        for number in range(loaders)
    ]
    with one_thread():
        train = DataLoader(TensorDataset(*run.train), size)
        trainer.fit(module, train, held if loaders > 1 else held[0], ckpt_path=ckpt_path)
    return SimpleNamespace(trainer=trainer, run=run, grow=callback, module=module)


# ---- steps and losses ------------------------------------------------------------------------------------------------


def test_a_tick_for_each_optimizer_step_with_its_loss(tmp_path):
    """300 samples are 19 batches: 6 steps of 3, and one of the single batch that is left."""
    grow = GrowthCallback(loss_fn=loss_fn, config=FAST)
    told = Told(grow)
    found = fitted(tmp_path, callback=grow, more=[told], accumulate_grad_batches=3, max_steps=9)
    assert grow.controller.steps == grow.controller.ticks == found.trainer.global_step == 9
    losses = found.module.losses
    groups = [losses[i : i + 3] for i in range(0, 18, 3)] + [losses[18:19], losses[19:22], losses[22:25]]
    assert told.losses == pytest.approx([sum(group) / len(group) for group in groups])
    assert grow.controller.optimizer is found.trainer.optimizers[0]


def test_manual_optimization(tmp_path):
    grow = GrowthCallback(config=FAST, loss_fn=loss_fn)
    told = Told(grow)
    found = fitted(tmp_path, kind=Manual, callback=grow, more=[told], max_steps=18, limit_val_batches=0)
    assert found.trainer.global_step == 18, "of both optimizers"
    assert grow.controller.steps == 12 and grow.controller.optimizer is found.trainer.optimizers[0]
    assert told.losses[::2] == [None] * 6 and told.losses[1::2] == pytest.approx(found.module.losses[2::3])


def test_steps_that_are_not_made_do_not_count(tmp_path):
    class Skipping(Module):
        def optimizer_step(self, epoch, number, optimizer, closure):
            if number % 3:
                optimizer.step(closure)
            else:
                closure()

    found = fitted(tmp_path, kind=Skipping, max_steps=9)
    assert found.grow.controller.steps == 6


# ---- judging and logging ---------------------------------------------------------------------------------------------


def test_seeds_are_judged_after_validation(tmp_path):
    class Metrics(lightning.Callback):
        seen = []

        def on_train_batch_end(self, trainer, *rest):
            self.seen.append(dict(trainer.callback_metrics))

    grow = GrowthCallback(
        loss_fn=loss_fn, config=FAST, sinks=[JsonlSink(tmp_path / "seeds.jsonl")], log_every=8, top_k=2
    )
    found = fitted(
        tmp_path, callback=grow, more=[metrics := Metrics()], val_check_interval=8, check_val_every_n_epoch=None
    )
    logged = found.trainer.callback_metrics
    assert logged["seeds_loss"].item() == pytest.approx(grow.evaluation.loss)
    assert logged["val_loss"].item() == pytest.approx(grow.evaluation.loss_before, rel=1e-5), "before the culling"
    assert logged["seeds_culled"].item() == grow.evaluation.culled and "seeds_alive" in logged
    alive = sum(kx.policy.alive_in(layer.lifecycle_states).sum().item() for layer in found.run.model.layers)
    assert grow.evaluation.alive == alive > 0 and found.module.training
    assert [("seeds_loss" in seen) for seen in metrics.seen] == [False] * 8 + [True] * 16
    records = list(read_jsonl(tmp_path / "seeds.jsonl"))
    assert {record["step"] for record in records} == {8, 16, 24}
    assert sum("evaluation" in record.get("event", {}) for record in records) == 3

    lives = [layer.state.clone() for layer in found.run.model.layers]
    found.trainer.validate(found.module, DataLoader(TensorDataset(*found.run.train), 100), verbose=False)
    assert all(torch.equal(layer.state, state) for layer, state in zip(found.run.model.layers, lives, strict=True))


@pytest.mark.parametrize(("which", "batches"), [(None, 10), (2, 10), (1, 10)])
def test_several_validation_loaders(tmp_path, which, batches):
    sizes = []

    def counting(module, batch):
        sizes.append(len(batch[1]))
        return loss_fn(module, batch)

    grow = GrowthCallback(config=FAST, eval_set=which, loss_fn=counting)
    fitted(tmp_path, callback=grow, loaders=3, max_steps=8, val_check_interval=8)
    assert grow.evaluation.credit.batches == batches
    assert set(sizes) == ({10} if which is None else {10, 10 - which})


def test_batches_of_ones_own(tmp_path):
    run = Run()
    grow = GrowthCallback(config=FAST, held_out=run.held, loss_fn=loss_fn, evaluate_every=7, max_batches=3)
    found = fitted(tmp_path, run=run, callback=grow, max_steps=8)
    assert grow.evaluation.credit.batches == 3 and "seeds_loss" in found.trainer.callback_metrics


def test_no_loss_to_judge_by_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"seeds are not judged: GrowthCallback has no loss_fn"):
        found = fitted(tmp_path, callback=GrowthCallback(config=FAST), max_steps=4, val_check_interval=2)
    assert found.grow.evaluation is None and found.grow.controller.ticks == 4
    with pytest.raises(ValueError, match=r"needs a loss_fn\(model, batch\)"):
        GrowthCallback(held_out=[], evaluate_every=3)


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    # After an epoch of 12 batches: a loader without a state cannot go on in the middle of one.
    settings = {"max_steps": 30, "val_check_interval": 6, "enable_checkpointing": True, "size": 25}
    settings["accelerator"] = "cpu"  # where sums are always added in one order

    def saving() -> lightning.Callback:
        return lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True)

    straight = fitted(tmp_path, **settings, more=[saving()])
    path = tmp_path / "step=12.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert saved["GrowthCallback"]["controller"]["steps"] == 12
    resumed = fitted(tmp_path, **settings, more=[saving()], ckpt_path=path)
    assert resumed.module.losses == straight.module.losses[12:]
    assert resumed.run.events == [event for event in straight.run.events if event["step"] > 12] != []
    assert equal(*(list(found.run.model.state_dict().values()) for found in (straight, resumed)))
    moments = [
        [value for state in found.trainer.optimizers[0].state.values() for value in state.values()]
        for found in (straight, resumed)
    ]
    assert equal(*moments)
    one, two = (found.grow.controller.state_dict() for found in (straight, resumed))
    assert torch.equal(one["lives"], two["lives"]) and equal(one["watched"], two["watched"])
    assert [one[name] for name in ("steps", "ticks", "budget")] == [two[name] for name in ("steps", "ticks", "budget")]
    assert two["steps"] == 30


def test_the_state_before_and_after_training():
    grow = GrowthCallback(config=FAST)
    assert grow.state_dict() == {}
    saved = Run().control.state_dict()
    grow.load_state_dict({"controller": saved})
    assert grow.state_dict()["controller"] is saved


def test_fitting_again_goes_on_growing(tmp_path):
    found = fitted(tmp_path, max_steps=5)
    controller = found.grow.controller
    again = fitted(tmp_path, run=found.run, callback=found.grow, max_steps=5)
    assert again.grow.controller is controller and controller.steps == 10
    assert controller.optimizer is again.trainer.optimizers[0]


# ---- other things ----------------------------------------------------------------------------------------------------


def test_ddp_leaves_telemetry_to_each_rank():
    module = Module(Run())
    GrowthCallback().setup(SimpleNamespace(world_size=2), module, "fit")
    assert "model.first.telemetry" in module._ddp_params_and_buffers_to_ignore


def test_an_optimizer_without_seeds(tmp_path):
    class Other(Module):
        def configure_optimizers(self):
            last = self.model.last.requires_grad_()
            return [torch.optim.SGD([p], lr=0.1) for p in last.parameters()]

        automatic_optimization = False

    with pytest.warns(UserWarning, match="no optimizer of this loop"), pytest.raises(ValueError, match="to count"):
        fitted(tmp_path, kind=Other, max_steps=1)


def test_the_other_package_takes_it_too(tmp_path, monkeypatch):
    needs("pytorch_lightning")
    import pytorch_lightning

    monkeypatch.delitem(sys.modules, "kasmina_ext.integrations.lightning")
    both = importlib.import_module("kasmina_ext.integrations.lightning").GrowthCallback
    assert issubclass(both, lightning.Callback) and issubclass(both, pytorch_lightning.Callback)

    class Plain(pytorch_lightning.LightningModule):
        def __init__(self, run: Run) -> None:
            super().__init__()
            self.model, self.losses = run.model, []

        forward, training_step, configure_optimizers = Module.forward, Module.training_step, Module.configure_optimizers

    for kind in (both, GrowthCallback):  # the second is of the first package alone
        run = Run()
        run.control = None
        grow = kind(config=FAST)
        trainer = pytorch_lightning.Trainer(
            max_steps=3,
            callbacks=grow if kind is both else [grow],
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with one_thread():
            trainer.fit(Plain(run), DataLoader(TensorDataset(*run.train), 16))
        assert grow.controller.ticks == 3


def test_what_the_document_shows(tmp_path, monkeypatch):
    needs("tensorboard")
    monkeypatch.chdir(tmp_path)
    document = Path(__file__).resolve().parent.parent / "docs/loops.md"
    [_, block] = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    run = Run()
    for name in ("first", "second"):
        setattr(run.model, name, getattr(run.model, name).base_layer)
    held = TensorDataset(*(torch.cat(part) for part in zip(*run.held, strict=True)))
    names = {"module": Module(run), "held_out_loader": DataLoader(held, 10)}
    names["train_loader"] = DataLoader(TensorDataset(*run.train), 16)
    with one_thread():
        exec(block, names)
    assert names["grow"].evaluation.alive > 0 and list((tmp_path / "runs").iterdir())


def test_without_lightning(monkeypatch):
    name = "kasmina_ext.integrations.lightning"
    monkeypatch.delitem(sys.modules, name)
    for package in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"lightning: pip install kasmina_ext\[lightning\]"):
        importlib.import_module(name)
