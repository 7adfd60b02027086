"""Threads in tests: torch's own, and several of Python at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """For many tiny steps, where torch's threads would only wait for each other, and for processes that fork."""
    with keep_threads():
        torch.set_num_threads(1)
        yield


@contextmanager
def keep_threads() -> Iterator[None]:
    """Afterwards torch has as many threads as before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def call_in_threads(function: Callable[[], object], workers: int, times: int) -> None:
    """Call ``function`` so many times in each of so many threads at once; raises what a call raised."""
    start, failures = threading.Barrier(workers), []

    def work() -> None:
        try:
            start.wait()
            for _ in range(times):
                function()
        except Exception as error:  # else it would end in the thread, unseen
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
