"""Repairs of a character-level GPT whose matrices were pruned or quantized after it was trained."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from char_gpt import GPT, Corpus, Shape, even_windows, in_bfloat16, linear_names, losses, losses_over, random_windows
from damage import prune_, quantize_
from repair_methods import METHODS, OURS, Growing, Problem
from torch import nn

from kasmina_ext import calibrate_

METHODS_TRIED = tuple(METHODS)
STARTS = {"grow": 1e-1, OURS: 3e-2, "last layer": 3e-2, "IA3": 1e-1}
"""Where the first climbs for a rate begin, if not at ``START``: only what they cost depends on it."""
DAMAGES = ("50 % pruned", "70 % pruned", "80 % pruned", "3-bit weights", "2-bit weights")


@dataclass(frozen=True)
class Sizes:
    """How much is done; ``--tiny`` does next to nothing, all the same."""

    shape: Shape = Shape()
    train_batch: int = 64
    train_seconds: float = 25.0
    """About five times through the sources: after sixteen, the network was so used to them that whatever trained it on, with
    half of its weights pruned, made it better than it had been before.
    """
    train_steps: int = 10**9
    corpus_bytes: int | None = None
    batch: int = 32
    """Of repairs."""
    steps: int = 300
    tick_every: int = 10
    calibration_windows: int = 128
    val_windows: int = 512
    test_windows: int = 1024
    judged_batch: int = 256
    evaluation_windows: int = 256
    """That seeds are judged by, in two batches."""

    @property
    def growing(self) -> Growing:
        """Short lives: 300 steps are 30 ticks. Seeds germinate in two waves, and are judged once, in groups."""
        ticks = self.steps // self.tick_every
        settings = {"budget": 1.0, "scale": 0.02, "watch": 1, "wave": 0.5, "until": ticks // 2,
                    "points": 0, "exact": 0, "group": 0.1}  # fmt: skip
        return Growing(self.tick_every, (3 * ticks // 5,), settings)


TINY = Sizes(
    shape=Shape(layers=2, width=32, heads=2, context=32),
    train_batch=4,
    train_steps=40,
    batch=4,
    corpus_bytes=2_000_000,
    steps=20,
    tick_every=1,
    calibration_windows=8,
    val_windows=16,
    test_windows=16,
    judged_batch=8,
    evaluation_windows=8,
)


def damaged(healthy: GPT, corpus: Corpus, damage: str, sizes: Sizes, seed: int = 0) -> Problem:
    """The network after the damage to the matrices in its blocks, each on its own; ``seed`` draws what calibration sees."""
    network = copy.deepcopy(healthy)
    names = linear_names(network)
    for name in names:
        weight = network.get_submodule(name).weight
        if damage.endswith("pruned"):
            prune_(weight, int(damage.split()[0]) / 100)
        else:
            quantize_(weight, int(damage.split("-")[0]), per_row=True)
    context, batch = sizes.shape.context, sizes.batch
    val = even_windows(corpus.val, sizes.val_windows, sizes.judged_batch, context)
    test = even_windows(corpus.test, sizes.test_windows, sizes.judged_batch, context)
    unlabelled = next(random_windows(corpus.train, 1, sizes.calibration_windows, context - 1, seed))[0]

    def calibrate(model: nn.Module) -> None:
        with in_bfloat16(unlabelled.device):
            calibrate_(model, healthy, unlabelled.split(batch), memory=2**33, progress=False)

    judging = sizes.evaluation_windows // 2
    return Problem(
        network=network,
        names=names,
        last="head",
        chunk_size=16,
        calibrate=calibrate,
        losses=losses,
        batches=lambda seed: random_windows(corpus.train, sizes.steps, batch, context, 1000 + seed),
        steps=sizes.steps,
        held_out=even_windows(corpus.val, sizes.evaluation_windows, judging, context),
        judged=partial(judged, val, test),
        growing=sizes.growing,
        # As PEFT has it for GPT-2: keys and values with the queries, and what the feed-forward network has in the middle.
        ia3=(tuple(n for n in names if n.endswith(("qkv", "down"))), tuple(n for n in names if n.endswith("down"))),
    )


def judged(val: list, test: list, network: nn.Module) -> dict[str, Any]:
    """Losses in nats per character, and in bits; the error is the standard error over the windows of the test files."""
    found = losses_over(network, test).double()
    return {
        "score": [losses_over(network, val).mean().item()],
        "loss": found.mean().item(),
        "loss_error": (found.std() / math.sqrt(found.numel())).item(),
        "bits": found.mean().item() / math.log(2),
    }


def plain(sizes: Sizes) -> dict[str, Any]:
    """For the record."""
    return asdict(sizes) | {"growing": asdict(sizes.growing)}
