"""Saving while training goes on: what is saved is the moment of the call; nothing waits, nothing is lost, errors are told."""

from __future__ import annotations

import io
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from growing import Run
from test_checkpoint_layer import assert_seeds, same_values, seeds
from test_state_dict import assert_bits, empty, lived, tensors

from kasmina_ext import CheckpointManager
from kasmina_ext.checkpoint import CheckpointSaveError, background, progress


class Gate:
    """Holds every save back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened, self.reached = threading.Event(), threading.Event()
        save = CheckpointManager.save_layer

        def held(*args, **named):
            self.reached.set()
            assert self.opened.wait(60)
            return save(*args, **named)

        monkeypatch.setattr(CheckpointManager, "save_layer", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()
    background.wait_for_saves()


def test_what_is_saved_is_the_moment_of_the_call(device, tmp_path, gate):
    layer = lived(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 5, device=device)).nan_to_num().sum().backward()
    optimizer.step()
    expected, moments = tensors(layer), {k: v.clone() for k, v in optimizer.state[layer.blueprint_weights].items()}
    save = layer.save_checkpoint(checkpoint_dir=tmp_path, include_base=True, optimizer=optimizer, blocking=False)
    assert save.id.startswith("layer_latest_") and not save.done() and "under way" in repr(save)
    with torch.no_grad():  # training goes on
        for tensor in (*layer.parameters(), *layer.buffers(), *optimizer.state[layer.blueprint_weights].values()):
            tensor.zero_()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TimeoutError):
        save.result(timeout=0.01)
    gate.opened.set()
    assert save.result(60) == save.id and save.done() and "saved" in repr(save)
    assert [path.name for path in tmp_path.iterdir()] == [save.id]
    other = empty().to(device)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    other.load_checkpoint(save.id, checkpoint_dir=tmp_path, optimizer=fresh)
    assert_bits(other, expected)
    assert same_values(fresh.state[other.blueprint_weights], moments)


def test_the_controller_goes_with_it(device, tmp_path, gate):
    run, fresh = Run(device=device), Run(device=device)
    run.step(20)
    state = run.control.state_dict()
    save = run.model.first.save_checkpoint(checkpoint_dir=tmp_path, controller=run.control, blocking=False)
    run.step(5)
    gate.opened.set()
    fresh.model.first.load_checkpoint(save.result(), checkpoint_dir=tmp_path, controller=fresh.control)
    assert same_values(fresh.control.state_dict(), state)


def test_ten_saves_are_done_in_order(tmp_path, gate):
    layer = lived()
    layer.checkpoint_dir = tmp_path
    layer.checkpoint_manager.max_checkpoints_per_seed = 20
    saves, expected = [], []
    for errors in range(10):
        layer.extended_state.update_state(0, {"error_count": errors})
        layer.set_alpha(1, errors / 10)
        expected.append(seeds(layer))
        saves.append(layer.save_checkpoint(blocking=False))
    assert gate.reached.wait(60) and not any(save.done() for save in saves)
    gate.opened.set()
    assert saves[-1].result() == saves[-1].id and all(save.done() for save in saves)
    names = [save.id for save in saves]
    assert len(set(names)) == 10
    assert [entry["checkpoint_id"] for entry in layer.checkpoint_manager.list_checkpoints()] == names[::-1]
    other = empty(checkpoint_dir=tmp_path)
    for name, wanted in zip(names, expected, strict=True):
        other.load_checkpoint(name)
        assert_seeds(other, wanted)


def test_loading_waits_for_what_is_under_way(tmp_path, gate):
    layer = lived()
    layer.checkpoint_dir = tmp_path
    expected = seeds(layer)
    save = layer.save_checkpoint(blocking=False)
    layer.reset_parameters()
    threading.Timer(0.05, gate.opened.set).start()
    assert layer.load_checkpoint() == save.id
    assert_seeds(layer, expected)


def test_an_error_is_raised_or_warned_of_once(tmp_path):
    layer = lived()
    layer.checkpoint_dir = tmp_path / "is"
    layer.save_checkpoint(blocking=False).result()
    layer.checkpoint_dir.rename(tmp_path / "was")
    layer.checkpoint_dir.write_text("a file now")
    asked, silent = (layer.save_checkpoint(blocking=False) for _ in range(2))
    for _ in range(2):
        with pytest.raises(CheckpointSaveError, match="saving checkpoint .* failed"):
            asked.result()
    background.wait_for_saves()
    assert silent.done() and "failed" in repr(silent)
    with pytest.warns(RuntimeWarning, match=f"checkpoint {silent.id} was not saved: CheckpointSaveError") as caught:
        layer.save_checkpoint(checkpoint_dir=tmp_path / "other")
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.save_checkpoint(checkpoint_dir=tmp_path / "other", blocking=False).result()
    with pytest.raises(ValueError, match="Invalid tag"):  # what is no argument is told at once
        layer.save_checkpoint("a b", checkpoint_dir=tmp_path / "other", blocking=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_nothing_waits_for_the_device(tmp_path, gate):
    run = Run(device="cuda")
    run.step(20)
    run.control.state_dict()
    run.model.first.save_checkpoint("warm", checkpoint_dir=tmp_path, blocking=False)
    expected = [t.clone() for t in (*run.model.first.buffers(), run.model.first.blueprint_weights)]
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # the device has work for a second
    end = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        save = run.model.first.save_checkpoint(
            checkpoint_dir=tmp_path, controller=run.control, optimizer=run.optimizer, blocking=False
        )
        with torch.no_grad():
            for tensor in (*run.model.first.buffers(), run.model.first.blueprint_weights):
                tensor.zero_()
        end.record()
        assert not end.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gate.opened.set()
    run.model.first.load_checkpoint(save.result(), checkpoint_dir=tmp_path)
    now = [*run.model.first.buffers(), run.model.first.blueprint_weights]
    assert all(torch.equal(one, two) for one, two in zip(now, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"), torch.cuda.graph(graph):
        run.model.first.save_checkpoint(checkpoint_dir=tmp_path, blocking=False)


# ---- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("rich", [True, False])
def test_a_large_save_is_shown_on_a_terminal(tmp_path, monkeypatch, rich, blocking):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "LARGE", 1000)
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    save = lived().save_checkpoint("shown", checkpoint_dir=tmp_path, blocking=blocking)
    if not blocking:
        save.result()
    shown = terminal.getvalue()
    assert "saving layer shown" in shown and ("%" in shown) != rich
    if not rich:
        assert shown.endswith("\r") and shown.rstrip("\r ").endswith("MiB")


def test_nothing_is_shown_of_small_saves_and_where_nobody_looks(tmp_path, monkeypatch):
    terminal, pipe, closed = Terminal(), io.StringIO(), Terminal()
    closed.close()
    monkeypatch.setattr(sys, "stderr", terminal)
    lived().save_checkpoint(checkpoint_dir=tmp_path)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "LARGE", 0)
    for file in (pipe, closed):
        monkeypatch.setattr(sys, "stderr", file)
        lived().save_checkpoint(checkpoint_dir=tmp_path)
    assert pipe.getvalue() == ""


def test_a_line_within_another_display_does_no_harm(tmp_path, monkeypatch):
    from rich.console import Console
    from rich.progress import Progress

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "LARGE", 0)
    with Progress(console=Console(file=terminal)) as bar:
        bar.add_task("training")
        assert Path(tmp_path / lived().save_checkpoint(checkpoint_dir=tmp_path)).is_dir()
