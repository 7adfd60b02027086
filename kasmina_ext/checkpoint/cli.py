"""``python -m kasmina_ext checkpoint``: look at directories of checkpoints, verify, convert and prune them.

Exit codes: 0 all is well, 1 something is damaged, missing or could not be done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from kasmina_ext.checkpoint import format, legacy
from kasmina_ext.checkpoint.catalog import read_any
from kasmina_ext.checkpoint.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from kasmina_ext.checkpoint.files import OpenDirectory, list_directories
from kasmina_ext.checkpoint.header import age_of
from kasmina_ext.checkpoint.manager import CheckpointManager
from kasmina_ext.checkpoint.retention import in_excess
from kasmina_ext.lifecycle import ExtendedLifecycle

OK, BAD = 0, 1
LONGEST = 60  # characters of a value in a table


class _Missing(Exception):
    """A directory that was asked for is not there."""


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add ``checkpoint`` and its commands to ``python -m kasmina_ext``."""
    description = (__doc__ or "").partition("\n\n")[2].strip()
    group = commands.add_parser("checkpoint", help="list, verify, show, convert and prune", description=description)
    group.set_defaults(run=lambda arguments: group.print_help(sys.stderr) or 2)
    own = group.add_subparsers(metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = own.add_parser(name, help=text, description=text)
        # Suppressed where it is not given, so that one before the tool counts.
        parser.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object instead of a table"
        )
        parser.set_defaults(run=lambda arguments: _guarded(run, arguments))
        return parser

    command("list", list_command, "the checkpoints in a directory, newest first").add_argument("directory", type=Path)
    command("verify", verify_command, "read all of a checkpoint, or of every one in a directory").add_argument(
        "path", type=Path, help="DIR or DIR/ID"
    )
    command("show", show_command, "what is in a checkpoint").add_argument("path", type=Path, help="DIR/ID")
    convert = command("convert", convert_command, "write the Triton package's checkpoints in the format of this one")
    convert.add_argument("source", type=Path, help="a directory of checkpoints, or one checkpoint")
    convert.add_argument("target", type=Path, help="the directory that takes the new ones")
    prune = command("prune", prune_command, "remove all but the best of each seed, and what killed saves have left")
    prune.add_argument("directory", type=Path)
    prune.add_argument("--keep", type=_positive, required=True, help="how many stay; critical ones always do")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _guarded(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    try:
        return run(arguments)
    except (CheckpointError, OSError, _Missing) as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"error: {_plain(str(error))}", file=sys.stderr)
        return BAD


# ---- commands ------------------------------------------------------------------------------------


def list_command(arguments: argparse.Namespace) -> int:
    """Metadata are verified, tensors are not."""
    manager = _manager(arguments.directory)
    entries, damaged = [], []
    for name, found in manager.scan():
        if isinstance(found, CheckpointDamaged):
            damaged.append({"checkpoint_id": name, "file": found.file, "reason": found.reason})
        elif isinstance(found, OSError):
            damaged.append({"checkpoint_id": name, "file": ".", "reason": str(found)})
        else:
            entries.append(found)
    entries.sort(key=age_of, reverse=True)
    if arguments.json:
        found = {"directory": str(arguments.directory), "checkpoints": entries, "damaged": damaged}
        print(json.dumps(_json_of(found), allow_nan=False))
    else:
        header = ["checkpoint", "saved (UTC)", "priority", "state", "format", "bytes"]
        _table(f"{len(entries)} checkpoints in {arguments.directory}", header, map(_row_of, entries))
        for row in damaged:
            print(_plain(f"damaged: {row['checkpoint_id']}: {row['file']}: {row['reason']}"))
    return BAD if damaged else OK


def verify_command(arguments: argparse.Namespace) -> int:
    """The archive too, where a whole directory is verified."""
    root, only = _split(arguments.path)
    manager = _manager(root)
    if only is not None:
        names = [(root, only)]
    else:
        names = [
            (folder, name) for folder in manager.roots() for name in list_directories(folder) if _is_one(folder / name)
        ]
    verdicts = [(name, _problem(folder, name)) for folder, name in names]
    if only is None:
        verdicts = [(name, problem) for name, problem in verdicts if problem is not None]
    bad = [name for name, problem in verdicts if problem != ""]
    if arguments.json:
        rows = [{"checkpoint_id": name, "ok": problem == "", "error": problem or None} for name, problem in verdicts]
        print(json.dumps({"directory": str(root), "checkpoints": rows, "ok": not bad}))
    else:
        for name, problem in verdicts:
            print(f"whole: {name}" if problem == "" else _plain(problem or f"gone: {name}"))
        print(f"{len(verdicts) - len(bad)} of {len(verdicts)} checkpoints are whole")
    return BAD if bad else OK


def _problem(folder: Path, name: str) -> str | None:
    """What is wrong with a checkpoint, or ""; None for one that was removed meanwhile."""
    try:
        read_any(folder, name)
    except CheckpointNotFound:
        return None
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def show_command(arguments: argparse.Namespace) -> int:
    """All of it is verified first."""
    root, name = _split(arguments.path)
    if name is None:
        raise _Missing(f"{arguments.path} is no checkpoint")
    header, content = read_any(root, name)
    if arguments.json:
        print(json.dumps(_json_of({**header, "content": content}), allow_nan=False))
        return OK
    facts = {key: value for key, value in header.items() if value is not None}
    facts["timestamp"] = f"{header['timestamp']} ({_time(header['timestamp'])} UTC)"
    _table(name, ["field", "value"], ([key, _text_of(value)] for key, value in facts.items()))
    rows = [[path, kind, value] for path, kind, value in _leaves(content, "")]
    _table("content", ["name", "kind", "value"], rows)
    return OK


def convert_command(arguments: argparse.Namespace) -> int:
    """What is not the Triton package's is left alone."""
    root, only = _split(arguments.source)
    if not root.is_dir():
        raise _Missing(f"there is no directory {root}")
    if root.resolve() == arguments.target.resolve():
        raise _Missing(f"{arguments.target} is where the old checkpoints are: give another directory")
    converted, there, left, failed = [], [], [], []
    for name in [only] if only is not None else [n for n in list_directories(root) if _is_one(root / n)]:
        try:
            with OpenDirectory(root, name) as directory:
                old = legacy.is_legacy(directory)
            if not old:
                left.append(name)
            elif legacy.convert(root, name, arguments.target):
                converted.append(name)
            else:
                there.append(name)
        except (CheckpointError, OSError, TypeError, ValueError) as error:
            failed.append({"checkpoint_id": name, "error": str(error)})
    if arguments.json:
        print(json.dumps({"converted": converted, "already_there": there, "left": left, "failed": failed}))
    else:
        for name in converted:
            print(f"converted: {name}")
        for name in there:
            print(f"already there: {name}")
        for name in left:
            print(f"left alone, not an old one: {name}")
        for row in failed:
            print(_plain(f"failed: {row['error']}"))
        again = f"{len(there)} already there, " if there else ""
        print(f"{len(converted)} converted, {again}{len(left)} left alone, {len(failed)} failed")
    return BAD if failed or (only is not None and left) else OK


def prune_command(arguments: argparse.Namespace) -> int:
    """By priority, then age; critical ones stay."""
    manager = _manager(arguments.directory)
    removed = manager.prune(arguments.keep)
    stuck = in_excess(manager.list_checkpoints(limit=None), arguments.keep)
    if arguments.json:
        left = [entry["checkpoint_id"] for entry in stuck]
        print(json.dumps({"directory": str(arguments.directory), "removed": removed, "not_removed": left}))
    else:
        for name in removed:
            print(f"removed: {name}")
        for entry in stuck:
            print(f"not removed: {entry['checkpoint_id']}")
        print(f"{len(removed)} checkpoints removed")
    return BAD if stuck else OK


# ---- where things are ----------------------------------------------------------------------------


def _manager(root: Path) -> CheckpointManager:
    if not root.is_dir():
        raise _Missing(f"there is no directory {root}")
    return CheckpointManager(root)


def _split(path: Path) -> tuple[Path, str | None]:
    """``(root, identifier)``; None for a directory of checkpoints. _Missing where there is nothing of that name."""
    path = Path(os.path.abspath(path))  # "." has no name; links are not followed
    if _is_one(path):
        return path.parent, path.name
    if path.is_dir():
        return path, None
    if path.exists():
        raise _Missing(f"{path} is a file, not a checkpoint, which is a directory (seed files: kasmina_ext.load_seeds)")
    raise _Missing(f"there is no checkpoint and no directory {path}")


def _is_one(path: Path) -> bool:
    files = (*format.FILES, legacy.MANIFEST)
    return any(os.path.lexists(path / name) for name in files)


# ---- showing it ----------------------------------------------------------------------------------


def _row_of(entry: dict[str, Any]) -> list[str]:
    state = entry["lifecycle_state"]
    return [
        entry["checkpoint_id"],
        _time(entry["timestamp"]),
        entry["priority"],
        "-" if state is None else ExtendedLifecycle(state).name,
        str(entry["version"]),
        _text_of(entry["size"]),
    ]


def _time(milliseconds: int) -> str:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return str(milliseconds)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """(name, kind, value) of everything that is no dict, list or tuple; long lists of plain values are one line."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (dict, list, tuple, Tensor)) for item in value):
        for k, item in enumerate(value):
            yield from _leaves(item, f"{path}.{k}")
    elif isinstance(value, Tensor):
        yield path, str(value.dtype).removeprefix("torch."), str(list(value.shape))
    else:
        yield path, type(value).__name__, _text_of(value)


def _json_of(value: Any) -> Any:
    """Tensors as type and shape; NaN, which JSON lacks, as text."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, dict):
        return {str(key): _json_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_of(item) for item in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return repr(value)
    return value


def _text_of(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _plain(text: str) -> str:
    """Without what a terminal would act on: a name or a value may be anybody's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii", "replace") for c in text)


def _table(title: str, header: list[str], rows: Iterable[list[str]]) -> None:
    """With rich on a terminal, else lines with tabs."""
    rows = [[_plain(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        try:
            from rich import box
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=escape(_plain(title)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            for name, *cells in zip(header, *rows, strict=True):
                table.add_column(name, overflow="fold", min_width=min(44, max(map(len, [name, *cells]))))
            for row in rows:
                table.add_row(*map(escape, row))
            Console().print(table)
            return
    print(_plain(title))
    for row in [header, *rows]:
        print("\t".join(row))
