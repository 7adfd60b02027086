"""What tests of layers share: one to ask things of, whether anything of it changed, and the truth about one.

The truth is the table of strategies, written with autograd's own operations: outputs, all gradients, telemetry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_ext import KasminaLayer, TritonChunkedKasminaLayer

LIFE = ["germinated", "training", "grafting", "stabilization", "evaluating", "fine_tuning", "fossilized"]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}  # float64 in another order; dalpha is not asked for


def four_seeds(device: torch.device | str) -> TritonChunkedKasminaLayer:
    """Of 5 features each, all dormant."""
    return TritonChunkedKasminaLayer(nn.Linear(5, 20, device=device), 4)


def everything(layer: KasminaLayer) -> dict[str, Tensor]:
    """A copy of all that is saved of a layer."""
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def assert_unchanged(layer: KasminaLayer, before: dict[str, Tensor]) -> None:
    """Since :func:`everything` was taken."""
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def scatter(layer: KasminaLayer, seed: int = 0) -> KasminaLayer:
    """Idle seeds and grafted ones (not fossils, whose gradient is zero by decree) of every strategy, alpha and row."""
    draw = torch.Generator().manual_seed(seed)
    seeds, rows = layer.num_seeds, layer.num_blueprints
    layer.lifecycle_states = torch.tensor([3, 6, 0, 4, 5])[torch.randint(0, 5, (seeds,), generator=draw)]
    layer.blueprint_ids = torch.randint(0, rows - 1, (seeds,), generator=draw)
    layer.grafting_strategies = torch.randint(0, 4, (seeds,), generator=draw)
    layer.alpha.copy_(torch.rand(seeds, generator=draw))
    layer.blueprint_weights.data.copy_(1 + 0.5 * torch.randn(rows, layer.hidden_dim, generator=draw))
    return layer


def blended(layer: KasminaLayer, x: Tensor, feature_dim: int) -> Tensor:
    """What the layer should make of ``x``; differentiable in ``x`` and the bank, any number of times."""
    columns = list(x.movedim(feature_dim, -1).unbind(-1))
    offsets = layer.seed_offsets.tolist()
    for seed in range(layer.num_seeds):
        lifecycle, row, _, strategy = layer.state[:4, seed].tolist()
        if lifecycle not in range(3, 8):
            continue
        alpha = layer.alpha[seed].double()
        for feature in range(offsets[seed], offsets[seed + 1]):
            old, w = columns[feature], layer.blueprint_weights[row, feature]
            shift = layer.blueprint_weights[row + 1, feature] if strategy == 3 else 0.0
            new = (w * old, old + w, (old + w) / 2, w * old + shift)[strategy]
            columns[feature] = old + alpha * (new - old)
    return torch.stack(columns, -1).movedim(-1, feature_dim)


def check_layer(
    layer: KasminaLayer,
    *args: Any,
    feature_dim: int | None = None,
    pick: Callable[[Any], Tensor] = lambda out: out,
    **kwargs: Any,
) -> None:
    """One forward and backward of a float64 layer.

    ``pick`` finds the tensor in what comes back. ``feature_dim`` is where its features are, by default where the layer
    says.
    """
    dim = layer.feature_dim if feature_dim is None else feature_dim
    layer.reset_telemetry()
    y = pick(layer(*args, **kwargs))
    plain = pick(layer.base_layer(*args, **kwargs))
    want = blended(layer, plain, dim)
    torch.testing.assert_close(y, want, **TOLERANCE)
    assert y.stride() == torch.empty_like(plain).stride()

    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    names, parameters = zip(*((n, p) for n, p in layer.named_parameters() if p.requires_grad), strict=True)
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum(), [*inputs, *parameters])
    right = torch.autograd.grad((want * weight).sum(), [*inputs, *parameters], materialize_grads=True)
    for name, gradient, truth in zip([f"input {i}" for i in range(len(inputs))] + list(names), got, right, strict=True):
        torch.testing.assert_close(gradient, truth, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    check_telemetry(layer, [plain], dim)
    assert layer.grad_telemetry[:, 2].eq(1).all()


def check_telemetry(layer: KasminaLayer, seen: list[Tensor], feature_dim: int) -> None:
    """Count, mean, M2 and batches of everything that the base layer put out, in ``seen``."""
    rows = torch.cat([x.detach().movedim(feature_dim, -1).flatten(0, -2) for x in seen]).double()
    offsets = layer.seed_offsets.tolist()
    for seed in range(layer.num_seeds):
        chunk = rows[:, offsets[seed] : offsets[seed + 1]]
        mean = chunk.mean()
        moments = torch.stack([mean.new_tensor(chunk.numel()), mean, (chunk - mean).square().sum()])
        torch.testing.assert_close(layer.telemetry[seed, :3], moments, rtol=1e-6, atol=1e-9)
        assert layer.telemetry[seed, 3:].tolist() == [len(seen), 0]
