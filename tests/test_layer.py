"""Building a layer, and what its forward computes, against closed forms in float64."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from kasmina_ext import flags
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.layer import KasminaLayer, TritonChunkedKasminaLayer
from kasmina_ext.state import StateVar

BUFFERS = {
    "seed_offsets": torch.int32,
    "state": torch.int32,
    "alpha": torch.float32,
    "telemetry": torch.float64,
    "grad_telemetry": torch.float64,
    "history": torch.int32,
    "history_count": torch.int32,
    "performance_metrics": torch.float32,
}
GRAFTED = range(3, 8)


def owners(layer):
    """Feature -> seed or None, from the offsets by their definition."""
    offsets = layer.seed_offsets.tolist()
    found = [None] * layer.hidden_dim
    for seed, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        for feature in range(start, end):
            assert found[feature] is None
            found[feature] = seed
    return found


def expected_output(layer, x):
    """y for x (..., H) in float64, feature by feature by the table of g and y = x + alpha (g - x)."""
    bank = layer.blueprint_weights.detach().double()
    y = x.detach().double().clone()
    for feature, seed in enumerate(owners(layer)):
        if seed is None:
            continue
        lifecycle, p, _, strategy = layer.state[:4, seed].tolist()
        rows = 2 if strategy == 3 else 1
        if lifecycle not in GRAFTED or strategy not in range(4) or not 0 <= p <= len(bank) - rows:
            continue
        old, w = y[..., feature].clone(), bank[p, feature]
        v = bank[p + 1, feature] if strategy == 3 else 0.0
        g = {0: w * old, 1: old + w, 2: (old + w) / 2, 3: w * old + v}[strategy]
        y[..., feature] = old + layer.alpha[seed].double() * (g - old)
    return y


def scramble(layer, seed=0):
    """Every state, strategy and blueprint, ids outside the bank too."""
    generator = torch.Generator().manual_seed(seed)
    seeds = layer.num_seeds
    layer.lifecycle_states = torch.randint(0, 11, (seeds,), generator=generator)
    layer.blueprint_ids = torch.randint(-2, layer.num_blueprints + 2, (seeds,), generator=generator)
    layer.grafting_strategies = torch.randint(-1, 5, (seeds,), generator=generator)
    layer.alpha.copy_(torch.rand(seeds, generator=generator))
    layer.blueprint_weights.data.copy_(torch.randn(layer.blueprint_weights.shape, generator=generator))


# ---- building ----------------------------------------------------------------------------------------


def test_defaults_of_the_layer_for_new_code():
    layer = KasminaLayer(nn.Linear(4, 96))
    assert (layer.num_seeds, layer.chunk_size, layer.num_blueprints) == (6, 16, 2)
    assert layer.seed_offsets.tolist() == [0, 16, 32, 48, 64, 80, 96]
    assert torch.equal(layer.blueprint_weights, torch.tensor([1.0, 0.0])[:, None].expand(2, 96))
    assert isinstance(layer.blueprint_weights, nn.Parameter)
    assert layer.grafting_strategies.tolist() == [3] * 6
    assert layer.strategy is GraftingStrategy.AFFINE


def test_defaults_of_the_drop_in():
    layer = TritonChunkedKasminaLayer(nn.Linear(4, 2050))
    assert (layer.chunks_per_layer, layer.chunk_size, layer.hidden_dim) == (1000, 2, 2050)
    assert layer.seed_offsets.tolist() == list(range(0, 2001, 2))
    assert layer.enable_triton is True and layer.telemetry_enabled is True
    assert layer.checkpoint_dir is None and layer.blueprint_registry == {}
    assert layer.state_tensor.tolist() == [[0, -1, 0, 0, 0, -1, 0, 0]] * 1000
    assert layer.alpha.tolist() == [1.0] * 1000
    bank = layer.blueprint_weights
    assert bank.shape == (10, 2050) and abs(bank.mean()) < 0.05 and abs(bank.std() - 1) < 0.05


@pytest.mark.parametrize("kind", [KasminaLayer, TritonChunkedKasminaLayer])
def test_buffers_are_exactly_these(kind):
    layer = kind(nn.Linear(4, 32))
    own = {name: b.dtype for name, b in layer.named_buffers() if not name.startswith("base_layer.")}
    assert own == BUFFERS
    assert [n for n, _ in layer.named_parameters()] == [
        "blueprint_weights",
        "base_layer.weight",
        "base_layer.bias",
    ]


@pytest.mark.parametrize(
    ("strategy", "blueprints", "rows"),
    [
        ("multiplicative", 3, [1, 1, 1]),
        ("additive", 2, [0, 0]),
        ("mixed", 1, [0]),
        ("affine", 5, [1, 0, 1, 0, 1]),
    ],
)
def test_bank_starts_neutral(strategy, blueprints, rows):
    layer = KasminaLayer(nn.Linear(4, 8), strategy=strategy, num_blueprints=blueprints)
    assert layer.blueprint_weights.tolist() == [[row] * 8 for row in rows]


@pytest.mark.parametrize(
    ("features", "seeds", "chunking", "offsets"),
    [
        (10, 3, "uniform", [0, 3, 6, 9]),
        (10, 3, "balanced", [0, 4, 7, 10]),
        (3, 5, "uniform", [0, 1, 2, 3, 3, 3]),
        (3, 5, "balanced", [0, 1, 2, 3, 3, 3]),
        (1, 1, "uniform", [0, 1]),
        (7, 7, "balanced", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_chunk_maps(features, seeds, chunking, offsets):
    layer = KasminaLayer(nn.Linear(2, features), num_seeds=seeds, chunking=chunking)
    assert layer.seed_offsets.tolist() == offsets
    assert layer.chunk_size == max(1, features // seeds)


@pytest.mark.parametrize(("features", "size", "seeds"), [(96, 8, 12), (100, 16, 6), (31, 16, 2), (5, 16, 1)])
def test_chunk_size_chooses_the_number_of_seeds(features, size, seeds):
    assert KasminaLayer(nn.Linear(2, features), chunk_size=size).num_seeds == seeds


class Unknown(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("base", "hidden_dim", "feature_dim"),
    [
        (nn.Linear(3, 8), 8, -1),
        (nn.Conv1d(3, 8, 1), 8, 1),
        (nn.Conv2d(3, 8, 1), 8, 1),
        (nn.ConvTranspose3d(3, 8, 1), 8, 1),
        (nn.BatchNorm2d(8), 8, 1),
        (nn.GroupNorm(2, 8), 8, 1),
        (nn.LayerNorm(8), 8, -1),
        (nn.LayerNorm((4, 8)), 8, -1),
        (nn.Embedding(5, 8), 8, -1),
        (nn.Bilinear(3, 3, 8), 8, -1),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 8), nn.ReLU()), 8, -1),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), 8, 1),
        (nn.TransformerEncoderLayer(8, 2, 16), 8, -1),
        (KasminaLayer(nn.Conv2d(3, 8, 1)), 8, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_features_are_found(base, hidden_dim, feature_dim):
    layer = KasminaLayer(base)
    assert (layer.hidden_dim, layer.feature_dim) == (hidden_dim, feature_dim)


def test_numbers_from_numpy():
    base = nn.Linear(4, 32)
    base.out_features = np.int64(32)
    layer = KasminaLayer(base, num_seeds=np.int64(4), num_blueprints=np.uint8(3), ramp_epochs=np.int32(5))
    assert (layer.num_seeds, layer.num_blueprints, layer.hidden_dim, layer.ramp_epochs) == (4, 3, 32, 5)
    assert type(layer.hidden_dim) is int and KasminaLayer(base, chunk_size=np.int64(8)).num_seeds == 4
    assert layer.request_state_transition(np.int64(1), np.int64(1), {"blueprint": np.int64(1)})
    assert layer.request_state_transitions(np.int64(1), np.int64(2)).tolist() == [0]
    assert layer.lifecycle_states.tolist() == [0, 2, 0, 0]


def test_features_can_be_given():
    x = torch.randn(5, 6)
    layer = KasminaLayer(Unknown(), hidden_dim=6, chunk_size=2)
    assert torch.equal(layer(x), x) and layer.num_seeds == 3
    across = KasminaLayer(Unknown(), hidden_dim=5, feature_dim=0)
    assert torch.equal(across(x), x) and across.telemetry[0, 0] == 30
    inside = KasminaLayer(nn.Sequential(nn.Linear(3, 6), nn.Flatten(0)), hidden_dim=12)
    assert inside(torch.randn(2, 3)).shape == (12,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((Unknown(),), {}), ValueError, "cannot tell how many features Unknown puts out.*pass hidden_dim"),
        (((nn.Sequential(),), {}), ValueError, "cannot tell how many features Sequential"),
        (((nn.Linear(3, 8),), {"hidden_dim": 9}), ValueError, "hidden_dim is 9, but Linear puts out 8"),
        (((Unknown(),), {"hidden_dim": 0}), ValueError, "hidden_dim must be at least 1"),
        (((nn.LazyBatchNorm1d(),), {}), ValueError, "run a lazy module once"),
        (((torch.relu,), {}), TypeError, "base_layer must be a torch.nn.Module"),
        (((nn.Linear(3, 8),), {"chunk_size": 0}), ValueError, "chunk_size must be at least 1, got 0"),
        (((nn.Linear(3, 8),), {"chunk_size": 2.0}), TypeError, "chunk_size must be an integer, got float"),
        (((nn.Linear(3, 8),), {"num_seeds": -4}), ValueError, "num_seeds must be at least 1"),
        (((nn.Linear(3, 8),), {"num_seeds": True}), TypeError, "num_seeds"),
        (((nn.Linear(3, 8),), {"num_blueprints": 0}), ValueError, "num_blueprints"),
        (((nn.Linear(3, 8),), {"num_blueprints": 1}), ValueError, "AFFINE takes 2 rows of the bank"),
        (((nn.Linear(3, 8),), {"strategy": "grow"}), ValueError, "unknown grafting strategy 'grow'"),
        (((nn.Linear(3, 8),), {"alpha_schedule": "step"}), ValueError, "unknown alpha schedule 'step'"),
        (((nn.Linear(3, 8),), {"chunking": "random"}), ValueError, "chunking must be one of uniform, balanced"),
        (((nn.Linear(3, 8),), {"blueprint_dtype": torch.int8}), ValueError, "blueprint_dtype"),
        (((nn.Linear(3, 8), 4), {}), TypeError, "positional"),
    ],
)
def test_bad_arguments(arguments, error, message):
    positional, named = arguments
    with pytest.raises(error, match=message):
        KasminaLayer(*positional, **named)


@pytest.mark.parametrize("seeds", [0, -1, 2.5, None])
def test_bad_number_of_chunks(seeds):
    with pytest.raises((ValueError, TypeError), match="chunks_per_layer"):
        TritonChunkedKasminaLayer(nn.Linear(3, 8), seeds)


@pytest.mark.parametrize(
    ("base_dtype", "given", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_bank(base_dtype, given, expected):
    layer = KasminaLayer(nn.Linear(3, 8, dtype=base_dtype), blueprint_dtype=given)
    assert layer.blueprint_weights.dtype == expected
    assert layer(torch.randn(2, 3, dtype=base_dtype)).dtype == base_dtype


def test_everything_is_where_the_base_layer_is(device):
    layer = KasminaLayer(nn.Linear(3, 8, device=device))
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {device.type}
    assert layer.device.type == device.type
    moved = TritonChunkedKasminaLayer(nn.Linear(3, 8), 4, device)
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {device.type}
    assert moved(torch.randn(2, 3, device=device)).device.type == device.type


def test_repr_and_summary():
    layer = TritonChunkedKasminaLayer(nn.Linear(3, 10), 4)
    assert "hidden_dim=10, num_seeds=4, chunk_size=2, chunking='uniform'" in repr(layer)
    layer.lifecycle_states[:3] = torch.tensor([8, 1, 0])
    with flags.override(triton_kernels=False):
        assert layer.get_performance_summary() == {
            "total_seeds": 4,
            "active_seeds": 2,
            "active_ratio": 0.5,
            "triton_enabled": False,
            "chunk_size": 2,
            "hidden_dim": 10,
            "device": "cpu",
        }


# ---- forward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 3), (0, 3)], ids=str)
def test_dormant_is_the_base_layer_bit_for_bit(device, shape):
    layer = KasminaLayer(nn.Linear(3, 40, device=device))
    x = torch.randn(*shape, device=device)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("chunking", ["uniform", "balanced"])
@pytest.mark.parametrize("enable", [True, False], ids=["kernels", "reference"])
def test_values_for_every_state_and_strategy(device, chunking, enable):
    base = nn.Linear(6, 157, device=device, dtype=torch.float64)
    layer = KasminaLayer(base, num_seeds=60, num_blueprints=4, chunking=chunking, enable_kernels=enable)
    scramble(layer)
    x = torch.randn(7, 6, device=device, dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected_output(layer, base(x)), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (nn.Conv1d(3, 10, 3), (2, 3, 9)),
        (nn.Conv1d(3, 10, 3), (3, 9)),
        (nn.Conv2d(3, 10, 3), (2, 3, 6, 5)),
        (nn.Conv2d(3, 10, 3), (3, 6, 5)),
        (nn.ConvTranspose2d(3, 10, 3), (3, 6, 5)),
        (nn.Conv3d(3, 10, 2), (2, 3, 4, 3, 5)),
        (nn.BatchNorm1d(10), (6, 10)),
        (nn.BatchNorm1d(10), (6, 10, 4)),
        (nn.GroupNorm(5, 10), (6, 10, 2, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_features_in_the_second_dimension(device, base, shape):
    layer = KasminaLayer(base.double().to(device), num_seeds=4, num_blueprints=4)
    scramble(layer, seed=3)
    x = torch.randn(shape, device=device, dtype=torch.float64)
    layer.eval()
    plain, y = layer.base_layer(x), layer(x)
    channels = 0 if isinstance(base, nn.modules.conv._ConvNd) and x.dim() == len(base.kernel_size) + 1 else 1
    expected = expected_output(layer, plain.movedim(channels, -1)).movedim(-1, channels)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    assert y.stride() == torch.empty_like(plain).stride()


@pytest.mark.stack("shapes: NCHW and channels_last without copies")
def test_channels_last_stays_channels_last(device):
    layer = KasminaLayer(nn.Conv2d(4, 8, 3, device=device)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6, device=device).to(memory_format=torch.channels_last)
    plain, y = layer.base_layer(x), layer(x)
    assert torch.equal(y, plain) and y.stride() == plain.stride()


class Talkative(nn.Linear):
    def forward(self, x, scale, *, shift=0.0, form=tuple):
        y = super().forward(x) * scale + shift
        return form((y, x, "more")) if form is tuple else form(y, x)


Pair = namedtuple("Pair", "hidden cache")


@pytest.mark.stack("shapes: base layers with extra and keyword arguments")
@pytest.mark.stack("shapes: base layers that return tuples")
def test_extra_arguments_and_tuples():
    layer = KasminaLayer(Talkative(3, 8), strategy="additive", num_blueprints=1)
    layer.set_blueprint(None, 0)
    layer.lifecycle_states = 3
    layer.blueprint_weights.data.fill_(0.5)
    x = torch.randn(2, 3)
    y, cache, more = layer(x, 2.0, shift=1.0)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias) * 2 + 1.5)
    assert cache is x and more == "more"
    named = layer(x, 1.0, form=Pair)
    assert isinstance(named, Pair) and named.cache is x
    torch.testing.assert_close(named.hidden, nn.functional.linear(x, layer.weight, layer.bias) + 0.5)


@pytest.mark.parametrize("output", [None, {"y": 1}, (), ("text",), [torch.ones(2)], 3.0])
def test_an_output_that_is_no_tensor(output):
    class Odd(nn.Module):
        def forward(self):
            return output

    layer = KasminaLayer(Odd(), hidden_dim=2)
    with pytest.raises(TypeError, match=f"Odd returned {type(output).__name__}; expected a tensor or a tuple"):
        layer()


def test_an_output_of_another_width_is_an_error_not_a_crash(device):
    layer = KasminaLayer(Unknown(), hidden_dim=6, device=device)
    with pytest.raises(RuntimeError, match="blueprint_weights must have shape"):
        layer(torch.randn(4, 7, device=device))


# ---- gradients and telemetry -------------------------------------------------------------------------


def test_gradients_follow_the_closed_form(device):
    base = nn.Linear(3, 8, device=device, dtype=torch.float64)
    layer = KasminaLayer(base, num_seeds=2)
    layer.set_blueprint(1, 0)
    layer.lifecycle_states[1] = 3
    layer.set_alpha(1, 0.25)
    x = torch.randn(5, 3, device=device, dtype=torch.float64)
    hidden, weight = base(x).detach(), torch.randn(5, 8, device=device, dtype=torch.float64)
    (layer(x) * weight).sum().backward()
    expected = torch.zeros(2, 8, device=device, dtype=torch.float64)
    expected[0, 4:] = 0.25 * (weight * hidden).sum(0)[4:]
    expected[1, 4:] = 0.25 * weight.sum(0)[4:]
    torch.testing.assert_close(layer.blueprint_weights.grad, expected, rtol=1e-12, atol=1e-12)
    u2, v2 = (weight * hidden).sum(0).square(), weight.sum(0).square()
    both = torch.stack([u2.view(2, 4).sum(1), v2.view(2, 4).sum(1), torch.ones_like(u2[:2])], 1)
    torch.testing.assert_close(layer.grad_telemetry, both, rtol=1e-12, atol=1e-12)


def test_a_grafted_layer_learns_to_undo_a_gain(device):
    torch.manual_seed(1)
    base = nn.Linear(16, 32, device=device)
    gain, shift = torch.rand(32, device=device) + 0.5, torch.randn(32, device=device)
    layer = KasminaLayer(base, chunk_size=8)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    for seed in range(4):
        assert all(layer.request_state_transition(seed, s) for s in ("germinated", "training", "grafting"))
    optimizer = torch.optim.Adam([layer.blueprint_weights], lr=0.1)
    for _ in range(200):
        x = torch.randn(64, 16, device=device)
        loss = (layer(x) - (gain * base(x) + shift)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learnt = layer.blueprint_weights.detach()
    torch.testing.assert_close(learnt[0], gain, rtol=0.02, atol=0.02)
    torch.testing.assert_close(learnt[1], shift, rtol=0.02, atol=0.02)


def test_telemetry_is_of_the_base_layers_output(device):
    layer = KasminaLayer(nn.Linear(3, 10, device=device), num_seeds=3, chunking="uniform", strategy="additive")
    layer.lifecycle_states, layer.blueprint_ids = 3, 0
    layer.blueprint_weights.data.fill_(100.0)
    batches = [torch.randn(n, 3, device=device) for n in (4, 9)]
    for x in batches:
        layer(x)
    seen = torch.cat([layer.base_layer(x) for x in batches]).double()
    for seed in range(3):
        chunk = seen[:, 3 * seed : 3 * seed + 3]
        count, mean, m2, calls, nonfinite = layer.telemetry[seed].tolist()
        assert (count, calls, nonfinite) == (39, 2, 0)
        assert mean == pytest.approx(chunk.mean().item(), rel=1e-6, abs=1e-7)
        assert m2 == pytest.approx((chunk - chunk.mean()).square().sum().item(), rel=1e-5)
        legacy = [chunk.sum().item(), chunk.square().sum().item(), 39.0, 2.0]
        assert layer.telemetry_buffer[seed].tolist() == pytest.approx(legacy, rel=1e-4, abs=1e-4)
    assert layer.telemetry_buffer.dtype == torch.float32 and layer.telemetry_buffer.shape == (3, 4)


def test_telemetry_off_and_reset(device):
    layer = KasminaLayer(nn.Linear(3, 8, device=device), telemetry=False)
    x = torch.randn(4, 3, device=device)
    layer(x).sum().backward()
    assert not layer.telemetry.any() and not layer.grad_telemetry.any()
    layer.telemetry_enabled = True
    layer(x).sum().backward()
    assert layer.telemetry[0, 0] == 32 and layer.grad_telemetry[0, 2] == 1
    layer.reset_telemetry()
    assert not layer.telemetry.any() and not layer.grad_telemetry.any()


@pytest.mark.stack("shapes: shared layers used twice in a forward")
def test_a_layer_used_twice_counts_twice_and_adds_gradients(device):
    layer = KasminaLayer(nn.Linear(4, 4, device=device))
    layer.lifecycle_states, layer.blueprint_ids = 3, 0
    x = torch.randn(3, 4, device=device)
    layer(layer(x)).sum().backward()
    assert layer.telemetry[0, 0] == 24 and layer.telemetry[0, 3] == 2 and layer.grad_telemetry[0, 2] == 2
    grad = layer.blueprint_weights.grad.clone()
    bank = layer.blueprint_weights.detach().clone().requires_grad_()

    def plain(h):
        return layer.base_layer(h) * bank[0] + bank[1]

    plain(plain(x)).sum().backward()
    torch.testing.assert_close(grad, bank.grad)


def test_a_change_of_state_between_forward_and_backward_is_an_error(device):
    layer = KasminaLayer(nn.Linear(4, 4, device=device))
    y = layer(torch.randn(3, 4, device=device)).sum()
    layer.set_alpha(0, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_one_graph_for_every_state():
    layer = KasminaLayer(nn.Linear(4, 12), num_seeds=3, num_blueprints=3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(5, 4)
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for state in range(11):
            scramble(layer, state)
            layer.lifecycle_states[0] = state
            before = layer.telemetry[:, 3].clone()
            assert torch.equal(compiled(x), layer(x))
            assert torch.equal(layer.telemetry[:, 3] - before, torch.full((3,), 2.0, dtype=torch.float64))
    with flags.override(triton_kernels=not flags.triton_kernels):
        torch.testing.assert_close(compiled(x), layer(x))


def test_rows_of_the_state_have_their_places():
    layer = KasminaLayer(nn.Linear(4, 12), num_seeds=3)
    for variable in StateVar:
        layer.state[variable, 1] = 5
        assert int(layer.state_tensor[1, variable]) == 5
