"""Tests that run in two processes at once, with a process group between them.

    @in_two_ranks
    def test_something(rank: Rank) -> None:
        ...

runs the body in rank 0 and in rank 1: as gloo processes on the CPU, and as NCCL processes with a GPU each where there are
two. Processes are slow to start, so one pair serves all tests, whatever their files; after a failure, or when a rank
hangs, the next test gets a new pair.
"""

from __future__ import annotations

import atexit
import datetime
import faulthandler
import functools
import importlib
import multiprocessing
import os
import random
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

RANKS = 2
COLLECTIVE_SECONDS = 30
TEST_SECONDS = 90


@dataclass(frozen=True)
class Rank:
    """What a test's body gets."""

    index: int
    device: torch.device
    folder: Path
    """The test's own, shared by the ranks."""

    @property
    def first(self) -> bool:
        return self.index == 0

    def same(self, tensor: torch.Tensor) -> bool:
        """Whether every rank has the same bits."""
        everyone = [None] * RANKS
        dist.all_gather_object(everyone, tensor.detach().cpu())
        return all(torch.equal(each.nan_to_num(7.25), everyone[0].nan_to_num(7.25)) for each in everyone)


def in_two_ranks(body: Callable[[Rank], None]) -> Callable:
    """A test of both kinds of devices."""

    @pytest.mark.parametrize(
        "device",
        [
            "cpu",
            pytest.param(
                "2 x cuda",
                marks=pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="fewer than two CUDA devices"),
            ),
        ],
    )
    def test(device: str, tmp_path: Path) -> None:
        _pair(device).run(body.__module__, body.__name__, tmp_path)

    test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
    test.body = body
    return test


# ---- in pytest's process ---------------------------------------------------------------------------------------------


class _Pair:
    def __init__(self, device: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="two_ranks_")
        self.ends: list[Connection] = []
        self.processes = []
        for index in range(RANKS):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_serve, args=(index, device, f"{self.folder.name}/store", theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def run(self, module: str, name: str, folder: Path) -> None:
        for end in self.ends:
            end.send((module, name, str(folder)))
        waiting = dict(enumerate(self.ends))
        problems = []
        seconds = TEST_SECONDS
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout=seconds)
            if not ready:
                if not problems:
                    problems.append(f"ranks {list(waiting)} hang; their stacks are in the captured stderr")
                break
            for index in [index for index, end in waiting.items() if end in ready]:
                try:
                    problem = waiting.pop(index).recv()
                except EOFError:
                    self.processes[index].join(1)
                    problem = f"the process ended with code {self.processes[index].exitcode}"
                if problem:
                    problems.append(f"---- rank {index} ----\n{problem}")
                    seconds = 2  # the other one probably waits for it
        if problems:
            self.close()
            pytest.fail("\n".join(problems), pytrace=False)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()
        _pair.cache_clear()


@functools.cache
def _pair(device: str) -> _Pair:
    pair = _Pair(device)
    atexit.register(pair.close)
    return pair


# ---- in each rank ----------------------------------------------------------------------------------------------------


def _serve(index: int, device: str, store: str, end: Connection) -> None:
    """Run bodies by name and answer with what went wrong, "" if nothing did."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if device == "cpu":
        backend, own = "gloo", torch.device("cpu")
    else:
        backend, own = "nccl", torch.device("cuda", index)
        torch.cuda.set_device(own)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=index,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    while True:
        try:
            module, name, folder = end.recv()
        except EOFError:  # the tests are over
            os._exit(0)
        faulthandler.dump_traceback_later(TEST_SECONDS - 5)
        random.seed(0)
        torch.manual_seed(0)
        try:
            getattr(importlib.import_module(module), name).body(Rank(index, own, Path(folder)))
            problem = ""
        except BaseException:
            problem = traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        end.send(problem)
