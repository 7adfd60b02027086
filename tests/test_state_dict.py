"""state_dicts: our own in full, the Triton package's layouts, names with wrappers in them, and what is refused."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn

import kasmina_ext
from kasmina_ext import KasminaLayer, StateVar, TritonChunkedKasminaLayer
from kasmina_ext.compat import SimpleTritonLayer, TritonKasminaLayer

INTEGERS = ("seed_offsets", "state", "history", "history_count")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def assert_bits(module: nn.Module, expected: dict[str, Tensor]) -> None:
    now = module.state_dict()
    assert now.keys() == expected.keys()
    for name, tensor in expected.items():
        assert now[name].dtype == tensor.dtype, name
        ours, theirs = (t.contiguous().cpu().flatten().view(torch.uint8) for t in (now[name], tensor))
        assert torch.equal(ours, theirs), name


def lived(device: torch.device | str = "cpu") -> KasminaLayer:
    """A layer none of whose tensors is as in a new one; with -0.0 and NaN where they may be."""
    layer = KasminaLayer(nn.Linear(5, 22, device=device), num_seeds=4, num_blueprints=3, alpha_schedule="linear")
    layer(torch.randn(7, 5, device=device)).square().sum().backward()
    layer.request_state_transitions([0, 1, 2], "GERMINATED", strategies=[0, 3, 2])
    layer.request_state_transitions([1, 2], "TRAINING")
    layer.extended_state.set_state(2, "GRAFTING")
    layer.step_lifecycle()
    layer.set_alpha([0, 3], [0.25, 0.1])
    layer.extended_state.update_state([3], {"checkpoint": 7, "evaluation_score": -3, "error_count": 2, "parent": 9})
    layer.extended_state.update_performance(None, torch.randn(4, 4, device=device))
    with torch.no_grad():
        layer.blueprint_weights += torch.randn(3, 22, device=device)
        layer.blueprint_weights[0, 0], layer.blueprint_weights[1, 3] = -0.0, torch.nan
        layer.performance_metrics[0, 0] = torch.nan
    return layer


def empty(**changes: object) -> KasminaLayer:
    settings = {"num_seeds": 4, "num_blueprints": 3, "alpha_schedule": "linear"} | changes
    return KasminaLayer(nn.Linear(5, 22), **settings)


# ---- our own ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["copied", "saved", "assigned", "meta", "cast"])
def test_every_tensor_comes_back_bit_for_bit(device, way):
    layer = lived(device)
    expected = tensors(layer)
    fresh = tensors(empty())
    assert all(not torch.equal(expected[name].cpu(), fresh[name]) for name in fresh if name != "seed_offsets")
    state = layer.state_dict()
    if way == "saved":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    with torch.device("meta" if way == "meta" else device):
        other = KasminaLayer(nn.Linear(5, 22), num_seeds=4, num_blueprints=3)
    if way == "meta":
        other.to_empty(device=device)
    if way == "cast":
        state = {name: t.long() if name in INTEGERS else t.double() for name, t in state.items()}
    if way == "assigned":
        state = {name: t.clone() for name, t in state.items()}
    assert not any(other.load_state_dict(state, assign=way == "assigned"))
    assert_bits(other, expected)
    x = torch.randn(3, 5, device=device)
    assert torch.equal(other(x).nan_to_num(), layer(x).nan_to_num())


def test_counts_that_a_cast_made_infinite_are_forgotten(device):
    """float16 ends at 65504: what the seeds saw is lost, and nothing else."""
    layer, other = lived(device), empty().to(device)
    layer.telemetry[1] = torch.tensor([70_000, 0.5, 9.0, 3, 0], dtype=torch.float64)
    other.load_state_dict({n: t.half() if t.is_floating_point() else t for n, t in layer.state_dict().items()})
    kept = layer.telemetry.half().double()
    kept[1] = 0
    assert torch.equal(other.telemetry, kept)
    assert torch.equal(other.state, layer.state) and torch.equal(other.alpha, layer.alpha.half().float())
    assert other.seed_report()[1]["count"] == 0
    layer.grad_telemetry[2] = torch.tensor([1e6, 0.5, 9.0])
    layer.telemetry[3] = torch.tensor([10, 0.5, 1e6, 3, 0])
    other.load_state_dict({n: t.half() if t.is_floating_point() else t for n, t in layer.state_dict().items()})
    assert other.grad_telemetry[2].eq(0).all() and other.telemetry[3].eq(0).all()
    assert torch.equal(other.grad_telemetry[:2], layer.grad_telemetry[:2].half().double())
    narrow = layer.state_dict() | {"telemetry": torch.zeros(4, 3, dtype=torch.float16, device=device)}
    with pytest.raises(RuntimeError, match="telemetry"):
        other.load_state_dict(narrow)
    with pytest.raises(RuntimeError, match="telemetry.*got inf in a count"):  # no cast's doing
        other.load_state_dict(layer.state_dict() | {"telemetry": torch.full((4, 5), torch.inf, device=device)})


def test_loading_in_place_keeps_parameters_and_moves_versions():
    layer, other = lived(), empty()
    bank, optimizer = other.blueprint_weights, torch.optim.SGD(other.parameters(), lr=0.1)
    versions = {name: t._version for name, t in other.named_buffers()} | {"bank": bank._version}
    y = other(torch.randn(2, 5)).sum()
    other.load_state_dict(layer.state_dict())
    assert other.blueprint_weights is bank is optimizer.param_groups[0]["params"][0]
    moved = {name: t._version for name, t in other.named_buffers()} | {"bank": bank._version}
    assert all(moved[name] > version for name, version in versions.items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_arguments_of_the_layer_are_not_in_it():
    layer, other = lived(), empty(alpha_schedule=None, ramp_epochs=7, strategy="additive")
    other.load_state_dict(layer.state_dict())
    other.step_lifecycle()
    assert torch.equal(other.alpha, layer.alpha)  # no schedule: alpha stays
    assert other.ramp_epochs == 7 and other.strategy.name == "ADDITIVE"


# ---- what is refused -------------------------------------------------------------------------------------------------


def set_(name: str, index: object, value: object):
    def change(state: dict[str, Tensor]) -> None:
        state[name][index] = value

    return change


REFUSED = {
    "lifecycle": (set_("state", (0, 1), 11), '"0.state" must be in \\[0, 10\\], got 11 as LIFECYCLE_STATE'),
    "blueprint": (set_("state", (1, 1), 3), "must be in \\[-1, 2\\], got 3 as BLUEPRINT_ID"),
    "no blueprint": (set_("state", (1, 1), -2), "got -2 as BLUEPRINT_ID"),
    "epochs": (set_("state", (2, 1), -1), "got -1 as EPOCHS_IN_STATE"),
    "strategy": (set_("state", (3, 1), 4), "got 4 as GRAFTING_STRATEGY"),
    "parent": (set_("state", (4, 1), -1), "got -1 as PARENT_STATE"),
    "errors": (set_("state", (7, 1), -1), "got -1 as ERROR_COUNT"),
    "alpha above": (set_("alpha", 2, 1.5), '"0.alpha" must be in \\[0, 1\\], got 1.5'),
    "alpha below": (set_("alpha", 2, -0.5), "must be in \\[0, 1\\], got -0.5"),
    "alpha NaN": (set_("alpha", 2, torch.nan), "must be in \\[0, 1\\], got nan"),
    "history": (set_("history", (1, 2, 0), 12), '"0.history" must be in'),
    "history count": (set_("history_count", 1, -1), '"0.history_count" must be in'),
    "telemetry": (set_("telemetry", (1, 0), -5), '"0.telemetry" must be in .* in a count'),
    "telemetry NaN": (set_("telemetry", (1, 3), torch.nan), '"0.telemetry" must be in .* in a count'),
    "gradients": (set_("grad_telemetry", (1, 0), -5), '"0.grad_telemetry" must be in'),
    "offsets": (set_("seed_offsets", 1, 900), '"0.seed_offsets" cuts the features differently'),
    "wide": (lambda s: s.update(state=s["state"].long() + 2**32), "got 42949672.. as LIFECYCLE_STATE"),
    "fraction": (lambda s: s.update(state=s["state"] + 0.5), '"0.state" must be whole numbers'),
    "infinite": (lambda s: s.update(history_count=s["history_count"] * torch.inf), '"0.history_count" must be'),
    "bool": (lambda s: s.update(state=s["state"] > 0), '"0.state" must be integers, got torch.bool'),
    "complex": (lambda s: s.update(alpha=s["alpha"] + 0j), '"0.alpha" must be numbers, got torch.complex64'),
    "no tensor": (lambda s: s.update(alpha=[1.0] * 4), '"0.alpha" must be a tensor, got list'),
    "shape": (lambda s: s.update(alpha=s["alpha"][:2]), "size mismatch for 0.alpha"),
    "bank": (lambda s: s.update(blueprint_weights=torch.ones(2, 22)), "size mismatch for 0.blueprint_weights"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_cannot_be_is_refused_and_nothing_of_the_seeds_loaded(name, assign):
    change, message = REFUSED[name]
    state = tensors(lived())
    change(state)
    layer = empty()
    before = tensors(layer)
    model = nn.Sequential(layer)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"0.{key}": value for key, value in state.items()}, assign=assign)
    for key in (*layer.BUFFER_DTYPES, "blueprint_weights"):
        assert torch.equal(layer.state_dict()[key], before[key]), key


def test_values_at_their_limits_are_loaded():
    state = tensors(lived())
    state["state"][:, 0] = torch.tensor([10, 2, 2**31 - 1, 3, 10, 2**31 - 1, -(2**31), 2**31 - 1])
    state["state"][:, 1] = torch.tensor([0, -1, 0, 0, 0, -1, 2**31 - 1, 0])
    state["history_count"][0] = 2**31 - 1
    for dtype in (torch.int32, torch.int64, torch.float64):
        layer = empty()
        layer.load_state_dict(state | {name: state[name].to(dtype) for name in INTEGERS})
        assert_bits(layer, state)


# ---- the Triton package's layout -------------------------------------------------------------------------------------

VECTORS = {
    "lifecycle_states": [0, 3, 7, 1],
    "blueprint_ids": [-1, 2, 0, 1],
    "grafting_strategies": [0, 1, 2, 0],
}


def old(prefix: str = "", dtype: torch.dtype = torch.int32, **changes: list[int]) -> dict[str, Tensor]:
    """As the package saved it: the base layer and three vectors."""
    weights = {f"{prefix}base_layer.{name}": t for name, t in tensors(nn.Linear(5, 22)).items()}
    vectors = {f"{prefix}{name}": torch.tensor(v, dtype=dtype) for name, v in (VECTORS | changes).items()}
    return weights | vectors


class Outer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 5), layer)


def check_old(layer: KasminaLayer, saved: dict[str, Tensor], bank: Tensor) -> None:
    state = layer.state.tolist()
    assert state[StateVar.LIFECYCLE_STATE] == VECTORS["lifecycle_states"]
    assert state[StateVar.BLUEPRINT_ID] == VECTORS["blueprint_ids"]
    assert state[StateVar.GRAFTING_STRATEGY] == VECTORS["grafting_strategies"]
    assert state[StateVar.EPOCHS_IN_STATE] == [0] * 4 and state[StateVar.CHECKPOINT_ID] == [-1] * 4
    assert layer.state.dtype == torch.int32 and not layer.history.any() and not layer.history_count.any()
    assert not layer.telemetry.any() and not layer.grad_telemetry.any() and layer.alpha.eq(1).all()
    assert torch.equal(layer.blueprint_weights.nan_to_num(), bank.nan_to_num())
    key = next(key for key in saved if key.endswith("base_layer.weight"))
    assert torch.equal(layer.base_layer.weight.cpu(), saved[key].cpu())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", [False, True])
def test_the_old_layout_loads_strictly(device, dtype, used):
    layer = lived(device) if used else empty().to(device)
    bank, saved = layer.blueprint_weights.detach().clone(), old(dtype=dtype)
    with pytest.warns(UserWarning, match="blueprint_weights stay as they are") as caught:
        assert not any(layer.load_state_dict(saved))
    assert len(caught) == 1
    text = str(caught[0].message)
    for what in ("epochs", "alpha", "telemetry", "history", "performance_metrics", "2 of its seeds are grafted"):
        assert what in text
    check_old(layer, saved, bank)


@pytest.mark.parametrize("chunking", ["uniform", "balanced"])
def test_the_old_layout_in_the_drop_in_computes_what_the_old_layer_did(chunking):
    layer, saved = TritonChunkedKasminaLayer(nn.Linear(5, 22), 4, chunking=chunking), old()
    with pytest.warns(UserWarning) as caught:
        layer.load_state_dict(saved)
    assert ("cuts features" in str(caught[0].message)) == (chunking == "balanced")
    x = torch.randn(3, 5)
    y = nn.functional.linear(x, saved["base_layer.weight"], saved["base_layer.bias"])
    start = layer.seed_offsets.tolist()
    second, third = slice(start[1], start[2]), slice(start[2], start[3])
    y[:, second] += layer.blueprint_weights[2, second]
    y[:, third] = (y[:, third] + layer.blueprint_weights[0, third]) / 2
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("assign", [False, True])
def test_the_old_layout_inside_a_model(assign):
    model = Outer(empty())
    layer = model.encoder[1]
    bank = layer.blueprint_weights.detach().clone()
    saved = old("encoder.1.") | {f"encoder.0.{name}": t for name, t in nn.Linear(3, 5).state_dict().items()}
    given = dict(saved)
    with pytest.warns(UserWarning, match="^encoder.1: loaded") as caught:
        assert not any(model.load_state_dict(saved, assign=assign))
    assert len(caught) == 1 and saved.keys() == given.keys()
    check_old(layer, saved, bank)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_old_layout_of_a_wrapped_layer(prefix):
    saved = old(prefix)
    layer, inside = empty(), Outer(empty())
    bank = layer.blueprint_weights.detach().clone()
    with pytest.warns(UserWarning):
        assert not any(layer.load_state_dict(saved))
    check_old(layer, saved, bank)
    own = {name: t for name, t in tensors(inside).items() if name.startswith("encoder.0")}
    with pytest.warns(UserWarning):
        assert not any(inside.load_state_dict({f"encoder.1.{name}": t for name, t in saved.items()} | own))
    check_old(inside.encoder[1], saved, bank)


def test_the_old_layout_with_a_bank_and_alpha_of_its_own():
    layer, bank = empty(), torch.randn(3, 22)
    with pytest.warns(UserWarning) as caught:
        layer.load_state_dict(old() | {"blueprint_weights": bank, "alpha": torch.full((4,), 0.5)})
    assert "blueprint_weights" not in str(caught[0].message) and "alpha" not in str(caught[0].message)
    assert torch.equal(layer.blueprint_weights, bank) and layer.alpha.tolist() == [0.5] * 4


def test_the_old_layout_onto_meta():
    with torch.device("meta"):
        layer = empty()
    with pytest.raises(RuntimeError, match='Missing key.*"blueprint_weights"'), pytest.warns(UserWarning):
        layer.load_state_dict(old(), assign=True)
    with pytest.warns(UserWarning):
        layer.load_state_dict(old() | {"blueprint_weights": torch.ones(3, 22)}, assign=True)
    check_old(layer, {"base_layer.weight": layer.base_layer.weight}, torch.ones(3, 22))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    with pytest.warns(UserWarning):
        layer.load_state_dict(old())


OLD_REFUSED = {
    "a state": ({"lifecycle_states": [0, 11, 0, 0]}, '"lifecycle_states" must be in \\[0, 10\\], got 11'),
    "a blueprint": ({"blueprint_ids": [0, 3, 0, 0]}, '"blueprint_ids" must be in \\[-1, 2\\], got 3'),
    "a strategy": ({"grafting_strategies": [0, 0, 0, -1]}, '"grafting_strategies" must be in \\[0, 3\\], got -1'),
    "too short": ({"blueprint_ids": [0, 0]}, "must have shape \\[4\\], one for each seed, got \\[2\\]"),
    "too long": ({"lifecycle_states": [0] * 9}, "must have shape \\[4\\], one for each seed, got \\[9\\]"),
    "a matrix": ({"lifecycle_states": [[0] * 4]}, "must have shape \\[4\\], one for each seed, got \\[1, 4\\]"),
}


@pytest.mark.parametrize("name", OLD_REFUSED)
def test_an_old_layout_that_does_not_fit_is_refused(name):
    changes, message = OLD_REFUSED[name]
    layer = lived()
    before = tensors(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(old(**changes))
    for key in (*layer.BUFFER_DTYPES, "blueprint_weights"):
        assert torch.equal(layer.state_dict()[key].nan_to_num(), before[key].nan_to_num())


def test_old_vectors_that_are_no_numbers_or_not_all_there():
    layer = empty()
    half = old()
    half["lifecycle_states"] = torch.tensor([0, 0.5, 0, 0])
    with pytest.raises(RuntimeError, match='"lifecycle_states" must be whole numbers, got 0.5'):
        layer.load_state_dict(half)
    less = old()
    del less["grafting_strategies"]
    with pytest.raises(RuntimeError, match='Missing key.*"grafting_strategies"'), pytest.warns(UserWarning):
        layer.load_state_dict(less)
    with pytest.warns(UserWarning):
        missing, unexpected = layer.load_state_dict(less, strict=False)
    assert missing == ["grafting_strategies"] and not unexpected
    assert layer.grafting_strategies.tolist() == [3] * 4
    with pytest.raises(RuntimeError, match='Unexpected key.*"lifecycle_states"'):
        layer.load_state_dict(tensors(layer) | old())


# ---- the two small layers --------------------------------------------------------------------------------------------


def small(kind: type) -> tuple[nn.Module, dict[str, Tensor]]:
    layer = kind(24, 3, 8)
    names = layer.VECTORS
    state = {names[0]: [0, 3, 5], names[1]: [0, 9, 4], names[2]: [0, 1, 2]}
    saved = {name: torch.tensor(value, dtype=torch.int32) for name, value in state.items()}
    saved[layer.BANK] = torch.randn(10, 24)
    if kind is TritonKasminaLayer:
        saved["blend_factors"] = torch.tensor([0.5, 0.25, 1.0])
        seen = torch.randn(3, 50, dtype=torch.float64) + 3
        sums = {"sum": seen.sum(1), "sumsq": seen.square().sum(1), "count": torch.full((3,), 50.0)}
        saved |= {f"telemetry_{name}": value.float() for name, value in sums.items()}
        saved["seen"] = seen
    return layer, saved


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [SimpleTritonLayer, TritonKasminaLayer])
def test_the_small_layers_layouts_load_strictly(kind, dtype, prefix):
    layer, saved = small(kind)
    seen = saved.pop("seen", None)
    given = {prefix + n: t.to(dtype) if n in layer.VECTORS else t for n, t in saved.items()}
    assert not any(layer.load_state_dict(given))
    state = tensors(layer)
    assert all(state[name].dtype == torch.int32 and torch.equal(state[name], saved[name]) for name in layer.VECTORS)
    assert torch.equal(state[layer.BANK], saved[layer.BANK])
    if seen is not None:
        shown = {name: torch.from_numpy(values) for name, values in layer.get_telemetry().items()}
        assert torch.allclose(shown["mean"], seen.mean(1), atol=1e-6)
        assert torch.allclose(shown["variance"], seen.var(1, correction=0), rtol=1e-4)
        assert shown["count"].tolist() == [50] * 3
    again = kind(24, 3, 8)
    again.load_state_dict(layer.state_dict())
    assert_bits(again, state)


@pytest.mark.parametrize("kind", [SimpleTritonLayer, TritonKasminaLayer])
def test_the_small_layers_refuse_ids_that_do_not_exist(kind):
    layer, saved = small(kind)
    saved.pop("seen", None)
    before = tensors(layer)
    greatest = dict(zip(layer.VECTORS, (10, 9, 2), strict=True))
    for name, high in greatest.items():
        for wrong in (high + 1, -2):
            broken = saved | {name: torch.tensor([0, wrong, 0])}
            with pytest.raises(RuntimeError, match=f'"{name}" must be in .*{high}\\], got {wrong}'):
                layer.load_state_dict(broken)
        with pytest.raises(RuntimeError, match=f'"{name}" must have shape \\[3\\]'):
            layer.load_state_dict(saved | {name: torch.zeros(4)})
    assert_bits(layer, before)
    if kind is TritonKasminaLayer:
        assert not layer.get_telemetry()["count"].any()  # what was refused was not seen either


# ---- models in wrappers ----------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As DataParallel, DistributedDataParallel and torch.compile do it: the module in an attribute."""

    def __init__(self, name: str, inner: nn.Module):
        super().__init__()
        self.add_module(name, inner)


def wrapped(way: str, model: nn.Module) -> nn.Module:
    for name in reversed(way.split()):
        model = Wrapper(name, model)
    return model


def built(way: str) -> tuple[nn.Module, Outer]:
    inner = Outer(lived())
    inner.encoder.append(nn.BatchNorm1d(22))
    if "inside" in way:
        inner.encoder[1] = Wrapper("_orig_mod", inner.encoder[1])
        inner.encoder[0] = Wrapper("module", inner.encoder[0])
    return wrapped(way.replace("inside", ""), inner), inner


WAYS = ["", "module", "_orig_mod", "module _orig_mod", "inside", "module inside"]


@pytest.mark.parametrize("now", WAYS)
@pytest.mark.parametrize("then", WAYS)
def test_a_model_loads_whatever_wrapped_it_then_and_now(then, now):
    saved, model = built(then)[0].state_dict(), built(now)[0]
    expected = [tensor.clone() for tensor in saved.values()]
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.dtype == torch.float64)):
            tensor.zero_()
    for assign in (False, True):
        assert not any(kasmina_ext.load_state_dict(model, saved, assign=assign))
        for tensor, wanted in zip(model.state_dict().values(), expected, strict=True):
            assert torch.equal(tensor.nan_to_num(), wanted.nan_to_num())


def test_a_data_parallel_and_a_compiled_model_load_each_others_file():
    parallel, compiled = nn.DataParallel(Outer(lived())), torch.compile(Outer(empty()), backend="eager")
    assert not any(kasmina_ext.load_state_dict(compiled, parallel.state_dict()))
    assert_bits(compiled._orig_mod, tensors(parallel.module))
    assert not any(kasmina_ext.load_state_dict(parallel, compiled.state_dict()))
    averaged = torch.optim.swa_utils.AveragedModel(Outer(lived()))
    averaged.n_averaged += 3
    other = torch.optim.swa_utils.AveragedModel(Outer(empty()))
    assert not any(kasmina_ext.load_state_dict(other, averaged.state_dict()))
    assert_bits(other, tensors(averaged))


def test_the_old_layout_of_a_wrapped_model_into_another():
    saved = old("module.encoder._orig_mod.1.")
    model = torch.compile(Outer(empty()), backend="eager")
    own = {f"module.{name}": t for name, t in tensors(model._orig_mod).items() if name.startswith("encoder.0")}
    bank = model.encoder[1].blueprint_weights.detach().clone()
    with pytest.warns(UserWarning):
        assert not any(kasmina_ext.load_state_dict(model, saved | own))
    check_old(model.encoder[1], saved, bank)


def test_names_that_belong_nowhere_and_versions_of_modules():
    inner = nn.Sequential(nn.BatchNorm1d(4))
    model, saved = Wrapper("module", inner), inner.state_dict()
    assert saved._metadata["0"] == {"version": 2}
    kasmina_ext.load_state_dict(model, saved)
    with pytest.raises(RuntimeError, match='Unexpected key.*"module.1.weight"'):
        kasmina_ext.load_state_dict(model, saved | {"1.weight": torch.ones(4)})
    with pytest.raises(RuntimeError, match='Unexpected key.*"0.weight"'):  # there twice: none may win in silence
        kasmina_ext.load_state_dict(model, {**saved, "module.0.weight": torch.ones(4)})
    del saved["0.num_batches_tracked"]  # which version 1 did not have, but this is version 2
    missing, unexpected = kasmina_ext.load_state_dict(model, saved, strict=False)
    assert missing == ["module.0.num_batches_tracked"] and not unexpected


def test_a_module_that_is_really_called_module():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            self.module = nn.Linear(3, 3)

    one, two = Pair(), Pair()
    assert not any(kasmina_ext.load_state_dict(two, one.state_dict()))
    assert_bits(two, tensors(one))
    assert not any(kasmina_ext.load_state_dict(Wrapper("_orig_mod", two), copy.deepcopy(one.state_dict())))
