"""csrc/schema.h -> kasmina_ext/_schema.py: the operators' schemas for Python, so that no C source is shipped."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_MACRO = re.compile(r"^[ \t]*#[ \t]*define[ \t]+KASMINA_SCHEMA_([A-Z0-9_]+)[ \t]+(.+)$", re.MULTILINE)
_LITERALS = re.compile(r'(?:"[^"\\\n]*"\s*)+')


def parse(text: str) -> dict[str, str]:
    """Operator name -> schema, in the order of the header; ValueError for a macro that is not string literals.

    A string of a schema holds no quotes and no comment signs, so comments can be dropped first.
    """
    text = _COMMENT.sub(" ", text).replace("\\\n", " ")
    schemas = {}
    for name, body in _MACRO.findall(text):
        if not _LITERALS.fullmatch(body):
            raise ValueError(f"KASMINA_SCHEMA_{name} is not a sequence of string literals: {body}")
        schema = "".join(ast.literal_eval(part) for part in re.findall(r'"[^"]*"', body))
        op = schema.partition("(")[0]
        if op != name.lower():
            raise ValueError(f"KASMINA_SCHEMA_{name} declares {op!r}, expected {name.lower()!r}")
        schemas[op] = schema
    if not schemas:
        raise ValueError("no KASMINA_SCHEMA_ macro found")
    return schemas


def generate(header: Path, module: Path) -> None:
    """Write ``module`` from ``header``; a file that is already right is not touched."""
    lines = ['"""Generated from csrc/schema.h by setup.py."""', "", "SCHEMAS: dict[str, str] = {"]
    lines += [f"    {op!r}: {schema!r}," for op, schema in parse(header.read_text()).items()]
    write_if_changed(module, "\n".join([*lines, "}", ""]))


def write_if_changed(path: Path, text: str) -> None:
    """Write only a text that differs, so that nothing is rebuilt for a new time stamp."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
