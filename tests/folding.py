"""What the tests of folding share: grown layers, and a and b of each feature by the definition, in NumPy."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.layer import KasminaLayer

# Half of the distance from 1 to the next number.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def grow(layer, seed=0, strategies=(0, 1, 2, 3)):
    """Every lifecycle, alpha and blueprint, some outside of the bank; blueprints not far from neutral."""
    generator = torch.Generator().manual_seed(seed)

    def some(low, high):
        return torch.randint(low, high, (layer.num_seeds,), generator=generator)

    layer.lifecycle_states = some(0, 11)
    layer.lifecycle_states[: min(3, layer.num_seeds)] = torch.tensor([3, 7, 5], dtype=torch.int32)[: layer.num_seeds]
    layer.blueprint_ids = some(0, layer.num_blueprints - 1) if layer.num_blueprints > 1 else some(0, 1)
    if layer.num_seeds > 1:
        layer.blueprint_ids[layer.num_seeds - 1] = 99
    layer.grafting_strategies = torch.tensor(strategies)[some(0, len(strategies))]
    layer.alpha.copy_(torch.rand(layer.num_seeds, generator=generator))
    bank = torch.randn(layer.blueprint_weights.shape, generator=generator) * 0.5 + 1
    layer.blueprint_weights.data.copy_(bank)
    return layer


def effect(layer, dtype=None):
    """a and b of each feature, float64 ``[H]``: the table of strategies, in the type that the forward computes in.

    ``dtype``: of the activations, where the base layer has no tensor that says so.
    """
    base = layer.base_layer
    while isinstance(base, KasminaLayer):
        base = base.base_layer
    wide = any(t.dtype == torch.float64 for t in (*base.parameters(), *base.buffers()))
    kind = np.float64 if wide or dtype == torch.float64 else np.float32
    bank = layer.blueprint_weights.detach().cpu().double().numpy().astype(kind)
    a, b = np.ones(layer.hidden_dim), np.zeros(layer.hidden_dim)
    offsets = layer.seed_offsets.tolist()
    for seed, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        lifecycle, p, _, strategy = layer.state[:4, seed].tolist()
        rows = 2 if strategy == GraftingStrategy.AFFINE else 1
        if not (3 <= lifecycle <= 7 and 0 <= p <= len(bank) - rows):
            continue
        alpha, one, two = kind(layer.alpha[seed].item()), kind(1), kind(2)
        for f in range(start, stop):
            w = bank[p, f]
            scaled = (one - alpha) + alpha * w
            a[f] = {0: scaled, 1: one, 2: one - alpha / two, 3: scaled}[strategy]
            b[f] = {0: kind(0), 1: alpha * w, 2: alpha * w / two, 3: alpha * bank[min(p + 1, len(bank) - 1), f]}[
                strategy
            ]
    return torch.from_numpy(a), torch.from_numpy(b)


def bits(model):
    """Of everything that a state_dict has."""
    return {
        name: (t.dtype, t.detach().cpu().clone().view(torch.uint8 if t.dim() else t.dtype)) for name, t in _flat(model)
    }


def _flat(model):
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):  # of a quantised module
            continue
        yield name, tensor.contiguous().flatten() if tensor.dim() else tensor


def same(one, other):
    """Whether two results of :func:`bits` are equal."""
    return list(one) == list(other) and all(
        one[n][0] == other[n][0] and torch.equal(one[n][1], other[n][1]) for n in one
    )


def as_double(module):
    """A copy whose weights are these, exactly."""
    return copy.deepcopy(module).cpu().double().to(memory_format=torch.contiguous_format)


def along(values, dim, rank):
    """``[H]`` so that it broadcasts against dimension ``dim`` of a tensor of this rank."""
    shape = [1] * rank
    shape[dim] = -1
    return values.view(shape)


class Scale(nn.Module):
    """``weight * normalized``, weights of its own: what models call RMSNorm; ``offset`` 1 for the other fashion."""

    def __init__(self, features, offset=0.0, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features) + 0.5)
        if bias:
            self.bias = nn.Parameter(torch.randn(features))
        self.offset, self.eps = offset, 1e-6

    def forward(self, x):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        y = y * (self.offset + self.weight)
        return y + self.bias if hasattr(self, "bias") else y
