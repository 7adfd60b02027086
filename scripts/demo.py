#!/usr/bin/env python3
"""Grow a damaged network back.

A classifier of handwritten digits (scikit-learn's; four hidden layers of 96) is trained, damaged and frozen. Seeds of
8 features around its hidden layers watch the gradient for a few batches, germinate where it says that they would help,
are blended in, trained, and kept or culled by what they are worth on held-out images: a controller sees to all of it.
Other ways to repair the network get as many training steps. Everything is repeated with several random seeds; a table
and a picture come at the end.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Asks cuBLAS for the same bits in every run; it must be set before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ROOT = Path(__file__).resolve().parent.parent
try:
    import kasmina_ext  # noqa: F401
except ModuleNotFoundError:  # not installed: run from the checkout
    sys.path.insert(0, str(ROOT))

import demo_task as task  # noqa: E402
import evidence  # noqa: E402
import torch  # noqa: E402
from demo_grow import Growth, grow  # noqa: E402
from demo_journal import Journal, JournalError  # noqa: E402
from demo_report import report  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from kasmina_ext import flags  # noqa: E402

BY_GRADIENT = (8, 16, 32, 48)
AT_RANDOM = (8, 16, 32)


@dataclass(frozen=True)
class Sizes:
    """How much is done; ``--quick`` does next to nothing, all the same."""

    by_gradient: tuple[int, ...] = BY_GRADIENT
    at_random: tuple[int, ...] = AT_RANDOM
    base_steps: int = task.BASE_STEPS
    tick_steps: int = Growth.tick_steps
    ticks: int = Growth.ticks

    def growth(self, budget: int, by: str = "gradient") -> Growth:
        return Growth(budget, by, tick_steps=self.tick_steps, ticks=self.ticks)

    @property
    def largest(self) -> Growth:
        return self.growth(max(self.by_gradient))


QUICK = Sizes(by_gradient=(4, 8), at_random=(4,), base_steps=60, tick_steps=1, ticks=48)


# ---- the parts of a run --------------------------------------------------------------------------


@dataclass
class Part:
    """A piece of the run that is saved when it is done."""

    name: str
    label: str
    steps: int
    work: Callable[[task.Step], dict[str, Any]]


def parts_of(seed: int, sizes: Sizes, damage: str, device: torch.device, journal: Journal) -> Iterator[Part]:
    """All that is measured for one random seed, in order; later parts load the network that the first one saved."""
    data = task.load(seed, device)
    turned = data.rotated()
    file = f"network-{seed}.pt"

    def healthy() -> torch.nn.Sequential:
        network = task.classifier(seed, device)
        network.load_state_dict(journal.load_tensors(file, device))
        return network.requires_grad_(False)

    def damaged() -> torch.nn.Sequential:
        network = healthy()
        task.damage(network, damage, seed)
        return network

    def base(on_step: task.Step) -> dict[str, Any]:
        network = task.train_base(data, seed, sizes.base_steps, on_step)
        journal.save_tensors(file, network.state_dict())
        harmed = copy.deepcopy(network)
        task.damage(harmed, damage, seed)
        return {
            "accuracy": task.accuracy(network, data.test),
            "damaged": task.accuracy(harmed, data.test),
            "rotated": task.accuracy(network, turned.test),
            "parameters": sum(p.numel() for p in network.parameters()),
        }

    def growth(network, on, how: Growth, label: str, name: str) -> Part:
        def work(on_step: task.Step) -> dict[str, Any]:
            grown = grow(network(), on, how, seed=seed, on_step=on_step)
            return {
                "accuracy": grown.accuracy,
                "kept": grown.kept,
                "parameters": grown.parameters,
                "lifecycles": grown.lifecycles,
            }

        return Part(f"{seed}/{name}", label, how.steps, work)

    def control(network, on, choose, lrs: tuple[float, ...], label: str, name: str) -> Part:
        steps = sizes.largest.steps

        def work(on_step: task.Step) -> dict[str, Any]:
            return dataclasses.asdict(
                task.control(network(), choose, on, steps=steps, lrs=lrs, seed=seed, on_step=on_step)
            )

        return Part(f"{seed}/{name}", label, steps * len(lrs), work)

    def subset(network):
        return task.subset_of_last_layer(network, sizes.largest.parameters, seed)

    yield Part(f"{seed}/base", "training the network", sizes.base_steps, base)
    for by, budgets in (("gradient", sizes.by_gradient), ("random", sizes.at_random)):
        for budget in budgets:
            yield growth(damaged, data, sizes.growth(budget, by), f"growing {budget} seeds by {by}", f"{by}/{budget}")
    last, full = task.LAST_LAYER_LRS, task.FULL_LRS
    yield control(damaged, data, subset, last, "retraining a part of the last layer", "subset")
    yield control(damaged, data, task.last_layer, last, "retraining the last layer", "last")
    yield control(damaged, data, task.everything, full, "retraining everything", "full")
    yield growth(healthy, turned, sizes.largest, "growing on rotated digits", "rotated/grown")
    yield control(healthy, turned, task.last_layer, last, "last layer on rotated digits", "rotated/last")
    yield control(healthy, turned, task.everything, full, "everything on rotated digits", "rotated/full")


def measure(journal: Journal, parts: list[Part], console: Console) -> None:
    """Do what is not in the journal yet, with progress bars."""
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("all", total=sum(part.steps for part in parts))
        current = progress.add_task("")
        for part in parts:
            if part.name in journal.parts:
                progress.advance(whole, part.steps)
                continue
            seed = part.name.partition("/")[0]
            progress.reset(current, total=part.steps, description=f"seed {seed}: {part.label}")

            def on_step(count: int) -> None:
                progress.advance(whole, count)
                progress.advance(current, count)

            begun = time.perf_counter()
            result = part.work(on_step)
            journal.record(part.name, {**result, "seconds": time.perf_counter() - begun})
        progress.remove_task(current)


# ---- the command ---------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--damage", choices=task.DAMAGES, default="prune",
        help="90%% of the hidden weights pruned (default), 2-bit weights, or every unit's gain drifted")  # fmt: skip
    add("--seeds", type=int, default=3, metavar="N", help="repeat with N random seeds (default: 3)")
    add(
        "--device",
        default="auto",
        help="auto (default: a GPU if there is one), cpu, cuda, cuda:1, ...",
    )
    add("--out", type=Path, default=ROOT / "build" / "demo", metavar="DIR",
        help="where results, table and picture go (default: build/demo)")  # fmt: skip
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out; it ends with the same numbers",
    )
    add(
        "--readme",
        action="store_true",
        help="also put the table and the picture into README.md and docs/",
    )
    add(
        "--quick",
        action="store_true",
        help="a few seconds: to see that all works; the figures mean nothing",
    )
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"argument --seeds: at least 1, got {options.seeds}")
    if options.readme and options.quick:
        parser.error("argument --readme: not with --quick, whose figures mean nothing")
    try:
        options.device = choose_device(options.device)
    except (RuntimeError, ValueError, AssertionError) as error:
        parser.error(f"argument --device: {error}")
    return options


def choose_device(name: str) -> torch.device:
    """The device, tried out."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    torch.zeros(1, device=device)
    return device


def configuration(options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """All that the numbers depend on."""
    compiled, reason = flags.compiled_path(options.device)
    on_gpu = options.device.type == "cuda"
    return {
        "damage": options.damage,
        "seeds": options.seeds,
        "sizes": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(sizes).items()},
        "device": torch.cuda.get_device_name(options.device) if on_gpu else str(options.device),
        "torch": torch.__version__,
        "kernels": "compiled" if compiled else f"reference ({reason})",
        "commit": evidence.commit(),
    }


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(highlight=False)
    # One thread: the matrices are too small to share, and the same sums come out on any number of cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(options.device.type == "cuda")
    sizes = QUICK if options.quick else Sizes()
    config = configuration(options, sizes)
    console.print(f"device {config['device']}, torch {config['torch']}, kernels: {config['kernels']}")
    try:
        journal = Journal(options.out, config, resume=options.resume)
    except JournalError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    parts: list[Part] = []
    try:
        parts += (
            part
            for seed in range(options.seeds)
            for part in parts_of(seed, sizes, options.damage, options.device, journal)
        )
        measure(journal, parts, console)
        report(journal, console, readme=ROOT if options.readme else None)
    except KeyboardInterrupt:
        console.print(
            f"\nInterrupted: {len(journal.parts)} of {len(parts)} parts are saved in {options.out}.\n"
            "The same command with --resume goes on from there and ends with the same numbers.",
            soft_wrap=True,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
