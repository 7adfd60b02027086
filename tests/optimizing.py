"""A layer in a network, and optimizers that train it, for the tests of moments and fossils."""

from __future__ import annotations

import torch
from torch import nn

import kasmina_ext as kx

ANY = kx.TransitionRules.any()


class SignMomentum(torch.optim.Optimizer):
    """Like Lion: one moment, whose sign is the step."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (0.9 * moment + 0.1 * p.grad).sign())
                moment.lerp_(p.grad, 0.01)


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw-foreach-amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True, foreach=True),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "sgd-nesterov": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "lion-like": SignMomentum,
}


def network(device, **arguments):
    torch.manual_seed(0)
    layer = kx.KasminaLayer(nn.Linear(6, 16, device=device), num_seeds=4, num_blueprints=4, **arguments)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(16, 3, device=device))
    for name in ("germinated", "training", "grafting"):
        layer.request_state_transitions(None, name, [0, 1, 2, 0] if name == "germinated" else None)
    return model, layer


def steps(model, optimizer, count):
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator).to(device)
    y = torch.randint(0, 3, (32,), generator=generator).to(device)
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def moments(optimizer, layer):
    values = optimizer.state[layer.blueprint_weights].values()
    found = [v for v in values if isinstance(v, torch.Tensor) and v.shape == layer.blueprint_weights.shape]
    assert found
    return found


def used(layer, seeds):
    """bool [P, H] from the specification: the seeds' rows and features."""
    mask = torch.zeros_like(layer.blueprint_weights, dtype=torch.bool)
    offsets = layer.seed_offsets.tolist()
    for seed in seeds:
        p, rows = int(layer.blueprint_ids[seed]), 2 if int(layer.grafting_strategies[seed]) == 3 else 1
        mask[p : p + rows, offsets[seed] : offsets[seed + 1]] = True
    return mask


def backward(model, optimizer=None):
    """As in :func:`steps`, the gradient alone; added to what is there unless the optimizer is given."""
    if optimizer is not None:
        optimizer.zero_grad()
    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    device = next(model.parameters()).device
    nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
