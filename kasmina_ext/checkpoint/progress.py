"""A line on the terminal while a large save is written: with rich where it is installed, plain otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

LARGE = 256 << 20
"""Bytes; what is smaller is written before anybody can read a line."""
_PERIOD = 0.1  # seconds between two updates


@contextmanager
def progress_of(what: str, file: TextIO | None = None) -> Iterator[SaveProgress]:
    """To be called with ``(bytes done, bytes in all)``; shows nothing for a small save, nor where ``file`` (stderr) is no
    terminal. The line is gone when the block ends.
    """
    progress = SaveProgress(what, sys.stderr if file is None else file)
    try:
        yield progress
    finally:
        progress.close()


class SaveProgress:
    """See :func:`progress_of`."""

    def __init__(self, what: str, file: TextIO | None) -> None:
        self._what, self._file = what, file
        self._line: _PlainLine | _RichLine | None = None
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if total < LARGE or (now < self._next and done < total) or not _is_terminal(self._file):
            return
        self._next = now + _PERIOD
        with suppress(OSError, ValueError):  # a terminal that went away must not cost the save
            if self._line is None:
                self._line = _rich_line(self._what, total, self._file) or _PlainLine(self._what, self._file)
            self._line.show(done, total)

    def close(self) -> None:
        with suppress(OSError, ValueError):
            if self._line is not None:
                self._line.close()


class _PlainLine:
    def __init__(self, what: str, file: TextIO) -> None:
        self._what, self._file, self._width = what, file, 0

    def show(self, done: int, total: int) -> None:
        text = f"saving {self._what}: {100 * done // total} % of {total / 2**20:.0f} MiB"
        self._width = max(self._width, len(text))
        print(f"\r{text}", end="", file=self._file, flush=True)

    def close(self) -> None:
        print("\r" + " " * self._width, end="\r", file=self._file, flush=True)


class _RichLine:
    def __init__(self, bar: Any, what: str, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task(f"saving {what}", total=total)

    def show(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done)

    def close(self) -> None:
        self._bar.stop()


def _rich_line(what: str, total: int, file: TextIO) -> _RichLine | None:
    """None without rich; ValueError where an older rich is drawing something else."""
    try:
        from rich.console import Console
        from rich.errors import LiveError
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=file), transient=True)
    try:
        bar.start()
    except LiveError as error:
        raise ValueError(str(error)) from error
    return _RichLine(bar, what, total)


def _is_terminal(file: TextIO | None) -> bool:
    return file is not None and not file.closed and file.isatty()
