"""The Triton package's small layers and kernel wrapper: their formulas written out, feature by feature."""

from __future__ import annotations

import copy
import functools
import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kasmina_ext import KasminaLayer, compat, credit
from kasmina_ext.compat import KasminaForwardKernel, SimpleTritonLayer, TritonKasminaLayer

HIDDEN, SEEDS, CHUNK = 22, 4, 5  # features 20 and 21 are unowned


def formula(kind, x, w, blend=1.0):
    return {
        "mul": lambda: x * w,
        "add": lambda: x + w,
        "mixed": lambda: (x + w) / 2,
        "linear": lambda: (1 - blend) * x + blend * (x * w),
    }[kind]()


# ---- SimpleTritonLayer -----------------------------------------------------------------------------------------------


def test_simple_starts_as_the_identity(device):
    layer = SimpleTritonLayer(HIDDEN, SEEDS, CHUNK).to(device)
    assert dict(layer.named_buffers()).keys() == {"lifecycle", "blueprint", "strategy", "weights"}
    assert list(layer.parameters()) == []
    assert [(b.dtype, tuple(b.shape)) for b in layer.buffers()] == [
        *[(torch.int32, (SEEDS,))] * 3,
        (torch.float32, (10, HIDDEN)),
    ]
    x = torch.randn(3, HIDDEN, device=device)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("shape", [(HIDDEN,), (6, HIDDEN), (2, 3, HIDDEN)])
def test_simple_strategies(device, shape):
    layer = SimpleTritonLayer(HIDDEN, SEEDS, CHUNK).to(device)
    layer.activate_seed(0, 3, 0)
    layer.activate_seed(1, blueprint_id=9, strategy=1)
    layer.activate_seed(3, 1, strategy=2)
    assert layer.lifecycle.tolist() == [3, 3, 0, 3]
    x = torch.randn(shape, device=device, requires_grad=True)
    expected = x.clone()
    for seed, row, kind in ((0, 3, "mul"), (1, 9, "add"), (3, 1, "mixed")):
        part = slice(seed * CHUNK, (seed + 1) * CHUNK)
        expected[..., part] = formula(kind, x[..., part], layer.weights[row, part])
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad[..., :CHUNK].allclose(layer.weights[3, :CHUNK].expand_as(x[..., :CHUNK]))


def test_simple_defaults():
    layer = SimpleTritonLayer(hidden_dim=8, num_seeds=2, chunk_size=4)
    layer.activate_seed(1)
    assert (layer.lifecycle.tolist(), layer.blueprint.tolist(), layer.strategy.tolist()) == ([0, 3], [0, 0], [0, 0])
    x = torch.randn(2, 8)
    torch.testing.assert_close(layer(x)[:, 4:], x[:, 4:] * layer.weights[0, 4:])
    signature = inspect.signature(SimpleTritonLayer.activate_seed)
    assert [p.default for p in signature.parameters.values()][2:] == [0, 0]


@pytest.mark.parametrize("garbage", [{"strategy": 3}, {"strategy": -1}, {"blueprint": 10}, {"lifecycle": 8}])
def test_what_no_kernel_knows_is_the_identity(device, garbage):
    layer = SimpleTritonLayer(HIDDEN, SEEDS, CHUNK).to(device)
    for seed in range(SEEDS):
        layer.activate_seed(seed)
    for name, value in garbage.items():
        getattr(layer, name).fill_(value)
    x = torch.randn(3, HIDDEN, device=device)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SEEDS,), r"seed_id must be in \[0, 4\)"),
        ((0, 10), r"blueprint_id must be in \[0, 10\), got 10"),
        ((0, -1), "blueprint_id"),
        ((0, 0, 3), r"strategy must be in \[0, 3\), got 3"),
        ((0, 0, -1), "strategy"),
    ],
)
def test_simple_bad_seeds(arguments, message):
    layer = SimpleTritonLayer(HIDDEN, SEEDS, CHUNK)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    with pytest.raises(ValueError, match=message):
        layer.activate_seed(*arguments)
    assert all(torch.equal(b, before[name]) for name, b in layer.named_buffers())


def test_more_chunks_than_features(device):
    layer = SimpleTritonLayer(7, 4, 3).to(device)
    for seed in range(4):
        layer.activate_seed(seed, 0, 1)
    x = torch.randn(2, 7, device=device)
    torch.testing.assert_close(layer(x), x + layer.weights[0])


# ---- TritonKasminaLayer ----------------------------------------------------------------------------------------------


def test_blended_strategies(device):
    layer = TritonKasminaLayer(HIDDEN, SEEDS, CHUNK).to(device)
    names = {"lifecycle_states", "blueprint_ids", "grafting_strategies", "blend_factors", "blueprint_weights"}
    assert dict(layer.named_buffers()).keys() == names
    assert layer.blend_factors.tolist() == [0.5] * SEEDS and layer.blend_factors.dtype == torch.float32
    layer.set_seed_state(0, 3, 2)
    layer.set_seed_state(1, "fine_tuning", 4, 0, 0.25)
    layer.set_seed_state(2, 4, blueprint_id=1, grafting_strategy=1, blend_factor=0.1)
    layer.set_seed_state(3, 7, 0, 2)
    assert layer.lifecycle_states.tolist() == [3, 6, 4, 7]
    x = torch.randn(9, HIDDEN, device=device)
    expected = x.clone()
    for seed, row, kind, blend in ((0, 2, "linear", 0.5), (1, 4, "linear", 0.25), (2, 1, "mul", 1), (3, 0, "add", 1)):
        part = slice(seed * CHUNK, (seed + 1) * CHUNK)
        expected[:, part] = formula(kind, x[:, part], layer.blueprint_weights[row, part], blend)
    torch.testing.assert_close(layer(x), expected)
    layer.set_seed_state(0, "culled")
    assert torch.equal(layer(x)[:, :CHUNK], x[:, :CHUNK])


def test_telemetry_is_of_the_last_forward(device):
    layer = TritonKasminaLayer(HIDDEN, SEEDS, CHUNK).to(device)
    empty = layer.get_telemetry()
    assert list(empty) == ["mean", "variance", "std", "count"]
    assert np.isnan(empty["mean"]).all() and empty["count"].tolist() == [0.0] * SEEDS
    layer.set_seed_state(1, 3)
    layer(torch.randn(50, HIDDEN, device=device))
    x = torch.randn(8, HIDDEN, device=device) * 3 + 1
    layer(x)
    seen = layer.get_telemetry()
    chunks = x[:, : SEEDS * CHUNK].double().cpu().numpy().reshape(8, SEEDS, CHUNK)
    assert all(isinstance(values, np.ndarray) and values.shape == (SEEDS,) for values in seen.values())
    np.testing.assert_allclose(seen["mean"], chunks.mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(seen["variance"], chunks.var((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(seen["std"], chunks.std((0, 2)), rtol=1e-5)
    assert seen["count"].tolist() == [8.0 * CHUNK] * SEEDS


def kept(context, operator, *args, **kwargs):
    keeps = operator is torch.ops.kasmina.chunked_forward.default
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = {"context_fn": functools.partial(create_selective_checkpoint_contexts, kept)}


@pytest.mark.parametrize("reentrant, options", [(False, {}), (True, {}), (False, SELECTIVE)])
def test_telemetry_is_not_of_activations_that_are_computed_again(device, reentrant, options):
    layer = TritonKasminaLayer(HIDDEN, SEEDS, CHUNK).to(device)
    x = torch.randn(6, HIDDEN, device=device, requires_grad=True)
    checkpoint(lambda x: layer(x.sin()).square(), x, use_reentrant=reentrant, **options).sum().backward()
    assert layer.get_telemetry()["count"].tolist() == [6.0 * CHUNK] * SEEDS


def test_telemetry_that_is_off_and_passes_that_only_measure():
    model = nn.Sequential(TritonKasminaLayer(HIDDEN, SEEDS, CHUNK), KasminaLayer(nn.Linear(HIDDEN, 4), num_seeds=2))
    x = torch.randn(6, HIDDEN)
    model(x)
    before = model[0].get_telemetry()
    credit(model, [x + 1, x + 2], lambda batch: model(batch).square().mean())
    model[0].telemetry_enabled = False
    model(x + 3)
    for name, values in model[0].get_telemetry().items():
        np.testing.assert_array_equal(values, before[name])
    model[0].telemetry_enabled = True
    model(x + 3)
    assert (model[0].get_telemetry()["mean"] > before["mean"] + 2).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, 3), ValueError, "seed_id"),
        ((0, 11), ValueError, "unknown lifecycle state 11"),
        ((0, 3, 10), ValueError, "blueprint_id must be in"),
        ((0, 3, 0, 3), ValueError, "strategy must be in"),
        ((0, 3, 0, 0, 1.5), ValueError, r"blend_factor must be in \[0, 1\], got 1.5"),
        ((0, 3, 0, 0, float("nan")), ValueError, "blend_factor"),
        ((0.5, 3), TypeError, "seed_id must be an integer"),
    ],
)
def test_blended_bad_seeds(arguments, error, message):
    layer = TritonKasminaLayer(HIDDEN, SEEDS, CHUNK)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    with pytest.raises(error, match=message):
        layer.set_seed_state(*arguments)
    assert all(torch.equal(b, before[name]) for name, b in layer.named_buffers())


@pytest.mark.parametrize("kind", [SimpleTritonLayer, TritonKasminaLayer])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_casts_copies_and_state_dicts(device, kind, dtype):
    layer = kind(HIDDEN, SEEDS, CHUNK).to(device, dtype)
    activate = layer.activate_seed if kind is SimpleTritonLayer else lambda s, p, k: layer.set_seed_state(s, 3, p, k)
    activate(2, 5, 1)
    x = torch.randn(3, HIDDEN, device=device, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and not torch.equal(y, x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    other = kind(HIDDEN, SEEDS, CHUNK).to(device, dtype)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("kind", [SimpleTritonLayer, TritonKasminaLayer, KasminaForwardKernel])
def test_bad_sizes(kind):
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, -1)):
        with pytest.raises(ValueError, match="must be at least 1"):
            kind(*sizes)
    with pytest.raises(TypeError, match="must be an integer, got float"):
        kind(8.0, 2, 4)


# ---- KasminaForwardKernel --------------------------------------------------------------------------------------------


def kernel_input(device):
    state = torch.zeros(SEEDS, 8, device=device)
    state[:, 1] = torch.tensor([2.0, 1.0, 0.0, -1.0])
    state[:, 3] = torch.tensor([0.0, 1.0, 2.0, 0.0])
    state[:, 4] = torch.tensor([0.75, 0.1, 0.2, 0.3])
    state[:, 0] = torch.tensor([3.0, 7.0, 5.0, 3.0])
    return torch.randn(6, HIDDEN, device=device), state, torch.randn(4, HIDDEN, device=device)


def test_kernel_writes_output_and_adds_telemetry(device):
    x, state, weights = kernel_input(device)
    kernel = KasminaForwardKernel(SEEDS, CHUNK, HIDDEN)
    output, telemetry = torch.full_like(x, torch.nan), torch.zeros(SEEDS, 4, device=device)
    assert kernel(x, state, weights, output, telemetry) is output
    expected = x.clone()
    for seed, row, kind in ((0, 2, "linear"), (1, 1, "mul"), (2, 0, "add")):
        part = slice(seed * CHUNK, (seed + 1) * CHUNK)
        expected[:, part] = formula(kind, x[:, part], weights[row, part], 0.75)
    torch.testing.assert_close(output, expected)
    chunks = x[:, : SEEDS * CHUNK].reshape(6, SEEDS, CHUNK)
    once = [chunks.sum((0, 2)), chunks.square().sum((0, 2)), torch.full((SEEDS,), 30.0), torch.ones(SEEDS)]
    torch.testing.assert_close(telemetry, torch.stack([column.to(device) for column in once], 1))
    kernel(x, state, weights, output, telemetry)
    torch.testing.assert_close(telemetry, 2 * torch.stack([column.to(device) for column in once], 1))
    assert torch.equal(kernel(x, state, weights), output)


def test_kernel_may_write_in_place(device):
    x, state, weights = kernel_input(device)
    expected = KasminaForwardKernel(SEEDS, CHUNK, HIDDEN)(x, state, weights)
    KasminaForwardKernel(SEEDS, CHUNK, HIDDEN)(x, state, weights, x)
    assert torch.equal(x, expected)


def test_kernel_with_garbage_in_its_state(device):
    x, state, weights = kernel_input(device)
    for garbage in (torch.nan, torch.inf, -1e30, 1e30):
        state[:, :4] = garbage
        assert torch.equal(KasminaForwardKernel(SEEDS, CHUNK, HIDDEN)(x, state, weights), x)


def test_kernel_bad_shapes(device):
    x, state, weights = kernel_input(device)
    telemetry = torch.zeros(SEEDS, 4, device=device)
    good = {"activations": x, "state": state, "weights": weights, "output": x.clone(), "telemetry": telemetry}
    bad = {"activations": x[:, 1:], "state": state[1:], "weights": weights[:, 1:], "output": x[1:], "telemetry": state}
    kernel = KasminaForwardKernel(SEEDS, CHUNK, HIDDEN)
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            kernel(**{**good, name: tensor})
        assert not telemetry.any() and torch.equal(good["output"], x)


def test_the_module_is_public():
    import kasmina_ext

    assert kasmina_ext.compat is compat
