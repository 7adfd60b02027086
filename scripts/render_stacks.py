"""Puts the table of what works where into README.md, from benchmarks/results/stacks.json.

`make stacks` writes that file on any machine, and `make gpu-check` on one with a GPU. What another machine found comes in
with

    make stacks-table FOUND=its/stacks.json

if it ran the same sources; of rows that both ran, what failed on either is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import evidence
from demo_report import into_readme

sys.path.append(str(evidence.ROOT / "tests"))
import stacks  # noqa: E402

BEGIN, END = "<!-- stacks:begin -->", "<!-- stacks:end -->"
TITLES = {"cpu": "CPU", "cuda": "CUDA", "2 x cuda": "2 × CUDA"}


def markdown(found: stacks.Table) -> str:
    lines = [f"| stack | {' | '.join(TITLES.values())} |", "| --- | --- | --- | --- |"]
    notes: dict[str, list[str]] = {}  # a remark, and the rows that it is of
    for group, rows in stacks.ROWS.items():
        lines.append(f"| **{group}** | | | |")
        for row in rows:
            entries = found.get(f"{group}: {row}", {})
            cells = [_cell(entries, device) for device in stacks.DEVICES]
            lines.append(f"| {row} | {' | '.join(cells)} |")
            for note in _notes(entries):
                notes.setdefault(note, []).append(f"{group}: {row}")
    remarks = "\n".join(f"* {'; '.join(of)}: {note}" for note, of in notes.items())
    parts = ["\n".join(lines), _measurements(found), remarks, _versions(found)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _cell(entries: dict[str, dict[str, Any]], device: str) -> str:
    if device in entries:
        return entries[device]["result"]
    return "" if entries or device == "2 x cuda" else "not run"


def _notes(entries: dict[str, dict[str, Any]]) -> list[str]:
    """What users get where a stack is refused, and remarks; the reasons of what was not run are in the JSON."""
    found = []
    for entry in entries.values():
        if entry["note"] and entry["result"] != "not run":
            refused = "refused: " if entry["result"] == "refused" else ""
            found.append(f"{refused}{_escaped(entry['note'])}")
    return list(dict.fromkeys(found))


def _measurements(found: stacks.Table) -> str:
    """One table for all rows that measured something: a column for each quantity."""
    measured = {
        (name, device): entry["measured"]
        for name, entries in found.items()
        for device, entry in entries.items()
        if entry.get("measured")
    }
    if not measured:
        return ""
    columns = list(dict.fromkeys(column for values in measured.values() for column in values))
    lines = [f"| measured | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for (name, device), values in measured.items():
        cells = (_number(values.get(column, "")) for column in columns)
        lines.append(f"| {name} ({TITLES[device]}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else _escaped(str(value))


def _versions(found: stacks.Table) -> str:
    lines = []
    for device, title in TITLES.items():
        entries = [entries[device]["versions"] for entries in found.values() if device in entries]
        known: dict[str, list[str]] = {}
        for versions in entries:
            for name, version in versions.items():
                if version not in known.setdefault(name, []):
                    known[name].append(version)
        if known:
            lines.append(f"{title}: {', '.join(f'{name} {_either(found)}' for name, found in known.items())}.")
    return "\n".join(f"{line}  " for line in lines).rstrip()


def _either(versions: list[str]) -> str:
    return " or ".join(versions)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("found", type=Path, nargs="*", help="what other machines found, to be merged into the results")
    parser.add_argument("--results", type=Path, default=evidence.STACKS)
    parser.add_argument("--readme", type=Path, default=evidence.ROOT / "README.md")
    options = parser.parse_args()
    found = stacks.read_table(options.results)
    source = stacks.source_of()
    for path in options.found:
        other = json.loads(path.read_text())
        if not any(entry.get("source") == source for entries in other.values() for entry in entries.values()):
            parser.error(f"{path}: nothing in it is of these sources ({source})")
        found = stacks.merged(found, other, source, another_machine=True)
        stacks.write_table(options.results, found)
    into_readme(options.readme, markdown(found), BEGIN, END)
    failing = [f"{name} ({device})" for name, e in found.items() for device in e if e[device]["result"] == "fails"]
    for each in failing:
        print(f"fails: {each}", file=sys.stderr)
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
