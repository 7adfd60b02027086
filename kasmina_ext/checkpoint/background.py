"""Saving while training goes on: a snapshot on the device, then one worker thread that copies and writes it."""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from kasmina_ext.checkpoint.content import mapped
from kasmina_ext.checkpoint.forks import without_lost_threads


class PendingSave:
    """A save under way. It is on the disk when :meth:`result` has returned.

    A save that fails without anybody asking for its result is told by a warning, at the next save or
    when the process ends.
    """

    def __init__(self, checkpoint_id: str, future: Future[str]) -> None:
        self.id = checkpoint_id
        self._future, self._process, self._asked = future, os.getpid(), False
        self._copy: Future[str] | None = None
        future.add_done_callback(self._keep_a_copy)

    def _keep_a_copy(self, future: Future[str]) -> None:
        """For forks: of the future itself, a thread that they do not have may hold the lock."""
        self._copy = _finished(future.result)

    def _future_here(self) -> Future[str] | None:
        """None in a fork that was made before the save had ended."""
        return self._future if self._process == os.getpid() else self._copy

    def done(self) -> bool:
        """Whether it has ended, well or not. Does not wait. A fork of the process knows only what was when it was forked."""
        future = self._future_here()
        return future is not None and future.done()

    def result(self, timeout: float | None = None) -> str:
        """The identifier, when the checkpoint is whole and durable. Raises what went wrong with the save; TimeoutError
        after ``timeout`` seconds, and the save goes on; RuntimeError in a fork of the process that saves.
        """
        future = self._future_here()
        if future is None:
            raise RuntimeError(f"checkpoint {self.id} is being saved by process {self._process}, not by its fork")
        try:
            saved = future.result(timeout)
        except BaseException:
            self._asked = self._asked or self.done()
            raise
        self._asked = True
        return saved

    def __repr__(self) -> str:
        state, future = "under way", self._future_here()
        if future is not None and future.done():
            state = "saved" if future.exception() is None else f"failed: {future.exception()}"
        return f"PendingSave({self.id!r}, {state})"


class _Worker:
    """One thread for all saves of a process, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._watched: list[PendingSave] = []

    def submit(self, checkpoint_id: str, save: Callable[[], str]) -> PendingSave:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, "kasmina-checkpoint")
            try:
                future = self._executor.submit(save)
            except RuntimeError:  # the interpreter is shutting down and starts no thread: here and now, then
                future = _finished(save)
            pending = PendingSave(checkpoint_id, future)
            self._watched.append(pending)
        return pending

    def wait(self) -> None:
        wait([pending._future for pending in self._watched])

    def report(self) -> None:
        """Warn of saves that failed while nobody looked; forget those that have ended."""
        with self._lock:
            ended = [pending for pending in self._watched if pending.done()]
            self._watched = [pending for pending in self._watched if pending not in ended]
        for pending in ended:
            error = pending._future.exception()
            if error is not None and not pending._asked:
                text = f"checkpoint {pending.id} was not saved: {type(error).__name__}: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=4)


def _finished(save: Callable[[], str]) -> Future[str]:
    future: Future[str] = Future()
    try:
        future.set_result(save())
    except BaseException as error:
        future.set_exception(error)
    return future


_worker = _Worker()


def _after_fork() -> None:
    """The thread is the parent's, and so is what it has still to save."""
    global _worker
    _worker = _Worker()


if hasattr(os, "register_at_fork"):  # not where processes do not fork
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _at_exit() -> None:
    """The executor's thread has been waited for by now: that happens before functions like this one are called."""
    _worker.report()


def save_in_background(checkpoint_id: str, save: Callable[[], str]) -> PendingSave:
    """Have the worker thread call ``save``. Saves are done one after the other, in order; the process's normal end
    waits for all of them.
    """
    return _worker.submit(checkpoint_id, save)


def report_failures() -> None:
    """Warn of earlier saves in the background that failed and were never asked for."""
    _worker.report()


def wait_for_saves() -> None:
    """Until all saves in the background have ended, well or not."""
    _worker.wait()


class Snapshot:
    """``content``, dicts, lists and tuples with tensors in them, as it is now: copies on the tensors' own devices.

    On CUDA nothing waits: the copies are made by the current streams, in order with all that is asked
    of them before and after.
    """

    @without_lost_threads()
    def __init__(self, content: Any) -> None:
        # Not where CUDA was not used yet: to ask would start it, which costs a second, and fails in a fork.
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a checkpoint cannot be saved while a CUDA graph is captured")
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        with torch.no_grad():
            self._content = mapped(content, lambda tensor: tensor.detach().clone())
        mapped(self._content, self._mark)

    def _mark(self, tensor: Tensor) -> None:
        if tensor.is_cuda and tensor.device not in self._copied:
            self._copied[tensor.device] = torch.cuda.current_stream(tensor.device).record_event()

    @without_lost_threads()
    def on_host(self) -> Any:
        """All tensors on the CPU, through streams of their own and pinned memory; waits for them. Once only."""
        streams = {device: torch.cuda.Stream(device) for device in self._copied}
        for device, stream in streams.items():
            stream.wait_event(self._copied[device])

        def moved(tensor: Tensor) -> Tensor:
            if not tensor.is_cuda:
                return tensor.cpu()
            with torch.cuda.stream(streams[tensor.device]):
                return tensor.to("cpu", non_blocking=True)

        content = mapped(self._content, moved)
        for stream in streams.values():
            stream.record_event().synchronize()
        self._content = None  # only now may the copies' memory be used for anything else
        return content
