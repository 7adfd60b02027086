"""What the demo shows at the end: a table, as text and as Markdown, and a picture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_journal import Journal, write_atomically
from demo_task import PRUNED, TEST
from rich import box
from rich.console import Console
from rich.table import Table

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
DAMAGE_NAMES = {
    "prune": f"{PRUNED:.0%} of weights pruned",
    "quantize": "weights of 2 bits",
    "drift": "gains drifted",
}


@dataclass(frozen=True)
class Row:
    """A line of the table: one value for each random seed, except for the label."""

    label: str
    accuracy: list[float]
    parameters: list[float] | None = None
    seconds: list[float] | None = None

    def cells(self) -> tuple[str, str, str, str]:
        trained = "" if self.parameters is None else f"{statistics.mean(self.parameters):,.0f}"
        seconds = "" if self.seconds is None else f"{statistics.mean(self.seconds):.1f}"
        return self.label, spread(self.accuracy), trained, seconds


def spread(values: list[float]) -> str:
    """Mean and, of more than one value, standard deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


class Results:
    """The journal's parts, gathered over the random seeds."""

    def __init__(self, journal: Journal) -> None:
        self.config, self._parts = journal.config, journal.parts

    def values(self, part: str, what: str) -> list[Any]:
        return [self._parts[f"{seed}/{part}"][what] for seed in range(self.config["seeds"])]

    def budgets(self, by: str) -> list[int]:
        return self.config["sizes"]["by_gradient" if by == "gradient" else "at_random"]

    @property
    def largest(self) -> int:
        return max(self.budgets("gradient"))

    @property
    def seconds(self) -> float:
        return sum(part["seconds"] for part in self._parts.values())


# ---- table ---------------------------------------------------------------------------------------


def sections(results: Results) -> list[tuple[str, list[Row]]]:
    def growth(part: str, label: str) -> Row:
        kept = statistics.mean(results.values(part, "kept"))
        return Row(
            f"{label}, {kept:.0f} kept",
            results.values(part, "accuracy"),
            results.values(part, "parameters"),
            results.values(part, "seconds"),
        )

    def control(part: str, label: str, tried: int = 3) -> Row:
        return Row(
            label,
            results.values(part, "accuracy"),
            results.values(part, "parameters"),
            [seconds / tried for seconds in results.values(part, "seconds")],
        )

    kind = results.config["damage"]
    healthy = results.values("base", "parameters")
    seconds = results.values("base", "seconds")
    return [
        (
            "The network",
            [
                Row("healthy", results.values("base", "accuracy"), healthy, seconds),
                Row(f"damaged: {DAMAGE_NAMES[kind]}", results.values("base", "damaged")),
            ],
        ),
        *(
            (
                title,
                [growth(f"{by}/{budget}", f"{budget} seeds") for budget in results.budgets(by)],
            )
            for by, title in (
                ("gradient", "Repaired by seeds, picked by gradient"),
                ("random", "Repaired by seeds, picked at random"),
            )
        ),
        (
            "Repaired without seeds",
            [
                control("subset", "random part of the last layer"),
                control("last", "last layer"),
                control("full", "all weights left" if kind == "prune" else "all weights"),
            ],
        ),
        (
            "Where not to use it: a new task (rotated digits)",
            [
                Row("healthy network as it is", results.values("base", "rotated")),
                growth("rotated/grown", f"{results.largest} seeds"),
                control("rotated/last", "last layer"),
                control("rotated/full", "all weights"),
            ],
        ),
    ]


HEADER = ("trained", "accuracy, %", "parameters", "seconds")


def notes(results: Results) -> str:
    config = results.config
    return (
        f"Accuracy on {TEST} test images, mean ± standard deviation over {config['seeds']} random seeds. A seed has 8 "
        "parameters; those of culled seeds are not counted. Seconds are for one training. Repairs without seeds had as "
        "many steps as the largest one with seeds, and three learning rates, of which the best on held-out images is "
        f"shown. Device {config['device']}, torch {config['torch']}, kernels: {config['kernels']}, "
        f"commit {config['commit']}; {results.seconds:.0f} s in all."
    )


def show(results: Results, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in HEADER:
        table.add_column(name, justify="left" if name == HEADER[0] else "right")
    for title, rows in sections(results):
        table.add_row(f"[bold]{title}[/bold]")
        for row in rows:
            label, *numbers = row.cells()
            table.add_row(f"  {label}", *numbers)
        table.add_section()
    console.print(table)
    console.print(notes(results))


def markdown(results: Results) -> str:
    lines = [f"| {' | '.join(HEADER)} |", "| --- | ---: | ---: | ---: |"]
    for title, rows in sections(results):
        lines.append(f"| **{title}** | | | |")
        lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    return "\n".join([*lines, "", notes(results), ""])


# ---- all of it -----------------------------------------------------------------------------------


def report(journal: Journal, console: Console, *, readme: Path | None) -> None:
    """Print the table, write ``table.md`` and ``demo.png`` beside the journal; both into the checkout ``readme`` too."""
    results = Results(journal)
    show(results, console)
    table = markdown(results)
    write_atomically(journal.folder / "table.md", table.encode())
    try:
        from demo_picture import draw
    except ModuleNotFoundError as error:
        console.print(f"No picture: {error}. It needs: pip install matplotlib", soft_wrap=True)
        return
    picture = draw(results)
    write_atomically(journal.folder / "demo.png", picture)
    console.print(f"Picture and table: {journal.folder}", soft_wrap=True)
    if readme is not None:
        into_readme(readme / "README.md", table, BEGIN, END)
        write_atomically(readme / "docs" / "demo.png", picture)


def into_readme(path: Path, table: str, begin: str, end: str) -> None:
    """Put ``table`` between two markers of the file; ValueError if it lacks them."""
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path.name} has no {begin} ... {end}")
    write_atomically(path, f"{before}{begin}\n{table}{end}{after}".encode())
