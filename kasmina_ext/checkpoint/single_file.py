"""One safetensors file that says itself what it holds, for small things: it appears whole or not at all, and reading it
believes nothing.

Beside the tensors it has text, in the place that the format gives to metadata, and there ``sha256``: the hash of what the
file would be without that entry. This finds damage; it does not prove who wrote it. The header that is read must be the
one that would be written for what it says, to the byte: see :mod:`kasmina_ext.checkpoint.tensor_file`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from kasmina_ext.checkpoint.content import ContentError, from_text
from kasmina_ext.checkpoint.errors import CheckpointSaveError
from kasmina_ext.checkpoint.files import NewFile, sync_directory
from kasmina_ext.checkpoint.tensor_file import (
    Table,
    TensorFileError,
    bytes_in,
    bytes_of,
    check_values,
    filled,
    header_of,
    table_from_json,
    table_of,
)

MAX_BYTES = 1 << 30
"""Larger ones are refused unread, and not written: all of a file is held in memory, twice."""
_SHA256 = "sha256"
_LENGTH = 8  # bytes that say how long the header is


# ---- writing -------------------------------------------------------------------------------------


def write(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """The file, on the disk when this returns; one that was there is replaced at once, and kept if anything fails.

    ValueError beyond MAX_BYTES, TypeError for tensors that the format lacks;
    :class:`~kasmina_ext.checkpoint.CheckpointSaveError` for what the system refuses.
    """
    table = table_of(tensors)
    size = bytes_of(table) + len(header_of(table, metadata)) + 256
    if size > MAX_BYTES:
        raise ValueError(f"{path} would have {size} bytes, at most {MAX_BYTES} are read back")
    body = b"".join(bytes_in(table, tensors, name) for name in table)
    header = header_of(table, {**metadata, _SHA256: _hash(table, metadata, body)})
    with _replaced(path) as file:
        file.write(header)
        file.write(body)


def _hash(table: Table, metadata: Mapping[str, str], body: bytes | memoryview) -> str:
    digest = hashlib.sha256(header_of(table, metadata))
    digest.update(body)
    return digest.hexdigest()


@contextmanager
def _replaced(path: Path) -> Iterator[NewFile]:
    """A file to fill, which takes the place of ``path`` when it is on the disk."""
    aside = path.with_name(f".saving-{secrets.token_hex(8)}")
    try:
        try:
            with NewFile(aside) as file:
                yield file
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise
        sync_directory(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointSaveError(error.errno, f"saving {path} failed: {reason}", error.filename) from error


# ---- reading -------------------------------------------------------------------------------------


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor], int]:
    """Metadata, tensors on the CPU, and the file's size. :class:`TensorFileError` for what :func:`write` has not written,
    OSError for what the system refuses.
    """
    data = memoryview(_content(path))
    header = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    if not _LENGTH < header <= len(data):
        raise TensorFileError("is cut off, or no safetensors file")
    metadata, table = _parsed(bytes(data[_LENGTH:header]))
    promised = metadata.pop(_SHA256, None)
    if promised is None:
        raise TensorFileError("is not of this package")
    if header_of(table, {**metadata, _SHA256: promised}) != data[:header]:
        raise TensorFileError("its header is not as this package writes it")
    body = data[header:]
    if len(body) != bytes_of(table):
        raise TensorFileError(f"has {len(data)} bytes, its tensors need {header + bytes_of(table)}")
    if promised != _hash(table, metadata, body):
        raise TensorFileError("its sha256 is not the one that it names")
    place = 0

    def read_into(view: memoryview) -> None:
        nonlocal place
        view[:] = body[place : place + len(view)]
        place += len(view)

    tensors = filled(table, read_into)
    check_values(tensors)
    return metadata, tensors, len(data)


def _content(path: Path) -> bytes:
    # O_NONBLOCK: a fifo under that name must not make a reader wait for ever.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise TensorFileError("is a directory" if stat.S_ISDIR(facts.st_mode) else "is no regular file")
        if facts.st_size > MAX_BYTES:
            raise TensorFileError(f"has {facts.st_size} bytes, at most {MAX_BYTES} are read")
        with open(fd, "rb", closefd=False) as file:
            return file.read(facts.st_size)
    finally:
        os.close(fd)


def _parsed(text: bytes) -> tuple[dict[str, str], Table]:
    try:
        entries = from_text(text)
    except ContentError as error:
        raise TensorFileError(f"its header {error}") from None
    if not isinstance(entries, dict):
        raise TensorFileError("its header is no object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError("its metadata are not text")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.pop("data_offsets", None) is None:
            raise TensorFileError(f"tensor {name!r} has no place in it")
    return metadata, table_from_json(entries)
