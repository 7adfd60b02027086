"""A run that was stopped, saved and loaded into new objects goes on bit for bit as if nothing had happened."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from growing import Classifier, Run, equal
from threads import one_thread
from torch import nn
from torch.nn import functional as F

from kasmina_ext import TransitionRules, param_groups

STEPS, EVALUATIONS = 50, (25, 41)
WAYS = ["state_dict", "checkpoints", "background"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny tensors: a second thread only waits, the longer the busier the machine is."""
    with one_thread():
        yield


def to_file_and_back(*states: dict) -> list[dict]:
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def move_on(way: str, old: Run, new: Run, directory: Path) -> None:
    """Save all of ``old`` that a new process needs, then load it into ``new``."""
    if way == "state_dict":
        model, optimizer, control = to_file_and_back(
            old.model.state_dict(), old.optimizer.state_dict(), old.control.state_dict()
        )
        new.model.load_state_dict(model)
        new.optimizer.load_state_dict(optimizer)
        new.control.load_state_dict(control)
    else:
        blocking = way == "checkpoints"
        first, second = ({"controller": run.control, "optimizer": run.optimizer} for run in (old, new))
        saves = [
            layer.save_checkpoint(f"layer{i}", checkpoint_dir=directory, blocking=blocking, **(first if i == 0 else {}))
            for i, layer in enumerate(old.model.layers)
        ]
        if not blocking:
            old.step(3)  # what is trained after the snapshot is not in it
            saves = [save.result() for save in saves]
        for i, (layer, name) in enumerate(zip(new.model.layers, saves, strict=True)):
            layer.load_checkpoint(name, checkpoint_dir=directory, **(second if i == 0 else {}))


def whole(
    device: torch.device, stop_after: int = 0, way: str = "", directory: Path | None = None, used: int = 0
) -> Run:
    """A run with a controller; if it is stopped, what it is loaded into has done ``used`` steps of its own."""
    run = Run(device=device)
    while run.done < STEPS:
        if run.done == stop_after > 0:
            later = Run(device=device)
            later.step(used)
            run.control.state_dict()  # events on their way are written
            events = list(run.events)
            move_on(way, run, later, directory)
            later.events[:] = events
            later.done, run = stop_after, later
        run.step()
        if run.done in EVALUATIONS:
            run.evaluate()
    run.control.state_dict()
    return run


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Run]:
    return {}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after, used", [(7, 0), (28, 12)])
def test_a_controlled_run_goes_on_bit_for_bit(device, uninterrupted, tmp_path, way, after, used):
    """Model, optimizer, controller, telemetry, and every decision with its numbers."""
    if device.type not in uninterrupted:
        uninterrupted[device.type] = whole(device)
    straight = uninterrupted[device.type]
    resumed = whole(device, after, way, tmp_path, used)
    assert len(straight.events) > 40 and resumed.events == straight.events
    assert equal(resumed.bits(), straight.bits())
    one, two = straight.control.state_dict(), resumed.control.state_dict()
    assert one.keys() == two.keys() and one["steps"] == two["steps"] == STEPS
    for name in ("watched", "snapshots"):
        assert equal(flat(one[name]), flat(two[name])), name
    assert torch.equal(one["lives"], two["lives"]) and torch.equal(one["losses"], two["losses"])


def flat(tensors: list) -> list[torch.Tensor]:
    return [each for item in tensors for each in (item if isinstance(item, list) else [item])]


# ---- seeds moved by hand ---------------------------------------------------------------------------------------------


class ByHand:
    """A run whose seeds are moved at random, several times between two steps; the optimizer is told by param_groups."""

    def __init__(self, device: torch.device, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings):
        torch.manual_seed(3)
        self.model = Classifier(schedule="linear").to(device)
        self.optimizer = kind(param_groups(self.model, lr=0.05), **settings)
        self.done = 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            random = torch.Generator().manual_seed(self.done)
            device = self.model.first.device
            x, y = torch.randn(16, 6, generator=random).to(device), torch.randint(3, (16,), generator=random).to(device)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            for layer in self.model.layers:
                for _ in range(3):
                    targets = torch.randint(9, (layer.num_seeds,), generator=random)
                    layer.request_state_transitions(None, targets, rules=TransitionRules.any(), keep_blueprints=True)
                layer.step_lifecycle()
            self.done += 1

    def bits(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value.clone() for value in [*self.model.state_dict().values(), *moments]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("used", [0, 9])
def test_moments_that_are_due_to_be_forgotten_are_forgotten_wherever_the_run_goes_on(device, tmp_path, way, used):
    """A seed that germinates and trains on between two steps leaves no trace in its state."""
    straight = ByHand(device)
    straight.step(9)
    for after in (3, 5):
        old, new = ByHand(device), ByHand(device)
        old.step(after)
        new.step(used)
        model, optimizer = old.model.state_dict(), None
        if way == "state_dict":
            model, optimizer = to_file_and_back(model, old.optimizer.state_dict())
            new.model.load_state_dict(model)
            new.optimizer.load_state_dict(optimizer)
        else:
            blocking = way == "checkpoints"
            for i, (one, two) in enumerate(zip(old.model.layers, new.model.layers, strict=True)):
                options = {"checkpoint_dir": tmp_path, "layer_id": f"layer{i}"}
                save = one.save_checkpoint(optimizer=old.optimizer, blocking=blocking, **options)
                name = save if blocking else save.result()
                two.load_checkpoint(name, optimizer=new.optimizer if i == 0 else None, **options)
        new.done = after
        new.step(9 - after)
        assert equal(new.bits(), straight.bits()), after


def test_a_run_is_taken_back_within_a_process(device, tmp_path):
    """Into the same objects, and several times."""
    run = ByHand(device, torch.optim.SGD, momentum=0.9)
    run.step(4)
    model, optimizer = to_file_and_back(run.model.state_dict(), run.optimizer.state_dict())
    run.step(6)
    expected = run.bits()
    for _ in range(2):
        run.model.load_state_dict(model)
        run.optimizer.load_state_dict(copy.deepcopy(optimizer))  # torch goes on to write into what it was given
        run.done = 4
        run.step(6)
        assert equal(run.bits(), expected)


def test_a_compiled_run_goes_on_bit_for_bit(tmp_path):
    """One graph stays valid when a checkpoint is loaded under it."""
    torch.manual_seed(1)
    model = nn.Sequential(Classifier(schedule="linear").grown())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 6)
    first, second = model[0].layers
    names = [layer.save_checkpoint(f"l{i}", checkpoint_dir=tmp_path) for i, layer in enumerate((first, second))]
    expected = compiled(x)
    for layer in (first, second):
        layer.extended_state.set_state(None, "CULLED")
        layer.set_alpha(None, 0.5)
    assert not torch.equal(compiled(x), expected)
    for layer, name in zip((first, second), names, strict=True):
        layer.load_checkpoint(name, checkpoint_dir=tmp_path)
    assert torch.equal(compiled(x), expected)
