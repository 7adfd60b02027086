"""Reads what the tests want to know of a 64-bit little-endian ELF shared library: needed libraries, paths, symbols."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

_SHT_DYNAMIC, _SHT_DYNSYM, _SHT_SYMTAB = 6, 11, 2
_DT_NEEDED, _DT_RPATH, _DT_RUNPATH, _DT_FLAGS_1 = 1, 15, 29, 0x6FFFFFFB
_DF_1_NOW = 1
_STB_WEAK = 2
_SHN_UNDEF = 0


@dataclass
class SharedLibrary:
    needed: list[str] = field(default_factory=list)
    search_paths: list[str] = field(default_factory=list)  # RPATH and RUNPATH
    binds_at_load: bool = False
    exported: set[str] = field(default_factory=set)
    undefined: set[str] = field(default_factory=set)
    undefined_weak: set[str] = field(default_factory=set)
    stripped: bool = True


def read(path: Path) -> SharedLibrary:
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is no 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count = struct.unpack_from("<HH", data, 0x3A)
    # type, file offset, size, linked section, size of an entry
    sections = []
    for i in range(count):
        header = struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry_size)
        sections.append((header[1], header[4], header[5], header[6], header[9]))
    library = SharedLibrary(stripped=all(section[0] != _SHT_SYMTAB for section in sections))
    for kind, offset, size, link, step in sections:
        strings = sections[link][1] if link < len(sections) else 0
        if kind == _SHT_DYNAMIC:
            for at in range(offset, offset + size, step):
                _read_dynamic(library, data, strings, *struct.unpack_from("<QQ", data, at))
        elif kind == _SHT_DYNSYM:
            for at in range(offset + step, offset + size, step):  # the first entry is empty
                _read_symbol(library, data, strings, *struct.unpack_from("<IBBH", data, at))
    return library


def _read_dynamic(library: SharedLibrary, data: bytes, strings: int, tag: int, value: int) -> None:
    if tag == _DT_NEEDED:
        library.needed.append(_text(data, strings + value))
    elif tag in (_DT_RPATH, _DT_RUNPATH):
        library.search_paths.append(_text(data, strings + value))
    elif tag == _DT_FLAGS_1:
        library.binds_at_load = bool(value & _DF_1_NOW)


def _read_symbol(library: SharedLibrary, data: bytes, strings: int, name: int, info: int, _: int, section: int) -> None:
    symbol = _text(data, strings + name)
    if section != _SHN_UNDEF:
        library.exported.add(symbol)
    elif info >> 4 == _STB_WEAK:
        library.undefined_weak.add(symbol)
    else:
        library.undefined.add(symbol)


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
