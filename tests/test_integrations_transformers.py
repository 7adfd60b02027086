"""The Trainer's callback: a tick for each optimizer step, seeds judged when the Trainer evaluates, runs that go on."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from growing import FAST, Classifier, Run, equal
from models import Size, gpt2, needs, sentences
from threads import one_thread
from torch import Tensor, nn
from torch.nn import functional as F

import kasmina_ext as kx
from kasmina_ext.__main__ import main
from kasmina_ext.sinks import JsonlSink, read_jsonl

needs("transformers", "accelerate")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from kasmina_ext.integrations.transformers import GrowthCallback, loss_of  # noqa: E402

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/loops.md"


class Model(nn.Module):
    """As transformers' models are: the loss among the outputs."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class SumModel(Model):
    """Divides the sum by the number of items of the whole step, which the Trainer tells it."""

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.classifier(x)
        if num_items_in_batch is None:
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch, "logits": logits}


def samples(x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    return [{"x": row, "labels": label} for row, label in zip(x, y, strict=True)]


def trained(folder, *, kind=Model, callback=None, more=(), held=None, resume=None, train=True, run=None, **arguments):
    """A Trainer of what tests/growing.py grows, after training; with the run and the callback."""
    run = run or Run()
    data, held_out = samples(*run.train), samples(*(torch.cat(part) for part in zip(*run.held, strict=True)))
    callback = callback or GrowthCallback(config=FAST, log=run.events.append)
    if getattr(callback, "controller", None) is not run.control:
        run.control = None  # one is enough
    settings = {
        "output_dir": str(folder),
        "max_steps": 24,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 10,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    settings = TrainingArguments(**settings | arguments)
    settings._n_gpu = min(settings.n_gpu, 1)
    optimizer = torch.optim.AdamW(kx.param_groups(run.model, lr=0.05))
    trainer = Trainer(
        kind(run.model),
        settings,
        train_dataset=data,
        eval_dataset=held_out if held is None else held(held_out),
        optimizers=(optimizer, None),
        callbacks=[callback, *more],
    )
    with one_thread():
        if train:
            trainer.train(resume_from_checkpoint=resume)
    return SimpleNamespace(trainer=trainer, run=run, grow=callback, optimizer=optimizer)


class StepsOf(TrainerCallback):
    """What a callback's controller was told, step by step."""

    def __init__(self, callback: GrowthCallback) -> None:
        self.callback, self.losses = callback, []

    def on_train_begin(self, args, state, control, **kwargs):
        step = self.callback.controller.step

        def told(loss=None):
            self.losses.append(None if loss is None else float(loss))
            return step(loss)

        self.callback.controller.step = told


# ---- steps and losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Model, SumModel])
@pytest.mark.parametrize("batches", [1, 3])
def test_a_tick_for_each_optimizer_step_with_the_loss_that_the_trainer_logs(tmp_path, kind, batches):
    """300 samples are 6 steps of 3 batches and one of the single batch that is left, in each epoch."""
    grow = GrowthCallback(config=FAST)
    seen = StepsOf(grow)
    found = trained(
        tmp_path,
        kind=kind,
        callback=grow,
        more=[seen],
        gradient_accumulation_steps=batches,
        max_steps=9,
        logging_nan_inf_filter=False,
    )
    assert grow.controller.steps == grow.controller.ticks == len(seen.losses) == found.trainer.state.global_step == 9
    logged = [record["loss"] for record in found.trainer.state.log_history if "loss" in record]
    if kind is Model and batches == 3:  # the Trainer logs their sum over the number of batches that there should be
        assert seen.losses[:6] == pytest.approx(logged[:6], rel=1e-5)
    else:
        assert seen.losses == pytest.approx(logged, rel=1e-5)
    assert grow.controller.optimizer is found.optimizer


def test_a_model_that_is_compiled_ticks_without_a_loss(tmp_path):
    grow = GrowthCallback(config=FAST)
    seen = StepsOf(grow)
    trained(tmp_path, callback=grow, more=[seen], max_steps=2, torch_compile=True, torch_compile_backend="eager")
    assert seen.losses == [None, None] and grow.controller.ticks == 2


def test_a_step_that_the_scaler_skipped_is_none(tmp_path):
    found = trained(tmp_path, max_steps=2)
    trainer, grow = found.trainer, found.grow
    for skipped, steps in ((True, 2), (False, 3)):
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        grow.on_step_end(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=optimizer)
        assert grow.controller.steps == steps


# ---- judging and logging ---------------------------------------------------------------------------------------------


def test_seeds_are_judged_when_the_trainer_evaluates(tmp_path):
    grow = GrowthCallback(config=FAST, sinks=[JsonlSink(tmp_path / "seeds.jsonl")], log_every=10, top_k=2)
    found = trained(tmp_path, callback=grow, eval_strategy="steps", eval_steps=12)
    history = found.trainer.state.log_history
    judged = [record for record in history if "eval_seeds_culled" in record]
    assert [record["step"] for record in judged] == [12, 24]
    last, evaluation = judged[-1], grow.evaluation
    assert last["eval_seeds_loss"] == evaluation.loss and last["eval_seeds_alive"] == evaluation.alive
    # The same batches and the same loss: what the Trainer measured is the loss before the culling.
    assert last["eval_loss"] == pytest.approx(evaluation.loss_before, rel=1e-5)
    assert all("seeds_alive" in record for record in history if "loss" in record)
    alive = sum(kx.policy.alive_in(layer.lifecycle_states).sum().item() for layer in found.run.model.layers)
    assert last["eval_seeds_alive"] == alive > 0

    records = list(read_jsonl(tmp_path / "seeds.jsonl"))
    assert {record["step"] for record in records} == {10, 12, 20, 24}
    assert sum("evaluation" in record.get("event", {}) for record in records) == 2
    assert {"seeds/classifier.first/state/DORMANT", "seeds/culled"} <= {
        n for r in records for n in r.get("scalars", {})
    }

    lives = [layer.state.clone() for layer in found.run.model.layers]
    found.trainer.evaluate()
    assert grow.evaluation is evaluation, "not in training"
    assert all(torch.equal(layer.state, state) for layer, state in zip(found.run.model.layers, lives, strict=True))


@pytest.mark.parametrize("named", [None, "few"])
def test_several_evaluation_sets_judge_once(tmp_path, named):
    grow = GrowthCallback(config=FAST, eval_set=named, max_batches=5)
    two = {"all": lambda held: held, "few": lambda held: held[:40]}
    found = trained(
        tmp_path,
        callback=grow,
        held=lambda held: {name: take(held) for name, take in two.items()},
        eval_strategy="steps",
        eval_steps=8,
        max_steps=8,
        bf16=True,
    )
    judged = [record for record in found.trainer.state.log_history if "eval_seeds_alive" in record]
    assert len(judged) == 1 and f"eval_{named or 'all'}_loss" in judged[0]
    assert grow.evaluation.credit.batches == (4 if named else 5)
    # accelerate takes none of the loaders that were left early for the one that is walked through.
    loaders = found.trainer.accelerator.gradient_state.dataloader_references
    assert {len(loader.dataset) for loader in loaders if loader is not None} <= {300}


def test_batches_and_a_loss_of_ones_own(tmp_path):
    run, steps = Run(), []

    def loss_fn(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
        steps.append(len(batch[1]))
        return model.classifier.loss(batch)

    grow = GrowthCallback(config=FAST, held_out=lambda: run.held, loss_fn=loss_fn, evaluate_every=7, max_batches=3)
    found = trained(tmp_path, run=run, callback=grow, max_steps=14, eval_strategy="steps", eval_steps=2)
    assert grow.evaluation.credit.batches == 3 and set(steps) == {10}
    history = [record for record in found.trainer.state.log_history if "seeds_loss" in record]
    assert [record["step"] for record in history] == [7, 14] and all("loss" in record for record in history)
    assert not any("eval_seeds_loss" in record for record in found.trainer.state.log_history)


# ---- going on --------------------------------------------------------------------------------------------------------


def curve(found) -> list[dict]:
    timing = ("runtime", "per_second")
    return [
        {name: value for name, value in record.items() if not name.endswith(timing)}
        for record in found.trainer.state.log_history
        if "train_loss" not in record
    ]


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 12, "max_steps": 30}
    settings["use_cpu"] = True  # where sums are always added in one order
    straight = trained(tmp_path, **settings)
    checkpoint = tmp_path / "checkpoint-12"
    [growth] = (checkpoint / "growth").iterdir()
    assert {file.name for file in growth.iterdir()} == {"metadata.json", "tensors.safetensors", "checksum"}

    resumed = trained(tmp_path, **settings, resume=str(checkpoint))
    assert curve(resumed) == curve(straight) and sum("eval_seeds_alive" in record for record in curve(straight)) == 5
    assert resumed.run.events == [event for event in straight.run.events if event["step"] > 12] != []
    moments = [[value for state in f.optimizer.state.values() for value in state.values()] for f in (straight, resumed)]
    assert equal(*moments)
    assert equal(*(list(found.run.model.state_dict().values()) for found in (straight, resumed)))
    one, two = (found.grow.controller.state_dict() for found in (straight, resumed))
    assert torch.equal(one["lives"], two["lives"]) and equal(one["watched"], two["watched"])
    assert [one[name] for name in ("steps", "ticks", "budget")] == [two[name] for name in ("steps", "ticks", "budget")]
    assert two["steps"] == 30

    # Elsewhere: the Trainer does not say where it goes on from.
    moved = tmp_path / "elsewhere"
    shutil.move(checkpoint, moved)
    with pytest.raises(FileNotFoundError, match=r"no state of the controller at step 12 .*resume_from="):
        trained(tmp_path / "other", **settings, resume=str(moved))
    again = trained(
        tmp_path / "other", **settings, resume=str(moved), callback=GrowthCallback(config=FAST, resume_from=moved)
    )
    assert curve(again) == curve(straight)

    # One of another run with the same step and path.
    shutil.copytree(tmp_path / "checkpoint-24", checkpoint)
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": 12}))
    with pytest.raises(FileNotFoundError, match="at step 12 of this run"):
        trained(tmp_path, **settings, resume=str(checkpoint))


def test_a_checkpoint_without_growth(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    trained(tmp_path, **settings, callback=TrainerCallback())
    with pytest.warns(UserWarning, match="saved without a GrowthCallback: growth begins afresh"):
        found = trained(tmp_path, **settings, resume=str(tmp_path / "checkpoint-4"))
    assert found.grow.controller.steps == 2


def test_training_again_goes_on_growing(tmp_path):
    found = trained(tmp_path, max_steps=5)
    controller = found.grow.controller
    with one_thread():
        found.trainer.train()
    assert found.grow.controller is controller and controller.steps == 10


# ---- whose controller, which optimizer -------------------------------------------------------------------------------


def test_a_controller_that_is_given_gets_the_optimizer(tmp_path):
    run = Run()
    run.control.optimizer = None
    found = trained(tmp_path, run=run, callback=GrowthCallback(run.control), max_steps=1)
    assert found.grow.controller is run.control and run.control.optimizer is found.optimizer and run.control.ticks == 1
    made = GrowthCallback(lambda model, optimizer: kx.GrowthController(model.classifier, optimizer, FAST))
    found = trained(tmp_path, callback=made, max_steps=1)
    assert made.controller.names == ["first", "second"] and made.controller.optimizer is found.optimizer


def test_what_would_wear_seeds_away_is_told(tmp_path):
    run = Run()
    found = trained(tmp_path, run=run, train=False)
    found.trainer.optimizer = torch.optim.AdamW(run.banks, lr=0.01, weight_decay=0.1)
    with pytest.warns(UserWarning, match="weight decay wears seeds away: .*param_groups"):
        found.trainer.train()
    found.trainer.optimizer = torch.optim.SGD(run.model.last.requires_grad_().parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="no optimizer of this loop trains"):
        found.trainer.train()


def test_ddp_leaves_telemetry_to_each_rank():
    model = Run().model
    GrowthCallback().on_init_end(SimpleNamespace(world_size=2), None, None, model=model)
    assert "first.telemetry" in model._ddp_params_and_buffers_to_ignore
    GrowthCallback().on_init_end(SimpleNamespace(world_size=2), None, None, model=nn.Linear(2, 2))  # grown later


@pytest.mark.parametrize(
    ("error", "arguments", "says"),
    [
        (TypeError, {"bugdet": 0.1}, "bugdet"),
        (ValueError, {"budget": 2.0}, "budget"),
        (TypeError, {"held_out": iter([])}, "not an iterator"),
        (ValueError, {"evaluate_every": 5}, "needs held_out"),
        (ValueError, {"log_every": 0}, "log_every"),
        (ValueError, {"max_batches": 1}, "max_batches"),
        (TypeError, {"controller": 3}, "must be a GrowthController"),
        (TypeError, {"controller": lambda model, optimizer: None, "budget": 0.1}, "'budget' is for a controller"),
    ],
)
def test_bad_arguments_are_told_at_once(error, arguments, says):
    with pytest.raises(error, match=says):
        GrowthCallback(**arguments)


def test_a_model_without_a_loss():
    model = Model(Run().model)
    assert loss_of(model, {"x": torch.ones(2, 6), "labels": torch.ones(2, dtype=torch.long)}).dim() == 0
    with pytest.raises(ValueError, match=r"the model returns no loss .* loss_fn\(model, batch\)"):
        loss_of(model, {"x": torch.ones(2, 6)})


def test_what_the_document_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [block, *_] = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    size = Size()
    tokens = sentences(24, size.length)
    names = {"model": gpt2(size), "dataset": [{"input_ids": row, "labels": row} for row in tokens]}
    names["held_out"] = names["dataset"][:16]
    with one_thread():
        exec(block.replace('report_to="none"', 'report_to="none", use_cpu=True, disable_tqdm=True'), names)
    assert names["grow"].evaluation.alive > 0 and (tmp_path / "checkpoints/checkpoint-40/growth").exists()
    assert (tmp_path / "growth.jsonl").read_text().count("GERMINATED") > 3
    assert main(["checkpoint", "list", "checkpoints/checkpoint-20/growth"]) == 0


def test_without_transformers(monkeypatch):
    name = "kasmina_ext.integrations.transformers"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers: pip install kasmina_ext\[transformers\]"):
        importlib.import_module(name)
