"""What repair.py found, as tables: a row for each damage, a column for each way to repair it; and who is better where."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from growth_report import interval
from repair_methods import EQUAL, FIXED, LADDER, METHODS, OURS
from rich import box
from rich.console import Console
from rich.table import Table

Found = dict[str, dict[str, list[dict[str, Any]]]]
"""By damage and method: what was found for each random seed."""


@dataclass(frozen=True)
class Measure:
    """What is compared."""

    key: str
    title: str
    digits: int
    more_is_better: bool
    costs: tuple[str, ...]
    """Shown below: the most parameters, and the median of all else. (Times of digits are of processes side by side.)"""


MEASURES = {
    "digits": Measure("accuracy", "accuracy, %", 1, True, ("parameters", "kept_parameters")),
    "gpt": Measure(
        "bits", "bits per character", 3, False, ("parameters", "kept_parameters", "seconds_per_step", "peak_bytes")
    ),
}
HEALTHY = "healthy"


def summary(part: str, found: Found) -> dict[str, Any]:
    """Means with their spread; what each method takes; and where each is better or worse than calibrate + grow."""
    key = MEASURES[part].key
    means = {
        damage: {method: spread([one[key] for one in ones]) for method, ones in by_method.items()}
        for damage, by_method in found.items()
    }
    methods = [name for name in METHODS if any(name in by_method for by_method in found.values())]
    costs = {name: _costs([one for by in found.values() for one in by.get(name, [])]) for name in methods}
    against = {name: _against(found, name, MEASURES[part]) for name in methods if name != OURS}
    return {"means": means, "costs": costs, f"against {OURS}": against}


def spread(values: list[float]) -> dict[str, float]:
    """Mean, its 95 % interval and the standard deviation (of two or more values), and how many they are."""
    deviation = {"sd": statistics.stdev(values)} if len(values) > 1 else {}
    return interval(values) | deviation


COSTS = {
    "parameters": "parameters trained or fitted",
    "kept_parameters": "of them not culled",
    "seconds_per_step": "ms per step",
    "peak_bytes": "peak memory, MiB",
    "rank": "rank",
}


def _costs(results: list[dict[str, Any]]) -> dict[str, float]:
    found = {name: [one[name] for one in results if name in one] for name in COSTS}
    of_all = {name: max if name == "parameters" else statistics.median for name in COSTS}
    return {name: of_all[name](values) for name, values in found.items() if values}


def _against(found: Found, method: str, measure: Measure) -> dict[str, dict[str, Any]]:
    """By damage: by how much the method is better than ours, pair by pair, and if that is clear of chance: an interval
    without 0 or, where there is one pair only, a difference at all.
    """
    sign, result = (1 if measure.more_is_better else -1), {}
    for damage, by_method in found.items():
        theirs, ours = ({one["seed"]: one[measure.key] for one in by_method.get(name, [])} for name in (method, OURS))
        if method in FIXED and len(theirs) == 1:
            theirs = dict.fromkeys(ours, next(iter(theirs.values())))
        pairs = theirs.keys() & ours.keys()
        if not pairs:
            continue
        by = interval([sign * (theirs[seed] - ours[seed]) for seed in sorted(pairs)])
        low, high = by.get("low", by["mean"]), by.get("high", by["mean"])
        result[damage] = by | {"verdict": "better" if low > 0 else "worse" if high < 0 else "no different"}
    return result


# ---- as tables -------------------------------------------------------------------------------------------------------


def table(part: str, section: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, in text."""
    found, measure = section["summary"], MEASURES[part]
    costs = found["costs"]
    header = ["damage", "n", *(_label(name, costs) for name in costs)]
    rows = [
        [damage, _seeds_of(by_method), *(_cell(by_method.get(name), measure.digits) for name in costs)]
        for damage, by_method in found["means"].items()
    ]
    for name in measure.costs:
        if any(name in each for each in costs.values()):
            rows.append([COSTS[name], "", *(_cost(name, each.get(name)) for each in costs.values())])
    return header, rows


def _seeds_of(by_method: dict[str, dict[str, float]]) -> str:
    """How many random seeds the means of a row are of: the fewest and the most of those that can differ."""
    counts = sorted({value["n"] for name, value in by_method.items() if name in METHODS and name not in FIXED})
    return "–".join(dict.fromkeys(str(count) for count in (counts[0], counts[-1]))) if counts else ""


def _label(method: str, costs: dict[str, Any]) -> str:
    return f"LoRA r={costs[EQUAL]['rank']:.0f}" if method == EQUAL else method


def _cell(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return ""
    mean = f"{value['mean']:.{digits}f}"
    return f"{mean} ± {value['sd']:.{digits}f}" if "sd" in value else mean


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "seconds_per_step":
        return f"{1e3 * value:.1f}"
    return f"{value / 2**20:,.0f}" if name == "peak_bytes" else f"{value:,.0f}"


def verdicts(part: str, section: dict[str, Any]) -> list[str]:
    """A sentence for each other method: where it is better than calibrate + grow, and where not."""
    costs, lines = section["summary"]["costs"], []
    for method, by_damage in section["summary"][f"against {OURS}"].items():
        where = {
            verdict: [name for name, one in by_damage.items() if one["verdict"] == verdict]
            for verdict in ("better", "no different", "worse")
        }
        if len(by_damage) > 1 and len(where["worse"]) == len(by_damage):
            lines.append(f"{_label(method, costs)} is worse everywhere")
        elif len(by_damage) > 1 and len(where["better"]) == len(by_damage):
            lines.append(f"{_label(method, costs)} is better everywhere")
        elif by_damage:
            parts = [f"{verdict} on {', '.join(names)}" for verdict, names in where.items() if names]
            lines.append(f"{_label(method, costs)} is {'; '.join(parts)}")
    return lines


def notes(part: str, section: dict[str, Any]) -> str:
    config = section["config"]
    sizes = config["sizes"]
    alone = any(row[1].split("–")[0] == "1" for row in table(part, section)[1])
    common = (
        f"Each method chose its learning rate on held-out data, climbing the same ladder ({LADDER[0]:g} to {LADDER[-1]:g}) until "
        f"both neighbours were worse or the ladder ended, and had {sizes['steps']} steps of the same batches. "
        f"Better and worse are by paired 95 % intervals{', where n is 1 by any difference' if alone else ''}. "
        f"Device {config['device']}, torch {config['torch']}, commit {config['commit']}."
    )
    if part == "digits":
        healthy = [one["mean"] for by in section["summary"]["means"].values() if (one := by.get(HEALTHY))]
        return (
            f"Accuracy on test images, mean and standard deviation of n random seeds; {statistics.mean(healthy):.1f} before "
            f"the damage. Calibration had {sizes['calibration_images']} images without labels. {common}"
        )
    base = section["base"]
    errors = [one["loss_error"] for by in section["found"].values() for ones in by.values() for one in ones]
    return (
        f"Bits per character on files that were not trained on; {base['bits']:.3f} before the damage (a GPT of "
        f"{base['parameters']:,} parameters, trained for {base['seconds']:.0f} s on {base['corpus']['bytes']:,} bytes of "
        f"Python {base['corpus']['python']}'s standard library). Mean and standard deviation of n random seeds: of the order "
        f"of the data, what calibration sees and new weights; the damaged network is the same. The sampling of test windows "
        f"adds a standard error of {max(errors) / math.log(2):.3f} at most, which all columns share. Calibration had "
        f"{sizes['calibration_windows']} unlabelled windows of {sizes['shape']['context']} characters. {common}"
    )


TITLES = {"digits": "A digit classifier", "gpt": "A character-level GPT"}


def show(record: dict[str, Any], console: Console) -> None:
    for part in (name for name in TITLES if record.get(name, {}).get("found")):
        header, rows = table(part, record[part])
        shown = Table(title=f"{TITLES[part]}: {MEASURES[part].title}", title_justify="left", box=box.SIMPLE_HEAD)
        for name in header:
            shown.add_column(name, justify="left" if name == "damage" else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        for line in verdicts(part, record[part]):
            console.print(f"Against {OURS}, {line}.", soft_wrap=True)
        console.print(notes(part, record[part]), soft_wrap=True)


def markdown(record: dict[str, Any]) -> str:
    lines: list[str] = []
    for part in (name for name in TITLES if record.get(name, {}).get("found")):
        header, rows = table(part, record[part])
        lines += [f"**{TITLES[part]}** ({MEASURES[part].title})", ""]
        lines += [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        sentences = verdicts(part, record[part])
        if sentences:
            lines += ["", f"Against *{OURS}*: " + ". ".join(_capital(sentence) for sentence in sentences) + "."]
        lines += ["", notes(part, record[part]), ""]
    return "\n".join(lines)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
