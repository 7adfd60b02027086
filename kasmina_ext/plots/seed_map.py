"""A history cut down to what fits a picture: rows of seeds or of blocks of them, columns of snapshots."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kasmina_ext.credit import grafted
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.seed_record import NO_STATE, SeedHistory


@dataclass(frozen=True)
class LayerRows:
    """Where a layer lies in a map."""

    name: str
    seeds: int
    first: int
    """Its first row."""
    rows: int


@dataclass(frozen=True)
class SeedMap:
    """``R`` rows by ``K`` columns. A row is a seed or, where ``block`` is above 1, so many seeds of a layer, which are then
    sorted by when they began: those with like lives are together, and areas are as large as they are many.
    """

    layers: list[LayerRows]
    block: int
    """Seeds per row; the last row of a layer may have fewer."""
    order: Tensor
    """int64 ``[T]``: the seeds as the rows have them, by their numbers within their layers."""
    steps: list[int]
    """Of the columns."""
    snapshots: int
    """That there were; of more than fit, columns are some, the newest among them."""
    state: Tensor
    """uint8 ``[R, K]``: what most seeds of the row are, the later state where as many; 255 for what is none."""
    alpha: Tensor
    """float32 ``[R, K]``: mean over the grafted seeds; NaN where there are none."""
    credit: Tensor
    """float32 ``[R, K]``: the largest of either sign; NaN where not known."""
    change: Tensor
    """float32 ``[R, K]``: the largest of the grafted seeds; NaN where there are none."""

    @property
    def seeds(self) -> int:
        return sum(layer.seeds for layer in self.layers)

    @property
    def credit_limit(self) -> float:
        """The colours' end on both sides: 99 of 100 values are within; 0 where nothing is known."""
        sizes = self.credit[self.credit.isfinite()].abs()
        return sizes.sort().values[math.ceil(0.99 * (len(sizes) - 1))].item() if len(sizes) else 0.0

    @property
    def change_range(self) -> tuple[float, float]:
        """The colours' ends, on a scale of logarithms: at most three decades below the largest; zeros where nothing moved."""
        sizes = self.change[self.change.isfinite() & (self.change > 0)]
        if not len(sizes):
            return 0.0, 0.0
        high = sizes.max().item()
        return max(sizes.min().item(), high / 1000), high

    @property
    def title(self) -> str:
        return (
            f"{counted(self.seeds, 'seed')} in {counted(len(self.layers), 'layer')}, "
            f"{counted(self.snapshots, 'snapshot')}"
        )

    @property
    def note(self) -> str:
        """What was left out, in a sentence; "" where nothing was."""
        said = []
        if self.block > 1:
            said.append(
                f"A row is {self.block} seeds of a layer, sorted by when they began: the state of most, the mean alpha of "
                "those grafted, the largest credit and change."
            )
        if len(self.steps) < self.snapshots:
            said.append(f"{len(self.steps)} of {self.snapshots:,} snapshots are shown.")
        return " ".join(said)


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """What is nothing to see (control characters, halves of surrogates, marks that turn a line round) as U+FFFD."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def heading(title: str | None) -> str:
    """Of picture and page."""
    return printable(title or "Seeds over time")


def seed_map(history: SeedHistory, max_rows: int, max_columns: int = 512) -> SeedMap:
    """The map of a history, of at most ``max_rows`` rows (but one for each layer) and ``max_columns`` columns."""
    every = math.ceil(len(history.steps) / max_columns)
    columns = list(range(len(history.steps) - 1, -1, -every))[::-1]
    sizes = list(history.layers.values())
    block = _block_size(sizes, max_rows)
    counts = [math.ceil(size / block) for size in sizes]
    state = history.state[columns].t()
    order = torch.cat([_by_life(part) if block > 1 else torch.arange(len(part)) for part in state.split(sizes)])
    places = torch.cat([order_of + first for order_of, first in zip(order.split(sizes), _starts(sizes), strict=True)])
    state = state[places]
    here = grafted(state)
    values = {name: getattr(history, name)[columns].t()[places].float() for name in ("alpha", "credit", "change")}
    for name in ("alpha", "change"):  # of others they mean nothing
        values[name] = values[name].masked_fill(~here, torch.nan)

    def rows(tensor: Tensor, merge: Callable[[Tensor], Tensor]) -> Tensor:
        if block == 1:
            return tensor.contiguous()
        return torch.cat([merge(_blocks(part, block)) for part in tensor.split(sizes)])

    return SeedMap(
        layers=[LayerRows(*each) for each in zip(history.layers, sizes, _starts(counts), counts, strict=True)],
        block=block,
        order=order,
        steps=[history.steps[column] for column in columns],
        snapshots=len(history.steps),
        state=rows(state, _majority),
        alpha=rows(values["alpha"], lambda blocks: blocks.nanmean(1)),
        credit=rows(values["credit"], _largest),
        change=rows(values["change"], _largest),
    )


def _starts(sizes: list[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _by_life(state: Tensor) -> Tensor:
    """int64 ``[S]``: seeds of ``state [S, K]`` by when they left DORMANT, then by what has become of them, then by number."""
    begun = state != int(ExtendedLifecycle.DORMANT)
    first = torch.where(begun.any(1), begun.to(torch.uint8).argmax(1), state.size(1))
    return (first * 256 + state[:, -1].long()).argsort(stable=True)


def _block_size(sizes: list[int], max_rows: int) -> int:
    low, high = 1, max(sizes)
    while low < high:
        middle = (low + high) // 2
        if sum(math.ceil(size / middle) for size in sizes) <= max_rows:
            high = middle
        else:
            low = middle + 1
    return low


_MISSING = 254  # of a block that is not full: no state, nor what NO_STATE stands for


def _blocks(tensor: Tensor, block: int) -> Tensor:
    """``[r, block, K]`` of a layer's ``[S, K]``; the last block is filled up."""
    seeds, columns = tensor.shape
    missing = -seeds % block
    filler = tensor.new_full((missing, columns), torch.nan if tensor.is_floating_point() else _MISSING)
    return torch.cat([tensor, filler]).view(-1, block, columns)


def _majority(blocks: Tensor) -> Tensor:
    """Of equally many, the later state; NO_STATE only where it is alone the most."""
    states = [NO_STATE, *range(len(ExtendedLifecycle))]
    most = torch.full_like(blocks[:, 0], NO_STATE)
    record = torch.zeros_like(most, dtype=torch.int32)
    for state in states:
        count = (blocks == state).sum(1, dtype=torch.int32)
        more = (count >= record) & (count > 0)
        most, record = torch.where(more, state, most), torch.where(more, count, record)
    return most


def _largest(blocks: Tensor) -> Tensor:
    """Of either sign; NaN where all are."""
    high = blocks.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1)
    low = blocks.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).amin(1)
    largest = torch.where(high.abs() >= low.abs(), high, low)
    return largest.masked_fill(blocks.isnan().all(1), torch.nan)
