"""The demo's problem: handwritten digits, a small classifier, what happens to it, and the usual ways to repair it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from damage import prune_, quantize_, random_gains, scale_outputs_
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN_LAYERS, WIDTH, CLASSES = 4, 96, 10
BATCH = 128
HELD_OUT, TEST = 300, 497
PRUNED = 0.9
DAMAGES = ("prune", "quantize", "drift")

# Steps, and the learning rates that a control may choose from, by its accuracy on held-out images.
BASE_STEPS, BASE_LR = 600, 3e-3
LAST_LAYER_LRS = (1e-2, 3e-2, 1e-1)
FULL_LRS = (1e-3, 3e-3, 1e-2)

Step = Callable[[int], None]
"""Called with the number of steps just done: progress, and where Ctrl-C lands."""


# ---- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Images ``[n, 64]`` in [0, 1] and their digits, in three parts that share no image.

    ``train`` is trained on, ``held`` (held out) is judged on, ``test`` is only ever reported.
    """

    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def rotated(self) -> Data:
        """The same images, turned by 90 degrees: a new task for a network that knows the old one."""
        return self.seen_through(lambda images: images.unflatten(1, (8, 8)).rot90(1, (1, 2)).flatten(1))

    def seen_through(self, change: Callable[[Tensor], Tensor]) -> Data:
        """The same digits, their images changed."""
        return Data(*((change(images), digits) for images, digits in (self.train, self.held, self.test)))


def load(seed: int, device: torch.device) -> Data:
    """scikit-learn's 1797 digits. The test images are the same for every seed; the rest is dealt anew."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64, device=device)
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, pool = shuffled[:TEST], shuffled[TEST:]
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    parts = pool[HELD_OUT:], pool[:HELD_OUT], test
    return Data(*((images[part.to(device)], labels[part.to(device)]) for part in parts))


# ---- the network ---------------------------------------------------------------------------------


def classifier(seed: int, device: torch.device) -> nn.Sequential:
    """64 pixels, four hidden layers of 96 with ReLU, ten classes; initialised from ``seed``."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(HIDDEN_LAYERS):
        layers += [nn.Linear(WIDTH if i else 64, WIDTH), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))
    torch.set_rng_state(generator_state)
    return network.to(device)


def hidden(network: nn.Sequential) -> list[nn.Module]:
    """The hidden linear layers (or what wraps them)."""
    return [network[2 * i] for i in range(HIDDEN_LAYERS)]


def losses(network: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each image, without gradients."""
    with torch.no_grad():
        return F.cross_entropy(network(part[0]), part[1], reduction="none")


def accuracy(network: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Percent of the images that are recognised."""
    with torch.no_grad():
        return 100 * (network(part[0]).argmax(1) == part[1]).double().mean().item()


# ---- damage --------------------------------------------------------------------------------------


def damage(network: nn.Sequential, kind: str, seed: int) -> None:
    """Harm the hidden layers in place.

    prune: of each layer, the 90 % of the weights that are smallest become 0.
    quantize: weights become one of four levels, evenly spaced between the extremes of the layer.
    drift: every unit's output is scaled by a random gain, exp of a standard normal number.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in hidden(network):
        if kind == "prune":
            prune_(layer.weight, PRUNED)
        elif kind == "quantize":
            quantize_(layer.weight, 2)
        elif kind == "drift":
            scale_outputs_(layer, random_gains(WIDTH, generator).to(layer.weight.device))
        else:
            raise ValueError(f"unknown damage {kind!r}; known are {', '.join(DAMAGES)}")


# ---- training ------------------------------------------------------------------------------------


def batches(data: Data, steps: int, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    """``steps`` random batches of the training images; drawn on the CPU, so every device sees the same."""
    images, digits = data.train
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (steps, BATCH), generator=generator).to(images.device)
    for rows in chosen:
        yield images[rows], digits[rows]


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def train(
    network: nn.Module,
    trained: dict[nn.Parameter, Tensor | None],
    data: Data,
    *,
    steps: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.0,
    on_step: Step,
) -> None:
    """AdamW with a learning rate that falls to 0, on the parameters in ``trained``.

    Where a mask stands beside a parameter, only its elements under the mask move.
    """
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    for done, (images, digits) in enumerate(batches(data, steps, seed)):
        set_learning_rate(optimizer, lr * (1 - done / steps))
        optimizer.zero_grad()
        F.cross_entropy(network(images), digits).backward()
        for parameter, mask in trained.items():
            if mask is not None:
                parameter.grad.mul_(mask)
        optimizer.step()
        on_step(1)


def train_base(data: Data, seed: int, steps: int, on_step: Step) -> nn.Sequential:
    """The healthy network."""
    network = classifier(seed, data.train[0].device)
    everything = dict.fromkeys(network.parameters())
    train(
        network,
        everything,
        data,
        steps=steps,
        lr=BASE_LR,
        seed=seed,
        weight_decay=1e-2,
        on_step=on_step,
    )
    return network.requires_grad_(False)


# ---- the usual ways to repair it -----------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """What another way to repair the network reached."""

    accuracy: float
    parameters: int
    lr: float


def subset_of_last_layer(network: nn.Sequential, size: int, seed: int) -> dict[nn.Parameter, Tensor | None]:
    """``size`` elements of the last layer, chosen at random."""
    weight, bias = network[-1].weight, network[-1].bias
    total = weight.numel() + bias.numel()
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:size]
    mask = torch.zeros(total).index_fill_(0, chosen, 1.0).to(weight.device)
    return {weight: mask[: weight.numel()].view_as(weight), bias: mask[weight.numel() :]}


def last_layer(network: nn.Sequential) -> dict[nn.Parameter, Tensor | None]:
    return dict.fromkeys(network[-1].parameters())


def everything(network: nn.Sequential) -> dict[nn.Parameter, Tensor | None]:
    """Every weight that is not 0 (pruned ones stay pruned), and every bias."""
    return {p: (p != 0).to(p.dtype) if p.dim() == 2 else None for p in network.parameters()}


def control(
    damaged: nn.Sequential,
    choose: Callable[[nn.Sequential], dict[nn.Parameter, Tensor | None]],
    data: Data,
    *,
    steps: int,
    lrs: tuple[float, ...],
    seed: int,
    on_step: Step,
) -> Control:
    """Train a copy with each learning rate; the one that is best on held-out images is reported."""
    best, best_held = None, -1.0
    for lr in lrs:
        network = copy.deepcopy(damaged)
        trained = choose(network)
        for parameter in trained:
            parameter.requires_grad_(True)
        count = sum(p.numel() if m is None else int(m.sum()) for p, m in trained.items())
        train(network, trained, data, steps=steps, lr=lr, seed=seed, on_step=on_step)
        held = accuracy(network, data.held)
        if held > best_held:
            best_held, best = held, Control(accuracy(network, data.test), count, lr)
    return best
