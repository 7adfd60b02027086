"""A layer that is cast, moved, copied, pickled, saved, loaded, tied, wrapped and swapped."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from kasmina_ext.layer import KasminaLayer, TritonChunkedKasminaLayer

FIXED = ["seed_offsets", "state", "alpha", "telemetry", "grad_telemetry", "history", "history_count"]
FIXED.append("performance_metrics")


def grown(device="cpu", kind=TritonChunkedKasminaLayer):
    """A layer with something in every tensor that a cast to half precision would destroy."""
    made = kind(nn.Linear(5, 20, device=device), **({"chunks_per_layer": 4} if kind is not KasminaLayer else {}))
    for name in ("germinated", "training", "grafting"):
        made.request_state_transition(0, name, {"keep_blueprint": True})
    made.set_alpha(0, 1 / 3)
    made.state[5, 0] = 2**30 + 1
    made(torch.randn(7, 5, device=device)).sum().backward()
    made.telemetry[:, 0] += 2**40 + 1
    made.extended_state.update_performance(0, {"loss": 0.1})
    made.zero_grad()
    return made


def tensors(layer):
    return {name: t.detach().clone() for name, t in layer.state_dict().items()}


def assert_same(layer, before, names=None):
    now = layer.state_dict()
    for name in before if names is None else names:
        assert now[name].dtype == before[name].dtype, name
        assert torch.equal(now[name].cpu(), before[name].cpu()), name


# ---- casts and moves ---------------------------------------------------------------------------------

CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to_both": (lambda m: m.to(m.device, torch.bfloat16), torch.bfloat16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "whole_model": (lambda m: nn.Sequential(m).half()[0], torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_reach_the_bank_and_the_base_only(device, cast):
    layer = grown(device)
    before, bank = tensors(layer), layer.blueprint_weights.detach().clone()
    apply, dtype = CASTS[cast]
    apply(layer)
    assert_same(layer, before, FIXED)
    assert layer.blueprint_weights.dtype == layer.base_layer.weight.dtype == dtype
    assert torch.equal(layer.blueprint_weights, bank.to(dtype))
    assert layer(torch.randn(3, 5, device=device, dtype=dtype)).dtype == dtype


@pytest.mark.stack("devices and threads: moving between devices while training")
def test_a_move_and_back(device):
    layer = grown()
    before = tensors(layer)
    layer.to(device)
    assert layer.device.type == device.type
    layer(torch.randn(2, 5, device=device))
    layer.reset_telemetry()
    layer.cpu()
    assert_same(layer, before, [n for n in before if "telemetry" not in n])


def test_views_are_live_after_a_move():
    layer = grown()
    layer.half()
    layer.lifecycle_states[3] = 5
    layer.state_tensor[2, 1] = 4
    assert layer.state[0].tolist() == [3, 0, 0, 5] and int(layer.blueprint_ids[2]) == 4
    with pytest.raises(RuntimeError):
        layer.blueprint_ids = torch.zeros(3)


@pytest.mark.stack("devices and threads: meta device, skip_init, deferred init and to_empty")
@pytest.mark.parametrize("kind", [KasminaLayer, TritonChunkedKasminaLayer])
def test_meta_then_empty_then_reset(kind):
    with torch.device("meta"):
        layer = kind(nn.Linear(5, 20))
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device="cpu")
    for buffer in layer.buffers():
        buffer.fill_(77)
    layer.base_layer.reset_parameters()
    layer.reset_parameters()
    fresh = kind(nn.Linear(5, 20))
    assert_same(layer, tensors(fresh), FIXED)
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.stack("devices and threads: meta device, skip_init, deferred init and to_empty")
def test_skip_init():
    layer = nn.utils.skip_init(KasminaLayer, nn.Linear(5, 20), device="cpu")
    layer.base_layer.reset_parameters()
    layer.reset_parameters()
    assert layer(torch.randn(2, 5)).isfinite().all()


def test_reset_forgets_everything_but_the_base_layer():
    layer = grown()
    base = {n: t.clone() for n, t in layer.base_layer.state_dict().items()}
    layer.reset_parameters()
    assert_same(layer, tensors(TritonChunkedKasminaLayer(nn.Linear(5, 20), 4)), FIXED)
    assert all(torch.equal(t, base[n]) for n, t in layer.base_layer.state_dict().items())


# ---- copies ------------------------------------------------------------------------------------------


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.stack("devices and threads: copy.deepcopy and pickling the module")
@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle, through_file])
@pytest.mark.parametrize("kind", [KasminaLayer, TritonChunkedKasminaLayer])
def test_clones_are_equal_and_apart(device, clone, kind):
    layer = grown(device, kind)
    layer.telemetry_enabled = False
    twin, x = clone(layer), torch.randn(3, 5, device=device)
    assert torch.equal(twin(x), layer(x)) and twin.telemetry_enabled is False
    assert_same(twin, tensors(layer))
    before = tensors(layer)
    twin.lifecycle_states[:] = 9
    twin.extended_state.increment_epochs()
    twin.set_alpha(None, 0.0)
    twin.lifecycle_manager.valid_transitions.clear()
    twin.telemetry_enabled = True
    twin(x)
    assert_same(layer, before)
    assert layer.lifecycle_manager.can_transition(0, 1) and layer.telemetry_enabled is False


@pytest.mark.stack("devices and threads: copy.deepcopy and pickling the module")
def test_a_compiled_layer_can_be_copied():
    layer = grown()
    layer.compile(backend="eager")
    around, x = torch.compile(layer, backend="eager"), torch.randn(3, 5)
    for twin in (copy.deepcopy(layer), copy.deepcopy(around), through_pickle(layer)):
        assert torch.equal(twin(x), layer(x))
    assert around.lifecycle_states.tolist() == layer.lifecycle_states.tolist()


def test_a_compiled_base_layer():
    base = torch.compile(nn.Linear(5, 20), backend="eager")
    layer, x = KasminaLayer(base), torch.randn(3, 5)
    assert layer.hidden_dim == 20 and torch.equal(layer(x), base(x))


# ---- state_dict --------------------------------------------------------------------------------------


def test_state_dict_round_trip_is_strict(device):
    layer = grown(device)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True, map_location="cpu")
    fresh = TritonChunkedKasminaLayer(nn.Linear(5, 20), 4, device)
    assert not any(fresh.load_state_dict(loaded))
    assert_same(fresh, tensors(layer))
    x = torch.randn(3, 5, device=device)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.stack("devices and threads: meta device, skip_init, deferred init and to_empty")
def test_assign_from_meta():
    layer = grown()
    with torch.device("meta"):
        empty = TritonChunkedKasminaLayer(nn.Linear(5, 20), 4)
    empty.load_state_dict(tensors(layer), assign=True)
    assert isinstance(empty.blueprint_weights, nn.Parameter)
    assert_same(empty, tensors(layer))
    empty.lifecycle_states[1] = 2
    assert int(empty.state[0, 1]) == 2
    assert empty.request_state_transition(3, 1)


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_that_was_cast(assign):
    layer = grown()
    cast = {n: t.half() if t.is_floating_point() else t for n, t in tensors(layer).items()}
    fresh = TritonChunkedKasminaLayer(nn.Linear(5, 20), 4)
    fresh.load_state_dict(cast, assign=assign)
    for name in FIXED:
        assert fresh.state_dict()[name].dtype == layer.state_dict()[name].dtype
    dtype = torch.float16 if assign else torch.float32
    assert fresh(torch.randn(2, 5, dtype=dtype)).dtype == dtype


def test_loading_another_chunk_map_is_refused():
    layer = grown()
    other = KasminaLayer(nn.Linear(5, 22), num_seeds=4, chunking="balanced", num_blueprints=10)
    uniform = TritonChunkedKasminaLayer(nn.Linear(5, 22), 4)
    offsets = uniform.seed_offsets.clone()
    with pytest.raises(RuntimeError, match='"seed_offsets" cuts the features differently'):
        uniform.load_state_dict(other.state_dict())
    assert torch.equal(uniform.seed_offsets, offsets)
    broken = tensors(layer)
    broken["seed_offsets"] = torch.tensor([0, 15, 5, 900, -3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cuts the features differently"):
        layer.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="size mismatch for state"):
        layer.load_state_dict(TritonChunkedKasminaLayer(nn.Linear(5, 20), 5).state_dict())
    assert layer(torch.randn(2, 5)).shape == (2, 20)


def test_loading_a_plain_layers_weights():
    plain, layer = nn.Linear(5, 20), KasminaLayer(nn.Linear(5, 20))
    missing, unexpected = layer.load_state_dict(
        {f"base_layer.{n}": t for n, t in plain.state_dict().items()}, strict=False
    )
    assert not unexpected and set(missing) == {*FIXED, "blueprint_weights"}
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), plain(x))


# ---- standing in for the base layer ------------------------------------------------------------------


def test_attributes_come_from_the_base_layer():
    layer = KasminaLayer(nn.Conv2d(4, 8, 3, padding=1))
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert (layer.in_channels, layer.kernel_size, layer.padding) == (4, (3, 3), (1, 1))
    assert layer.extra_repr() != layer.base_layer.extra_repr()
    with pytest.raises(AttributeError, match="'KasminaLayer' object has no attribute 'colour'"):
        layer.colour  # noqa: B018
    assert layer.checkpoint_manager is None and not hasattr(layer, "_private")


def test_private_names_are_not_the_base_layers():
    base = nn.Linear(3, 4)
    base._hf_hook = "base's own"
    layer = KasminaLayer(base)
    assert not hasattr(layer, "_hf_hook") and not hasattr(layer, "__deepcopy__")
    with pytest.raises(AttributeError):
        KasminaLayer.__new__(KasminaLayer).weight  # noqa: B018


@pytest.mark.stack("devices and threads: weight sharing")
def test_tying_by_assignment_reaches_the_base_layer():
    embedding = KasminaLayer(nn.Embedding(11, 6))
    head = KasminaLayer(nn.Linear(6, 11, bias=False))
    head.weight = embedding.weight
    assert head.base_layer.weight is embedding.base_layer.weight
    assert [n for n, _ in head.named_parameters()] == ["blueprint_weights", "base_layer.weight"]
    head(embedding(torch.tensor([1, 2]))).sum().backward()
    assert embedding.weight.grad is not None
    nested = KasminaLayer(KasminaLayer(nn.Linear(6, 11)))
    nested.weight = nn.Parameter(torch.zeros(11, 6))
    assert not nested.base_layer.base_layer.weight.any()


def test_own_tensors_stay_own():
    class Base(nn.Linear):
        def __init__(self):
            super().__init__(3, 4)
            self.register_buffer("alpha", torch.full((1,), 9.0))
            self.register_buffer("state", torch.zeros(1))

    layer = KasminaLayer(Base(), num_seeds=2)
    layer.alpha = torch.zeros(2)
    assert layer.base_layer.alpha.tolist() == [9.0] and layer.alpha.tolist() == [0.0, 0.0]
    assert layer.state.shape == (8, 2)
    nested = KasminaLayer(layer, num_seeds=2)
    nested.blueprint_weights = nn.Parameter(torch.ones(2, 4))
    assert nested.blueprint_weights is not layer.blueprint_weights


def test_a_layer_in_a_layer(device):
    inner = KasminaLayer(nn.Linear(3, 8, device=device), strategy="additive", num_blueprints=1)
    outer = KasminaLayer(inner, strategy="multiplicative", num_blueprints=1)
    for layer, value in ((inner, 2.0), (outer, 3.0)):
        layer.lifecycle_states, layer.blueprint_ids = 6, 0
        layer.blueprint_weights.data.fill_(value)
    x = torch.randn(4, 3, device=device)
    torch.testing.assert_close(outer(x), 3 * (inner.base_layer(x) + 2))
    assert outer.state is not inner.state and outer.in_features == 3


@pytest.mark.stack("devices and threads: functional_call")
def test_swapped_parameters_and_buffers(device):
    layer = KasminaLayer(nn.Linear(3, 4, device=device), strategy="additive", num_blueprints=1)
    layer.lifecycle_states, layer.blueprint_ids = 3, 0
    x, alpha = torch.randn(2, 3, device=device), torch.zeros(1, device=device)
    swapped = {"blueprint_weights": torch.full((1, 4), 7.0, device=device)}
    y = torch.func.functional_call(layer, swapped, (x,))
    torch.testing.assert_close(y, layer.base_layer(x) + 7)
    y = torch.func.functional_call(layer, {**swapped, "alpha": alpha}, (x,))
    assert torch.equal(y, layer.base_layer(x))
    assert layer.alpha.tolist() == [1.0] and not layer.blueprint_weights.any()


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.stack("devices and threads: parametrizations")
def test_a_parametrized_bank():
    layer = KasminaLayer(nn.Linear(3, 4), strategy="additive", num_blueprints=1)
    layer.lifecycle_states, layer.blueprint_ids = 3, 0
    layer.blueprint_weights.data.fill_(1.5)
    parametrize.register_parametrization(layer, "blueprint_weights", Doubled())
    x = torch.randn(2, 3)
    y = layer(x)
    torch.testing.assert_close(y, layer.base_layer(x) + 3)
    y.sum().backward()
    assert layer.parametrizations.blueprint_weights.original.grad.tolist() == [[4.0] * 4]


@pytest.mark.stack("devices and threads: forward hooks")
def test_hooks_see_the_transformed_output():
    layer = grown()
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 5)
    assert layer(x) is seen[0]


@pytest.mark.stack("devices and threads: inference_mode and no_grad")
def test_inference_mode_and_no_grad(device):
    layer, x = grown(device), torch.randn(3, 5, device=device)
    expected = layer(x).detach()
    calls = layer.telemetry[0, 3].item()
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        layer.set_alpha(0, 0.0)
    with torch.no_grad():
        layer(x)
    assert layer.telemetry[0, 3] == calls + 2
    layer(x).sum().backward()


def test_freezing_and_optimizing_only_the_bank():
    layer = grown()
    for parameter in layer.base_layer.parameters():
        parameter.requires_grad_(False)
    layer(torch.randn(3, 5)).sum().backward()
    assert layer.weight.grad is None and layer.blueprint_weights.grad[0, :5].abs().sum() > 0
