"""Saving and loading in the fork of a process: it has one thread, whatever its parent had."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_only_thread: int | None = None  # of a fork; None in any other process


def _after_fork() -> None:
    global _only_thread
    _only_thread = threading.get_ident()


if hasattr(os, "register_at_fork"):  # not where processes do not fork
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def without_lost_threads() -> Iterator[None]:
    """Lets torch compute in this thread alone where it would wait for ever for threads that the parent had: in the
    thread that was forked. Threads started since then have helpers of their own.
    """
    if threading.get_ident() != _only_thread or (threads := torch.get_num_threads()) == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
