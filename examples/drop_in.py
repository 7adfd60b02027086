"""One layer of a network that you already have, made one that grows.

A digit classifier loses 95 % of the weights of its hidden layer, and is frozen: nothing but seeds may be trained from
here on. One line puts a KasminaLayer in the layer's place. It changes no bit; a controller then wakes seeds where the
gradient asks for them, and keeps those that held-out images would miss.

    python examples/drop_in.py            # half a minute on two cores
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_ext import GrowthController, KasminaLayer, param_groups


def digits() -> tuple[tuple[Tensor, Tensor], ...]:
    """Images and labels to train on, to judge seeds by, and to test with."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return tuple((x[part], y[part]) for part in order.split([900, 400, 497]))


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return 100 * (model(data[0]).argmax(1) == data[1]).float().mean().item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], steps: int, each) -> None:
    for step in range(steps):
        rows = torch.randint(len(data[0]), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0][rows]), data[1][rows])
        loss.backward()
        optimizer.step()
        each(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of growth")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # for so small a network more would only wait for each other
    torch.manual_seed(0)
    training, held_out, test = digits()

    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), training, 600, each=lambda loss: None)
    print(f"healthy:  {accuracy(model, test):.1f} % of the test images")

    with torch.no_grad():
        weight = model[2].weight
        weight[weight.abs() < weight.abs().flatten().quantile(0.95)] = 0
    model.requires_grad_(False)
    damaged = accuracy(model, test)
    print(f"damaged:  {damaged:.1f} % (95 % of the hidden layer's weights are gone)")

    before = model(test[0])
    model[2] = KasminaLayer(model[2], chunk_size=4)  # the line
    print(f"wrapped:  {accuracy(model, test):.1f} %, same bits: {torch.equal(model(test[0]), before)}")

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        """One loss for each image."""
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    optimizer = torch.optim.AdamW(param_groups(model, lr=0.02))
    grow = GrowthController(model, optimizer, budget=0.75, tick_every=max(1, steps // 60), watch=2)
    train(model, optimizer, training, steps, each=grow.step)
    found = grow.evaluate(list(zip(*(part.split(40) for part in held_out), strict=True)), loss_fn)
    print(found)
    model[2].seed_report(per="state").show()

    repaired = accuracy(model, test)
    trained = 8 * found.alive  # a seed is a factor and a shift for each of 4 features
    everything = sum(parameter.numel() for parameter in model.parameters()) - model[2].blueprint_weights.numel()
    print(f"repaired: {repaired:.1f} % by {found.alive} seeds, {trained} numbers next to {everything:,} frozen ones")
    print(f"gained:   {repaired - damaged:+.1f} points")


if __name__ == "__main__":
    main()
