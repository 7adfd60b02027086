#!/usr/bin/env python3
"""Repairs of damaged networks: seeds, calibrated or grown or both, against the ways that there are without them.

digits  the demo's classifier, five kinds of damage and two new tasks, several random seeds; on the CPU
gpt     a character-level GPT, trained on the standard library's sources, then pruned or quantized; wants a GPU
render  puts the tables of what both have found into README.md

Each writes its section of benchmarks/results/repair.json, as far as it has come, after every part; --resume goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
try:
    import kasmina_ext  # noqa: F401
except ModuleNotFoundError:  # not installed: run from the checkout
    sys.path.insert(0, str(ROOT))

import char_gpt  # noqa: E402
import evidence  # noqa: E402
import repair_digits as digits  # noqa: E402
import repair_gpt as gpt  # noqa: E402
import torch  # noqa: E402
from demo import choose_device  # noqa: E402
from demo_journal import Journal, JournalError, write_atomically  # noqa: E402
from demo_report import into_readme  # noqa: E402
from repair_methods import FIXED, START, Trainer, repaired  # noqa: E402
from repair_report import markdown, show, summary  # noqa: E402
from rich.console import Console  # noqa: E402

BEGIN, END = "<!-- repair:begin -->", "<!-- repair:end -->"
RESULTS = ROOT / "benchmarks/results/repair.json"
WIDTH = 150  # of the tables, columns
MARGIN = 1.2  # a part is begun if there is time for so many times what it is expected to take


class OutOfTime(Exception):
    """The deadline would be missed."""


# ---- digits ----------------------------------------------------------------------------------------------------------


def digits_part(damage: str, seed: int, sizes: digits.Sizes) -> dict[str, Any]:
    """One part, in a process of its own: a function of its arguments alone."""
    # One thread: the matrices are too small to share, and the same sums come out on any number of cores.
    torch.set_num_threads(1)
    return digits.repairs(damage, seed, sizes)


def run_digits(options: argparse.Namespace, journal: Journal, clock: Clock) -> None:
    sizes = digits.QUICK if options.quick else digits.Sizes()
    parts = [(damage, seed) for seed in range(options.seeds) for damage in (*digits.DAMAGES, *digits.NEW_TASKS)]
    missing = [part for part in parts if f"{part[0]}/{part[1]}" not in journal.parts]
    clock.say(f"digits: {len(parts) - len(missing)} of {len(parts)} parts are there")
    for (damage, seed), result in in_any_order(missing, sizes, options.jobs):
        journal.record(f"{damage}/{seed}", result)
        save(options, journal, clock)
        clock.say(f"{len(journal.parts)} of {len(parts)}: {damage}, seed {seed}")
        clock.check(0)


def in_any_order(
    parts: list[tuple[str, int]], sizes: digits.Sizes, jobs: int
) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Parts and their results as they come, ``jobs`` at a time; one at a time is done in this process."""
    if jobs == 1:
        yield from ((part, digits_part(*part, sizes)) for part in parts)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            running = {pool.submit(digits_part, *part, sizes): part for part in parts}
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def digits_found(journal: Journal) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By damage and method: what was found for each random seed."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for damage in (*digits.DAMAGES, *digits.NEW_TASKS):
        for name, part in journal.parts.items():
            if name.rpartition("/")[0] == damage:
                for method, result in part.items():
                    found.setdefault(damage, {}).setdefault(method, []).append(result | {"seed": seed_of(name)})
    return found


# ---- GPT -------------------------------------------------------------------------------------------------------------


def run_gpt(options: argparse.Namespace, journal: Journal, clock: Clock) -> None:
    sizes = gpt.TINY if options.quick else gpt.Sizes()
    device, Trainer.captures = options.device, not options.eager
    corpus = char_gpt.read_stdlib(device, sizes.corpus_bytes)
    clock.say("corpus: {files} files, {bytes:,} bytes, Python {python}".format(**corpus.facts))
    network = base_network(journal, corpus, sizes, clock)
    starts = dict(gpt.STARTS)
    for seed in range(options.seeds):
        for damage in gpt.DAMAGES:
            parts = {method: f"{damage}/{method}/{seed}" for method in methods_for(seed)}
            missing = {method: expected_seconds(journal.parts, damage, method, seed)
                       for method, name in parts.items() if name not in journal.parts}  # fmt: skip
            if missing:
                clock.check(sum(missing.values()))  # a row is begun if there is time for all of it
                problem = gpt.damaged(network, corpus, damage, sizes, seed)
            for method, expected in missing.items():
                clock.check(expected)
                rate = journal.parts[f"{damage}/{method}/0"].get("rate") if seed else None
                begun = time.monotonic()
                found = repaired(problem, method, seed, start=starts.get(method, START), rate=rate)
                found |= {"seconds": round(time.monotonic() - begun, 2)}
                journal.record(parts[method], found)
                save(options, journal, clock)
                clock.say("{}, {}, random seed {}: {:.4f} bits{}, {:.1f} s".format(
                    damage, method, seed, found["bits"], f", rate {found['rate']:g}" if "rate" in found else "",
                    found["seconds"]))  # fmt: skip
            starts |= {method: journal.parts[name].get("rate", START) for method, name in parts.items()}


def methods_for(seed: int) -> list[str]:
    """All for the first random seed; then those in which there is any chance, with the rates that the first has found."""
    return [name for name in gpt.METHODS_TRIED if seed == 0 or name not in FIXED]


def expected_seconds(parts: dict[str, dict[str, Any]], damage: str, method: str, seed: int) -> float:
    """As long as it took at most for another damage, with a climb to the best rate (the first random seed) or without; else
    the first one's share without the climb; where nothing is known, as long as the longest so far.
    """
    same = [name for name in parts if name.split("/")[1:2] == [method] and (seed_of(name) > 0) == (seed > 0)]
    if same:
        return max(parts[name]["seconds"] for name in same)
    first = parts.get(f"{damage}/{method}/0")
    if first:
        return first["seconds"] / len(first.get("tried", "1"))
    return max((part["seconds"] for part in parts.values() if "seconds" in part), default=0.0)


def base_network(journal: Journal, corpus: char_gpt.Corpus, sizes: gpt.Sizes, clock: Clock) -> char_gpt.GPT:
    """Trained, or loaded if an earlier run has trained it."""
    if "base" in journal.parts:
        if not (journal.folder / "network.pt").exists():
            raise JournalError(f"{journal.folder} has no network.pt any more; start anew without --resume")
        network = char_gpt.GPT(sizes.shape).to(corpus.train.device).requires_grad_(False)
        network.load_state_dict(journal.load_tensors("network.pt", corpus.train.device))
        return network
    clock.say(f"training the network, {sizes.train_seconds:.0f} s at most")
    network, facts = char_gpt.train(
        corpus,
        sizes.shape,
        sizes.train_batch,
        seconds=sizes.train_seconds,
        steps=sizes.train_steps,
        seed=0,
        say=clock.say,
    )
    journal.save_tensors("network.pt", network.state_dict())
    problem = gpt.damaged(network, corpus, gpt.DAMAGES[0], sizes)
    journal.record("base", facts | problem.judged(network) | {"corpus": corpus.facts})
    clock.say("trained: {parameters:,} parameters, {steps} steps, {bits:.4f} bits".format(**journal.parts["base"]))
    return network


def gpt_found(journal: Journal) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By damage and method: what was found for each random seed."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, result in journal.parts.items():
        if name != "base":
            damage, method, _ = name.split("/")
            found.setdefault(damage, {}).setdefault(method, []).append(result | {"seed": seed_of(name)})
    return found


def seed_of(part: str) -> int:
    return int(part.rpartition("/")[2])


# ---- the command -----------------------------------------------------------------------------------------------------


class Clock:
    """What has been said when, and whether there is time for more."""

    def __init__(self, deadline: float) -> None:
        self.begun, self.deadline = time.monotonic(), deadline

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)

    def check(self, expected: float) -> None:
        """OutOfTime where what is expected to take so many seconds might not be done before the deadline."""
        if self.seconds + MARGIN * expected > self.deadline:
            raise OutOfTime(f"the deadline of {self.deadline:.0f} s is near")


def save(options: argparse.Namespace, journal: Journal, clock: Clock) -> None:
    """This part's section of the results, beside what the file holds already."""
    found = digits_found(journal) if options.part == "digits" else gpt_found(journal)
    section = {"config": journal.config, "machine": evidence.machine(), "wall_seconds": round(clock.seconds, 1)}
    if options.part == "gpt":
        section["base"] = journal.parts.get("base")
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    record[options.part] = section | {"summary": summary(options.part, found), "found": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("digits", "gpt", "render"))
    add = parser.add_argument
    add("--seeds", type=int, metavar="N", help="random seeds (default: 5 of digits, 3 of gpt)")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="processes, of digits (default: 2)")
    add("--device", default="auto", help="of gpt: auto (default: a GPU if there is one), cpu, cuda, ...")
    add("--work", type=Path, metavar="DIR", help="where parts are kept (build/repair-digits, build/repair-gpt)")
    add("--out", type=Path, default=RESULTS, metavar="FILE", help="default: benchmarks/results/repair.json")
    add("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="of render: default: README.md")
    add("--deadline", type=float, default=float("inf"), metavar="SECONDS", help="stop in time, with what there is")
    add("--eager", action="store_true", help="of gpt, on a GPU: steps as they are, not captured into CUDA graphs")
    add("--resume", action="store_true", help="go on with the run in --work")
    add("--quick", "--tiny", dest="quick", action="store_true",
        help="to see that all works: the figures mean nothing, so give --out, too")  # fmt: skip
    options = parser.parse_args(argv)
    if options.seeds is None:
        options.seeds = 3 if options.part == "gpt" else 5
    if min(options.seeds, options.jobs) < 1:
        parser.error("arguments --seeds and --jobs: at least 1")
    if options.quick and options.out == RESULTS:
        parser.error("argument --quick: its figures mean nothing, give another --out")
    if options.work is None:
        options.work = ROOT / f"build/repair-{options.part}"
    try:
        options.device = choose_device(options.device)
    except (RuntimeError, ValueError, AssertionError) as error:
        parser.error(f"argument --device: {error}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(highlight=False, width=max(WIDTH, Console().width))
    if options.part == "render":
        record = json.loads(options.out.read_text())
        for part, section in record.items():
            section["summary"] = summary(part, section["found"])
        show(record, console)
        into_readme(options.readme, markdown(record), BEGIN, END)
        return 0
    clock = Clock(options.deadline)
    code = 0
    try:
        journal = Journal(options.work, configuration(options), resume=options.resume)
        (run_digits if options.part == "digits" else run_gpt)(options, journal, clock)
    except JournalError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    except (KeyboardInterrupt, OutOfTime) as stopped:
        why = str(stopped) or "interrupted"
        console.print(f"\nStopped ({why}): what is done is saved; --resume goes on from there.", soft_wrap=True)
        code = 130 if isinstance(stopped, KeyboardInterrupt) else 0
    save(options, journal, clock)
    show({options.part: json.loads(options.out.read_text())[options.part]}, console)
    console.print(f"Results: {options.out}", soft_wrap=True)
    return code


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """All that the numbers depend on."""
    if options.part == "digits":
        sizes, device = digits.plain(digits.QUICK if options.quick else digits.Sizes()), "cpu"
    else:
        sizes, device = gpt.plain(gpt.TINY if options.quick else gpt.Sizes()), str(options.device)
        if options.device.type == "cuda":
            device = torch.cuda.get_device_name(options.device) + (", eager" if options.eager else "")
    plain = json.loads(json.dumps(sizes))
    return {"sizes": plain, "device": device, "torch": torch.__version__, "commit": evidence.commit()}


if __name__ == "__main__":
    sys.exit(main())
