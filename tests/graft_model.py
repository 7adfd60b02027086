"""What the tests of grafting share: a model with every sort of sharing, and what may change of it."""

from __future__ import annotations

import torch
from folding import Scale
from torch import nn


class RMSNorm(Scale):
    """By its name a norm; nothing else says how many features it has."""


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """An embedding that is the head as well, blocks, and a norm that is registered twice."""

    def __init__(self, width=12, blocks=2):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = RMSNorm(width)
        self.last_norm = self.norm
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last_norm(x))


MLPS = ["blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.1.mlp.0", "blocks.1.mlp.2"]
ALL = ["embed", "blocks.0.norm", *MLPS[:2], "blocks.1.norm", *MLPS[2:], "norm", "head"]
IDS = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))


def tree(model):
    """Who holds which object under which key, and what may change of each."""
    return {
        (id(module), key): (id(child), child.training)
        for module in model.modules()
        for key, child in module._modules.items()
        if child is not None
    }


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def grow_some(seeds, size=0.3):
    """All seeds take part, with blueprints that do something."""
    assert seeds[:].graft()
    with torch.no_grad():
        for layer in seeds:
            layer.blueprint_weights += size * torch.randn_like(layer.blueprint_weights)
