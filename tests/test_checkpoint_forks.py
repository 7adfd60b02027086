"""Processes that end, fork or die with saves under way: nothing hangs, nothing is lost, nothing is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from kasmina_ext.checkpoint import CheckpointManager

ROOT = Path(__file__).resolve().parent.parent

# The child shares what the parent's threads held when it was forked; of the threads it has only its own.
PROGRAM = """
import atexit, faulthandler, json, os, sys, threading, warnings
from pathlib import Path
import torch
from torch import nn
from kasmina_ext import CheckpointManager, KasminaLayer

warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # that is the point
root, device = Path(sys.argv[1]), sys.argv[2]
if device == "cuda":
    torch.ones(1, device="cuda").sum().item()
torch.set_num_threads(2)
layer = KasminaLayer(nn.Linear(5, 50_000), num_seeds=50_000, checkpoint_dir=root)
layer.lifecycle_states.double().aminmax()  # by two threads
layer.checkpoint_manager.max_checkpoints_per_seed = 50
gate, save = threading.Event(), CheckpointManager.save_layer
def slow(manager, *args, **named):
    assert gate.wait(60)
    return save(manager, *args, **named)
CheckpointManager.save_layer = slow

def at_exit():  # no thread can be started any more
    print(json.dumps({"late": layer.save_checkpoint("late", blocking=False).result()}), flush=True)
atexit.register(at_exit)

first = layer.save_checkpoint("first", blocking=False)
gate.set()
first.result()
gate.clear()
saves = [layer.save_checkpoint("queued", blocking=False) for _ in range(10)]

locked, forked = threading.Event(), threading.Event()
def looks():  # another thread that asks the same saves
    with first._future._condition, saves[0]._future._condition:
        locked.set()
        forked.wait(60)
looking = threading.Thread(target=looks)
looking.start()
locked.wait(60)

child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(40, exit=True)
    gate = threading.Event()
    gate.set()
    told = {"done": [first.done(), saves[0].done()], "shown": repr(saves[0]), "first": first.result()}
    try:
        saves[0].result()
    except RuntimeError as error:
        told["of the parent"] = str(error)
    layer.alpha[7] = 0.25
    told["own"] = [layer.save_checkpoint("child", blocking=False).result(), layer.save_checkpoint("child")]
    layer.alpha[7] = 0.5
    layer.load_checkpoint("child")
    told["alpha"] = layer.alpha[7].item()
    told["threads"] = torch.get_num_threads()
    print(json.dumps(told), flush=True)
    atexit.unregister(at_exit)
    sys.exit(0)  # as any process ends
faulthandler.dump_traceback_later(80, exit=True)
_, status = os.waitpid(child, 0)
forked.set()
print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
broken = root / "broken"
broken.mkdir()
failing = layer.save_checkpoint(checkpoint_dir=broken, blocking=False)
broken.rmdir()
broken.write_text("")
print(json.dumps({"saves": [save.id for save in saves], "failing": failing.id}), flush=True)
threading.Timer(0.2, gate.set).start()
"""


def test_a_process_that_ends_or_forks_with_saves_under_way(tmp_path, device):
    """It ends when all is written; what failed is told; a fork leaves the parent's saves to the parent, and saves, loads
    and ends like any other process, whatever threads and devices its parent used.
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", PROGRAM, str(tmp_path), device.type],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    said = f"exit code {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
    told = {}
    for line in done.stdout.splitlines():
        told |= json.loads(line)
    assert told.get("status") == 0, f"the child ended with {told.get('status')}; {said}"
    assert done.returncode == 0, said
    assert told["done"] == [True, False] and "under way" in told["shown"], said
    assert "not by its fork" in told["of the parent"] and told["alpha"] == 0.25 and told["threads"] == 2, said
    manager = CheckpointManager(tmp_path)
    wanted = {told["first"], *told["saves"], *told["own"], told["late"]}
    assert len(wanted) == 14 and {e["checkpoint_id"] for e in manager.list_checkpoints()} == wanted, said
    for name in wanted:
        manager.verify(name)
    assert f"RuntimeWarning: checkpoint {told['failing']} was not saved: CheckpointSaveError" in done.stderr, said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], said


def test_saving_does_not_start_cuda(tmp_path):
    """Nothing on a CPU needs it, and a fork of a process that has started it could save nothing."""
    program = """if True:
        import sys, torch
        from torch import nn
        from kasmina_ext import KasminaLayer
        def refuse(*args):
            raise AssertionError("CUDA was asked for")
        for name in ("is_available", "device_count", "_lazy_init", "current_stream", "is_current_stream_capturing"):
            setattr(torch.cuda, name, refuse)
        layer = KasminaLayer(nn.Linear(5, 22), num_seeds=4, checkpoint_dir=sys.argv[1])
        layer.save_checkpoint(include_base=True)
        layer.save_checkpoint(include_base=True, blocking=False).result()
        layer.load_checkpoint()
    """
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_fork_cannot_save_what_is_on_the_parents_gpu(tmp_path):
    program = """if True:
        import os, sys, torch
        from torch import nn
        from kasmina_ext import KasminaLayer
        layer = KasminaLayer(nn.Linear(5, 22, device="cuda"), num_seeds=4, checkpoint_dir=sys.argv[1])
        if not os.fork():
            try:
                layer.save_checkpoint()
            except ValueError as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
        print(layer.save_checkpoint())
    """
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    refused, saved = done.stdout.splitlines()
    assert "is on a GPU that this process cannot use: it was forked" in refused
    CheckpointManager(tmp_path).verify(saved)


def test_a_fork_does_not_keep_what_its_dead_parent_was_writing(tmp_path):
    """A DataLoader's worker, say, forked while a save was under way: it must not hold the lock of the workspace."""
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        writes = threading.Event()

        def never_ends(done, total):
            writes.set()
            threading.Event().wait()

        content = {"w": torch.ones(5)}
        save = CheckpointManager(tmp_path).save_layer
        threading.Thread(target=save, args=("layer", "x", content), kwargs={"progress": never_ends}).start()
        writes.wait(60)
        child = os.fork()
        if not child:
            signal.pause()
        os.write(writing, f"{child}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    child = int(os.read(reading, 100))
    try:
        os.kill(child, 0)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".saving-")]
        saved = CheckpointManager(tmp_path).save_checkpoint("layer", 0, {})
        assert [path.name for path in tmp_path.iterdir()] == [saved]
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reading)
        os.close(writing)
