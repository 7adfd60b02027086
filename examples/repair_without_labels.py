"""Repairing a pruned network without labels.

A classifier of handwritten digits loses 90 % of its hidden weights. Of the undamaged network nothing is needed but what it
makes of a few images, whose digits nobody has to know: seeds around the hidden layers are fitted to that, in one sweep and
without a step of training. What is shipped is a plain network again.

    python examples/repair_without_labels.py   # half a minute on two cores
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import kasmina_ext as kx

TEST = 497


class Classifier(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        layers = [nn.Linear(64, width), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images))


def train(network: nn.Module, images: Tensor, digits: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), digits[rows]).backward()
        optimizer.step()


@torch.no_grad()
def prune(network: Classifier, share: float) -> None:
    for layer in network.hidden:
        if isinstance(layer, nn.Linear):
            smallest = layer.weight.abs().flatten().argsort()[: round(share * layer.weight.numel())]
            layer.weight.view(-1)[smallest] = 0


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, digits: Tensor) -> float:
    return 100 * (network(images).argmax(1) == digits).double().mean().item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Accuracies in percent, as they are printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of training the network that is to be damaged")
    parser.add_argument("--images", type=int, default=20, help="without labels, to repair it by")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    data = load_digits()
    shuffled = torch.randperm(len(data.data))
    images = torch.tensor(data.data, dtype=torch.float32)[shuffled] / 16
    digits = torch.tensor(data.target)[shuffled]
    known, test = (images[TEST:], digits[TEST:]), (images[:TEST], digits[:TEST])

    healthy = Classifier()
    train(healthy, *known, options.steps)
    model = copy.deepcopy(healthy)
    prune(model, 0.9)
    found = {"healthy": accuracy(healthy, *test), "pruned": accuracy(model, *test)}

    kx.graft_(model, "hidden.*", chunk_size=8)
    report = kx.calibrate_(model, healthy, [known[0][: options.images]])
    report.show()
    found["repaired"] = accuracy(model, *test)

    plain = kx.fold_(model)
    found["folded"] = accuracy(plain, *test)
    for name, percent in found.items():
        print(f"{name:<9} {percent:5.1f} %")
    return found


if __name__ == "__main__":
    main()
