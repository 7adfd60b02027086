"""``tensors.safetensors``: written tensor by tensor and hashed on the way, read straight into new tensors.

Any reader of the format opens what is written here. Reading parses nothing: the metadata (already verified) say
which tensors there are, from that follow the exact bytes of the file's own header, and a file with any other header
is refused. Hence overlaps, gaps, unknown types and sizes that overflow never reach arithmetic. The safetensors
library is not asked, since its writer wants NumPy and all of the file in memory.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kasmina_ext.checkpoint.content import JSON, to_text
from kasmina_ext.checkpoint.files import NewFile, OpenFile

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
_LIMIT = 2**62  # bytes: beyond it the format's 64-bit offsets are near

Table = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor, by name, in the file's order."""
Progress = Callable[[int, int], None]
"""Called with the bytes written so far and those of all tensors."""


class TensorFileError(ValueError):
    """A table or a file that no tensors were written as."""


# ---- the table -----------------------------------------------------------------------------------


def table_of(tensors: Mapping[str, Tensor]) -> Table:
    """Of tensors on any device, the widest types first so that all are aligned; TypeError for a kind that the format
    lacks, and for subclasses (sharded, fake, quantized, ... ones), which may have no memory of their own.
    """
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(f"{name} is a {type(tensor).__name__}, which cannot be saved: only plain tensors can")
        if tensor.is_nested:
            raise TypeError(f"{name} is a nested tensor, which cannot be saved")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _NAMES:
            kind = "meta" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")
            if tensor.layout != torch.strided:
                kind = f"{str(tensor.layout).removeprefix('torch.')} {kind}"
            raise TypeError(f"{name} is a tensor of the kind {kind}, which cannot be saved")
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    return {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}


def table_to_json(table: Table) -> JSON:
    return {name: {"dtype": _NAMES[dtype], "shape": list(shape)} for name, (dtype, shape) in table.items()}


def table_from_json(value: JSON) -> Table:
    """:class:`TensorFileError` for anything but a table."""
    if not isinstance(value, dict):
        raise TensorFileError("the tensors are not an object")
    table: Table = {}
    for name, entry in value.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape"}:
            raise TensorFileError(f"tensor {name!r} is not described by dtype and shape")
        dtype, shape = entry["dtype"], entry["shape"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise TensorFileError(f"tensor {name!r} is of the unknown dtype {dtype!r}")
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < _LIMIT for size in shape):
            raise TensorFileError(f"tensor {name!r} has the impossible shape {str(shape)[:80]}")
        table[name] = DTYPES[dtype], tuple(shape)
    if list(table) != sorted(table, key=lambda name: -table[name][0].itemsize):
        raise TensorFileError("the tensors are not in the order of the file")
    bytes_of(table)
    return table


def bytes_of(table: Table) -> int:
    """Of all tensors together; :class:`TensorFileError` beyond what the format can address."""
    total = 0
    for name, (dtype, shape) in table.items():
        total += math.prod(shape) * dtype.itemsize
        # A size of 0 hides all others from the product; torch multiplies them nevertheless.
        if total > _LIMIT or math.prod(filter(None, shape)) > _LIMIT:
            raise TensorFileError(f"tensor {name!r} has the impossible shape {list(shape)[:8]}")
    return total


def header_of(table: Table, metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes before the first tensor: length and JSON of the safetensors header, padded so that tensors are
    aligned. ``metadata`` go where the format has a place for them.
    """
    entries, offset = {} if metadata is None else {"__metadata__": dict(metadata)}, 0
    for name, (dtype, shape) in table.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = to_text(entries)
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


# ---- the file ------------------------------------------------------------------------------------


def write_tensors(file: NewFile, table: Table, tensors: Mapping[str, Tensor], progress: Progress | None = None) -> None:
    """The whole file. Tensors on a device, or strided, are copied one at a time."""
    header, total = header_of(table), bytes_of(table)
    file.write(header)
    for name in table:
        view = bytes_in(table, tensors, name)
        for start in range(0, len(view), _PROGRESS_STEP):
            file.write(view[start : start + _PROGRESS_STEP])
            if progress is not None:
                progress(file.size - len(header), total)


_PROGRESS_STEP = 64 << 20


def bytes_in(table: Table, tensors: Mapping[str, Tensor], name: str) -> memoryview:
    """The contents of a tensor as the file has them."""
    tensor = tensors[name].detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    if (tensor.dtype, tuple(tensor.shape)) != table[name]:
        raise RuntimeError(f"{name} changed while it was saved")
    return _bytes_of(tensor)


def read_tensors(file: OpenFile, table: Table) -> dict[str, Tensor]:
    """New tensors on the CPU. The file's size must be the table's; its hash is for the caller to compare.

    :class:`TensorFileError` where the file is not the table's.
    """
    header, total = header_of(table), bytes_of(table)
    if file.size != len(header) + total:
        raise TensorFileError(f"has {file.size} bytes, its tensors need {len(header) + total}")
    found = bytearray(len(header))
    file.read_into(memoryview(found))
    if found != header:
        raise TensorFileError("its header is not the one of the tensors in metadata.json")
    tensors = filled(table, file.read_into)
    file.expect_end()
    return tensors


def filled(table: Table, read_into: Callable[[memoryview], object]) -> dict[str, Tensor]:
    """New tensors on the CPU, each handed to ``read_into`` to be filled, in the file's order."""
    tensors = {}
    for name, (dtype, shape) in table.items():
        try:
            tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
        except RuntimeError as error:  # too large for this machine, or too many dimensions
            raise TensorFileError(f"tensor {name!r} cannot be made: {str(error)[:200]}") from None
        if tensors[name].numel():
            read_into(_bytes_of(tensors[name]))
    return tensors


def meta_tensors(table: Table) -> dict[str, Tensor]:
    """Of these types and shapes, without memory; :class:`TensorFileError` for what torch cannot make."""
    tensors = {}
    for name, (dtype, shape) in table.items():
        try:
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        except RuntimeError as error:
            raise TensorFileError(f"tensor {name!r} cannot be made: {str(error)[:200]}") from None
    return tensors


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """:class:`TensorFileError` for a bool that is neither 0 nor 1: kernels may do anything with it."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.numel() and tensor.view(torch.uint8).max() > 1:
            raise TensorFileError(f"tensor {name!r} has a bool that is neither 0 nor 1")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which lives as long; without NumPy."""
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(b"")
    if not tensor.data_ptr():
        raise TypeError(f"a tensor of shape {list(tensor.shape)} has no memory of its own")
    memory = (ctypes.c_char * count).from_address(tensor.data_ptr())
    memory.owner = tensor
    return memoryview(memory).cast("B")
