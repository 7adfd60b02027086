#!/usr/bin/env python3
"""Grow a damaged network back, once, and draw the life of its seeds: a picture, a page, and the history itself.

The network and the damage are the demo's (scripts/demo.py), with room for two thirds of the seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
try:
    import kasmina_ext  # noqa: F401
except ModuleNotFoundError:  # not installed: run from the checkout
    sys.path.insert(0, str(ROOT))

import demo_task as task  # noqa: E402
import torch  # noqa: E402
from demo_grow import TICK_STEPS, TICKS, Growth, grow  # noqa: E402

from kasmina_ext.plots import plot  # noqa: E402

BUDGET, SEED = 32, 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "seeds", metavar="DIR",
                        help="for seeds.png, seeds.html, seeds.safetensors (default: build/seeds)")  # fmt: skip
    parser.add_argument("--docs", action="store_true", help="also put the picture into docs/")
    parser.add_argument("--quick", action="store_true", help="a second, to see that it works; seeds do not live long")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)  # the same sums, and so the same picture, on any number of cores
    data = task.load(SEED, torch.device("cpu"))
    network = task.train_base(data, SEED, 60 if options.quick else task.BASE_STEPS, lambda _: None)
    network.requires_grad_(False)
    task.damage(network, "prune", SEED)
    before = task.accuracy(network, data.test)
    how = (
        Growth(BUDGET, tick_steps=1, ticks=48) if options.quick else Growth(BUDGET, tick_steps=TICK_STEPS, ticks=TICKS)
    )
    grown = grow(network, data, how, seed=SEED, on_step=lambda _: None)

    options.out.mkdir(parents=True, exist_ok=True)
    grown.history.save(options.out / "seeds.safetensors")
    pictures = [options.out / "seeds.png", options.out / "seeds.html"] + [ROOT / "docs" / "seeds.png"] * options.docs
    for path in pictures:
        plot(grown.history, path, title="A pruned network grows back")
        print(path)
    print(f"test accuracy {before:.1f} % before, {grown.accuracy:.1f} % after; {grown.kept} seeds kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
