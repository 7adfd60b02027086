"""One checkpoint: a directory of three files.

=========================  ========================================================================
``metadata.json``          ASCII JSON: ``format``, ``version``, ``checkpoint_id``; the header's fields,
                           and ``header``, their names; the content's fields, where a tensor is a name
                           (:mod:`kasmina_ext.checkpoint.content`); ``tensors``, dtype and shape of
                           each; ``files``, size and sha256 of every other file
``tensors.safetensors``    the tensors
``checksum``               the sha256 of ``metadata.json``, 64 hexadecimal digits
=========================  ========================================================================

Reading follows that chain: ``checksum`` vouches for ``metadata.json``, which vouches for the tensors. Nothing is
parsed before its hash was compared, and nothing is handed out before all is verified. This finds damage; it does not
prove who wrote a checkpoint. Nothing in it can run code, whoever wrote it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kasmina_ext.checkpoint.content import (
    JSON,
    MAX_VALUES,
    ContentError,
    Decoder,
    Encoder,
    exact_text,
    from_text,
    to_text,
    values_in,
)
from kasmina_ext.checkpoint.errors import CheckpointDamaged, CheckpointVersionError
from kasmina_ext.checkpoint.files import NewFile, OpenDirectory, checked_id, new_directory
from kasmina_ext.checkpoint.forks import without_lost_threads
from kasmina_ext.checkpoint.tensor_file import (
    Progress,
    Table,
    TensorFileError,
    check_values,
    meta_tensors,
    read_tensors,
    table_from_json,
    table_of,
    table_to_json,
    write_tensors,
)

FORMAT = "kasmina_ext.checkpoint"
VERSION = 3
"""1 and 2 are the Triton package's (:mod:`kasmina_ext.checkpoint.legacy`)."""

METADATA, TENSORS, CHECKSUM = "metadata.json", "tensors.safetensors", "checksum"
FILES = (CHECKSUM, METADATA, TENSORS)
MAX_METADATA_BYTES = 64 << 20
"""A larger metadata file is refused unread, and not written."""

Check = Callable[[dict[str, Any], dict[str, Any]], object]
"""Called with header and content before the tensors are read; raises what it does not like."""

_OWN = frozenset({"format", "version", "checkpoint_id", "header", "tensors", "files"})


# ---- writing -------------------------------------------------------------------------------------


@without_lost_threads()
def write(
    root: Path,
    checkpoint_id: str,
    header: Mapping[str, JSON],
    content: Mapping[str, Any],
    *,
    progress: Progress | None = None,
) -> None:
    """Save ``content`` as ``root / checkpoint_id``, which appears when all of it is on the disk.

    ``header`` is small: it is what a list of checkpoints shows. ``content`` is a dict whose values are
    what :meth:`~kasmina_ext.checkpoint.content.Encoder.encode` takes: JSON with tensors, tuples, NaN and
    any keys. Its keys may not be the header's nor the format's own. Tensors may be on any device; they
    come back as plain ones on the CPU.

    ValueError and TypeError (naming the value) for what cannot be saved, before anything is written;
    :class:`CheckpointSaveError` for what the system refuses.
    """
    root = Path(root)
    checked_id(checkpoint_id)
    header, encoder = dict(header), Encoder()
    _check_names(header, content)
    fields = {name: encoder.encode(value, name) for name, value in header.items()}
    if encoder.tensors:
        raise TypeError(f"the header holds the tensor {next(iter(encoder.tensors))}; tensors belong to the content")
    fields |= {str(name): encoder.encode(value, name) for name, value in content.items()}
    table = table_of(encoder.tensors)
    metadata: dict[str, JSON] = {"format": FORMAT, "version": VERSION, "checkpoint_id": checkpoint_id}
    metadata |= {"header": list(header), **fields, "tensors": table_to_json(table)}
    _check_size(to_text(metadata), checkpoint_id)
    with new_directory(root, checkpoint_id) as path:
        with NewFile(path / TENSORS) as file:
            write_tensors(file, table, encoder.tensors, progress)
        metadata["files"] = {TENSORS: {"size": file.size, "sha256": file.sha256}}
        text = to_text(metadata)
        with NewFile(path / METADATA) as file:
            file.write(text)
        with NewFile(path / CHECKSUM) as file:
            file.write(hashlib.sha256(text).hexdigest().encode())


def _check_names(header: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    if not isinstance(content, Mapping):
        raise TypeError(f"content must be a dict, got {type(content).__name__}")
    for name in [*header, *content]:
        if not isinstance(name, str) or name.startswith("$") or name in _OWN:
            raise ValueError(f"{name!r} cannot be the name of a field")
        exact_text(name, "the name of a field")
    both = header.keys() & content.keys()
    if both:
        raise ValueError(f"header and content both have {sorted(both)[0]!r}")


def _check_size(text: bytes, checkpoint_id: str) -> None:
    size = len(text) + 256  # with what is known of the files only when they are written
    if size > MAX_METADATA_BYTES:
        raise ValueError(
            f"the metadata of checkpoint {checkpoint_id} would have {size} bytes, at most {MAX_METADATA_BYTES} "
            "are read back: put large data into tensors"
        )
    count = values_in(text) + 16
    if count > MAX_VALUES:
        raise ValueError(
            f"checkpoint {checkpoint_id} would have {count} values, at most {MAX_VALUES} are read back: put many "
            "numbers into tensors"
        )


# ---- reading -------------------------------------------------------------------------------------


def read(
    root: Path, checkpoint_id: str, *, max_bytes: int | None = None, check: Check | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(header, content)`` as they were given to :func:`write`; tensors on the CPU.

    All is verified before anything is returned. ``max_bytes`` bounds the file of tensors, which is
    refused unread above it. ``check`` is called with header and content before any tensor is read, when
    only the metadata are verified: the content's tensors are on the device "meta", with dtype and shape
    but without memory. What it raises is raised. :class:`InvalidCheckpointId`, :class:`CheckpointNotFound`,
    :class:`CheckpointVersionError`, and :class:`CheckpointDamaged` naming file and reason.
    """
    with OpenDirectory(Path(root), checkpoint_id) as directory:
        return read_from(directory, max_bytes=max_bytes, check=check)


def read_from(
    directory: OpenDirectory, *, max_bytes: int | None = None, check: Check | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """:func:`read` of a directory that is open."""
    metadata = _verified_metadata(directory)
    extra = [name for name in directory.names() if name not in FILES]
    if extra:
        raise directory.damaged(extra[0], "does not belong to a checkpoint")
    table = _verified_table(directory, metadata)
    if check is not None:
        try:
            preview = meta_tensors(table)
        except TensorFileError as error:
            raise directory.damaged(METADATA, str(error)) from None
        check(*_decoded(directory, metadata, preview))
    return _decoded(directory, metadata, _verified_tensors(directory, metadata, table, max_bytes))


def _decoded(
    directory: OpenDirectory, metadata: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    decoder = Decoder(tensors)
    try:
        header = {name: decoder.decode(metadata[name]) for name in metadata["header"]}
        content = {n: decoder.decode(v) for n, v in metadata.items() if n not in _OWN and n not in header}
        decoder.finish()
    except ContentError as error:
        raise directory.damaged(METADATA, str(error)) from None
    return header, content


def read_header(directory: OpenDirectory) -> dict[str, Any]:
    """The header alone, with ``version`` and ``size`` (bytes of the tensors' file): the metadata are verified, the tensors
    are not looked at.
    """
    metadata = _verified_metadata(directory)
    try:
        header = {name: Decoder({}).decode(metadata[name]) for name in metadata["header"]}
    except ContentError as error:
        raise directory.damaged(METADATA, str(error)) from None
    return {**header, "version": metadata["version"], "size": metadata["files"][TENSORS]["size"]}


def _verified_metadata(directory: OpenDirectory) -> dict[str, Any]:
    checksum = directory.read(CHECKSUM, 64)
    text = directory.read(METADATA, MAX_METADATA_BYTES)
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise directory.damaged(METADATA, f"its sha256 is not the one in {CHECKSUM}")
    try:
        metadata = from_text(text)
    except ContentError as error:
        raise directory.damaged(METADATA, str(error)) from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise directory.damaged(METADATA, "is not of this package")
    version = metadata.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointVersionError(
            directory.checkpoint_id, METADATA, f"has version {str(version)[:40]}, this package reads {VERSION}"
        )
    problem = _problem_with_fields(metadata, directory.checkpoint_id)
    if problem:
        raise directory.damaged(METADATA, problem)
    return metadata


def _problem_with_fields(metadata: dict[str, Any], checkpoint_id: str) -> str:
    missing = sorted(_OWN - metadata.keys())
    if missing:
        return f"has no field {missing[0]!r}"
    if metadata["checkpoint_id"] != checkpoint_id:
        return f"is of checkpoint {str(metadata['checkpoint_id'])[:140]!r}"
    names = metadata["header"]
    if not isinstance(names, list) or not all(isinstance(n, str) and n in metadata and n not in _OWN for n in names):
        return "names header fields that it does not have"
    if len(set(names)) != len(names):
        return "names a header field twice"
    if any(name.startswith("$") for name in metadata):
        return "has a field whose name starts with $"
    files = metadata["files"]
    if not isinstance(files, dict) or files.keys() != {TENSORS}:
        return f"does not describe {TENSORS} alone"
    entry = files[TENSORS]
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"} or type(entry["size"]) is not int:
        return f"does not tell size and sha256 of {TENSORS}"
    return ""


def _verified_table(directory: OpenDirectory, metadata: dict[str, Any]) -> Table:
    try:
        return table_from_json(metadata["tensors"])
    except TensorFileError as error:
        raise directory.damaged(METADATA, str(error)) from None


def _verified_tensors(
    directory: OpenDirectory, metadata: dict[str, Any], table: Table, max_bytes: int | None
) -> dict[str, Tensor]:
    promised = metadata["files"][TENSORS]
    with directory.open(TENSORS) as file:
        if file.size != promised["size"]:
            raise directory.damaged(TENSORS, f"has {file.size} bytes, {METADATA} promises {promised['size']}")
        if max_bytes is not None and file.size > max_bytes:
            raise directory.damaged(TENSORS, f"has {file.size} bytes, at most {max_bytes} are read")
        try:
            tensors = read_tensors(file, table)
            if file.sha256 != promised["sha256"]:
                raise TensorFileError(f"its sha256 is not the one in {METADATA}")
            check_values(tensors)
        except TensorFileError as error:
            raise directory.damaged(TENSORS, str(error)) from None
    return tensors


__all__ = ["CheckpointDamaged", "FORMAT", "VERSION", "read", "read_header", "write"]
