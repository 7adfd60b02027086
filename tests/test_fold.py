"""Folding a model: what comes out, how it is undone, and that a process without the package runs it."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from folding import ROUNDOFF, as_double, bits, effect, grow, same
from torch import nn

import kasmina_ext.folding.undo as undo
from kasmina_ext.fold import FoldError, fold_, fold_report, unfold_
from kasmina_ext.layer import KasminaLayer, TritonChunkedKasminaLayer


class Net(nn.Module):
    """A convolution, a norm, a block in a block, a layer that is used twice, one that is asleep."""

    def __init__(self):
        super().__init__()
        self.stem = KasminaLayer(nn.Conv2d(3, 8, 3, padding=1, bias=False), chunk_size=2, num_blueprints=4)
        self.norm = KasminaLayer(nn.BatchNorm2d(8), chunk_size=3, num_blueprints=4)
        inner = nn.Sequential(nn.Linear(8, 8), nn.GELU(), KasminaLayer(nn.Linear(8, 10), num_seeds=3, num_blueprints=4))
        self.block = KasminaLayer(inner, num_seeds=4, num_blueprints=4)
        self.twice = nn.ModuleList([TritonChunkedKasminaLayer(nn.Linear(10, 10), 3)])
        self.asleep = KasminaLayer(nn.Sequential(nn.Linear(10, 10), nn.ReLU()))
        self.head = nn.Linear(10, 4)
        for seed, layer in enumerate((self.stem, self.norm, self.block, inner[2], self.twice[0])):
            grow(layer, seed)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        x = self.twice[0](self.block(x))
        return self.head(self.asleep(self.twice[0](x)))


PLAIN_NAMES = [
    *("stem.weight", "stem.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
    *("norm.num_batches_tracked", "block.0.weight", "block.0.bias", "block.2.weight", "block.2.bias"),
    *("twice.0.weight", "twice.0.bias", "asleep.0.weight", "asleep.0.bias", "head.weight", "head.bias"),
]


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    return Net().eval().to(device)


def pictures(device):
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(device)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, KasminaLayer)]


# ---- a whole model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_comes_out_plain_and_computes_the_same(net, device):
    x = pictures(device)
    y, parameters = net(x), {name: p for name, p in net.named_parameters()}
    conv = net.stem.base_layer
    assert fold_(net) is net and not layers_of(net)
    assert list(net.state_dict()) == PLAIN_NAMES  # the stem has gained a bias, for what its seeds add
    assert type(net.stem) is nn.Conv2d and net.stem is conv
    torch.testing.assert_close(net(x), y, rtol=1e-5, atol=1e-5)
    # The very parameters: an optimizer that has them has them still.
    for name, parameter in net.named_parameters():
        old = {
            "block.2": "block.base_layer.2.base_layer",
            "block.0": "block.base_layer.0",
            "asleep.0": "asleep.base_layer.0",
        }
        path, _, leaf = name.rpartition(".")
        old_name = f"{old.get(path, path if path == 'head' else path + '.base_layer')}.{leaf}"
        assert name == "stem.bias" or parameter is parameters[old_name], name


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=lambda dtype: str(dtype)[6:])
def test_logits_of_a_deep_model_are_within_the_rounding_of_its_weights(dtype):
    """Bound: an error e of a layer's input becomes at most |W| e + u |W| |x| at its output, which GELU lets grow by at
    most 1.13; |W|, |x| of the folded model, all in float64.
    """
    torch.manual_seed(3)
    sizes = (12, 24, 24, 10)
    pairs = list(zip(sizes, sizes[1:], strict=False))
    layers = [
        grow(KasminaLayer(nn.Linear(i, o).to(dtype), chunk_size=4, num_blueprints=4), k)
        for k, (i, o) in enumerate(pairs)
    ]
    model = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
    x = torch.randn(50, 12, dtype=torch.float64)
    truth = x
    for layer in layers:
        a, b = effect(layer)
        truth = a * as_double(layer.base_layer)(truth) + b
        truth = truth if layer is layers[-1] else nn.functional.gelu(truth)

    fold_(model)
    u, e, h = ROUNDOFF[dtype] * (1 + 2 * ROUNDOFF[dtype]), torch.zeros_like(x), x
    for linear in as_double(model):
        if isinstance(linear, nn.GELU):
            h, e = linear(h), 1.13 * e
        else:
            weight = linear.weight.abs()
            e = e @ weight.T + u * (h.abs() @ weight.T + 2 * linear.bias.abs())
            h = linear(h)
    error = (h - truth).abs()
    assert (error <= e + 1e-13).all(), (error / e).max()
    assert error.max() >= e.max() / 1e4  # so the bound is of some use


@torch.no_grad()
def test_unfolding_restores_every_bit(net, device):
    x = pictures(device)
    net.train()
    net(x)
    net.eval()
    before, layers, y = bits(net), layers_of(net), net(x)
    before = bits(net)
    fold_(net)
    assert unfold_(net) is net
    assert same(bits(net), before) and layers_of(net) == layers
    assert torch.equal(net(x), y)
    fold_(net)
    unfold_(net)
    assert torch.equal(net(x), y)


def test_flags_modes_and_hooks_stay_as_they_were():
    net = Net()
    net.stem.base_layer.weight.requires_grad_(False)
    net.norm.base_layer.eval()
    heard = []
    on_layer = net.stem.register_forward_hook(lambda m, args, y: heard.append(("layer", y)))
    net.stem.base_layer.register_forward_hook(lambda m, args, y: heard.append(("base", y)))
    net.stem.base_layer.register_forward_pre_hook(lambda m, args: heard.append(("before base", args[0])))
    net.stem.register_forward_pre_hook(lambda m, args, kwargs: heard.append(("before", args[0])), with_kwargs=True)
    net.block.register_full_backward_hook(lambda m, grad_in, grad_out: heard.append(("backward", grad_out[0])))
    handle = net.norm.register_forward_hook(lambda m, args, y: heard.append(("norm", y)))
    x = pictures("cpu")
    net(x).sum().backward()
    kinds, values = [k for k, _ in heard], [v for _, v in heard]
    fold_(net)
    assert not net.stem.weight.requires_grad and not net.stem.bias.requires_grad and net.norm.weight.requires_grad
    assert not net.norm.training and net.stem.training and net.training
    assert "forward hooks" in fold_report(net)["stem"]["note"]

    heard.clear()
    net(x).sum().backward()
    assert [k for k, _ in heard] == kinds == ["before", "before base", "base", "layer", "norm", "backward"]
    for k, (kind, value) in enumerate(heard):
        if kind != "base":
            torch.testing.assert_close(value, values[k], rtol=1e-4, atol=1e-5)
    handle.remove()
    heard.clear()
    net(x)
    assert [k for k, _ in heard] == ["before", "before base", "base", "layer"]

    net.norm.register_forward_hook(lambda m, args, y: heard.append(("new", y)))
    unfold_(net)
    heard.clear()
    on_layer.remove()
    net(x)
    assert [k for k, _ in heard] == ["before", "before base", "base", "new"]
    assert len(net.stem.base_layer._forward_pre_hooks) == len(net.stem.base_layer._forward_hooks) == 1


def test_a_layer_itself_gives_its_base(device):
    base = nn.Linear(6, 8, device=device)
    layer = grow(KasminaLayer(base, num_seeds=4, num_blueprints=4))
    x = torch.randn(3, 6, device=device)
    y = layer(x)
    assert fold_(layer) is base
    torch.testing.assert_close(base(x), y)
    with pytest.raises(RuntimeError, match="folded into its base layer"):
        layer(x)
    with pytest.raises(FoldError, match="folded already"):
        fold_(layer)
    assert unfold_(base) is layer and torch.equal(layer(x), y)


@torch.no_grad()
def test_layers_directly_around_each_other():
    base = nn.Linear(6, 8)
    inner = grow(KasminaLayer(base, num_seeds=4, num_blueprints=4), 1)
    model = nn.Sequential(grow(KasminaLayer(inner, num_seeds=3, num_blueprints=4), 2))
    outer, before = model[0], bits(model)
    (a1, b1), (a2, b2) = effect(inner), effect(outer)
    weight, bias = base.weight.double(), base.bias.double()
    fold_(model)
    assert model[0] is base
    # Both at once, and rounded once.
    assert torch.equal(base.weight, ((a2 * a1)[:, None] * weight).float())
    assert torch.equal(base.bias, (a2 * a1 * bias + (a2 * b1 + b2)).float())
    unfold_(model)
    assert model[0] is outer and outer.base_layer is inner and inner.base_layer is base
    assert same(bits(model), before)


@torch.no_grad()
def test_folded_twice_and_unfolded_at_once():
    model = nn.Sequential(grow(KasminaLayer(nn.Linear(6, 8), num_seeds=4, num_blueprints=4), 1))
    x = torch.randn(3, 6)
    first, before = model[0], bits(model)
    fold_(model)
    model[0] = grow(KasminaLayer(model[0], num_seeds=2, num_blueprints=4), 5)
    second, y = model[0], model(x)
    fold_(model)
    torch.testing.assert_close(model(x), y)
    unfold_(model)
    assert model[0] is second and second.base_layer is first
    model[0] = first
    assert same(bits(model), before)


@torch.no_grad()
def test_a_layer_in_two_places_is_one():
    layer = grow(KasminaLayer(nn.Linear(6, 6), num_seeds=3, num_blueprints=4))
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(nn.ReLU(), layer)})
    weight = layer.base_layer.weight.double()
    a, _ = effect(layer)
    fold_(model)
    assert model["a"] is model["b"][1] and isinstance(model["a"], nn.Linear)
    assert torch.equal(model["a"].weight, (a[:, None] * weight).float())
    assert len(fold_report(model)) == 1
    unfold_(model)
    assert model["a"] is model["b"][1] is layer


def test_nothing_to_fold_is_said():
    with pytest.raises(ValueError, match="no KasminaLayer"):
        fold_(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="torch.nn.Module"):
        fold_([nn.Linear(2, 2)])


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_what_is_kept_is_in_no_state_dict_copy_or_pickle(net):
    fold_(net)
    assert list(net.state_dict()) == PLAIN_NAMES
    assert b"kasmina" not in pickle.dumps(net.block)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with pytest.raises(ValueError, match="is a copy"):
            unfold_(copied)
    unfold_(net)
    with pytest.raises(ValueError, match="nothing to unfold"):
        unfold_(net)


def test_what_is_kept_is_counted_and_goes_with_the_model(net):
    changed = (net.stem, net.norm, net.block.base_layer[2], net.twice[0])
    weights = sum(p.nbytes for layer in changed for p in layer.base_layer.parameters())
    own = sum(t.nbytes for m in layers_of(net) for t in (*m._parameters.values(), *m._buffers.values()))
    gone = [weakref.ref(layer) for layer in changed[:3]]
    del changed
    fold_(net)
    assert fold_report(net).kept_bytes == weights + own
    del net.stem, net.norm, net.block
    gc.collect()
    assert not any(layer() for layer in gone)


def test_nothing_is_kept_where_that_is_asked_for(net, device):
    x = pictures(device)
    y = net(x)
    fold_(net, keep=False)
    torch.testing.assert_close(net(x), y, rtol=1e-5, atol=1e-5)
    assert fold_report(net).kept_bytes == 0 and not any(m in undo._kept for m in net.modules())
    with pytest.raises(ValueError, match="keep=False"):
        unfold_(net)


@torch.no_grad()
def test_weights_that_were_trained_meanwhile_are_not_lost(net):
    before, layers = bits(net), layers_of(net)
    fold_(net)
    net.block[2].weight[0, 0] += 1e-6
    net.stem.bias[1] += 1
    folded = bits(net)
    with pytest.raises(FoldError, match="nothing was changed") as error:
        unfold_(net)
    assert set(error.value.problems) == {"block.2", "stem"} and "weight has changed" in str(error.value)
    assert same(bits(net), folded) and not layers_of(net)
    unfold_(net, discard_changes=True)
    assert same(bits(net), before) and layers_of(net) == layers


def test_a_cast_is_not_undone():
    net = Net()
    fold_(net)
    net.half()
    for discard in (False, True):
        with pytest.raises(FoldError, match=r"was float32 \[8, 3, 3, 3\] when it was folded, and is float16"):
            unfold_(net, discard_changes=discard)
    net.float()
    with pytest.raises(FoldError, match="has changed"):
        unfold_(net)


@torch.no_grad()
def test_a_move_between_folding_and_unfolding(device):
    net = Net().eval()
    x = pictures("cpu")
    y = net(x)
    before = bits(net)
    fold_(net)
    net.to(device).train()
    unfold_(net)
    assert {t.device.type for t in net.state_dict().values()} == {device.type}
    assert same(bits(net), before) and net.stem.training
    torch.testing.assert_close(net.eval()(x.to(device)).cpu(), y)


@torch.no_grad()
def test_a_part_is_unfolded_by_itself():
    net = Net()
    before, stem = bits(net), net.stem
    fold_(net)
    assert unfold_(net.stem) is stem  # a layer has no way of knowing where it stood
    net.stem = stem
    unfold_(net)
    assert same(bits(net), before)


@torch.no_grad()
def test_layers_that_were_folded_together_are_unfolded_together():
    net = Net()
    fold_(net)
    with pytest.raises(FoldError, match="folded together"):
        unfold_(net.block[2])
    net.block = nn.Sequential(*net.block[:2])
    with pytest.raises(ValueError, match="nothing to unfold"):
        unfold_(net.block)


@torch.inference_mode()
def test_inference_mode_makes_no_difference():
    model = nn.Sequential(KasminaLayer(nn.Linear(3, 6, bias=False), num_seeds=2, num_blueprints=4), nn.Linear(6, 2))
    grow(model[0])
    x = torch.randn(4, 3)
    y, before = model(x), bits(model)
    fold_(model)
    torch.testing.assert_close(model(x), y)
    assert not model[0].bias.is_inference() and model[0].weight.is_inference()
    unfold_(model)
    assert same(bits(model), before)


def test_a_graph_from_before_is_not_differentiated_with_new_weights():
    model = nn.Sequential(grow(KasminaLayer(nn.Linear(3, 6), num_seeds=2, num_blueprints=4)), nn.Linear(6, 2))
    y = model(torch.randn(4, 3, requires_grad=True))
    fold_(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_compiled_model_compiles_anew(device):
    model = nn.Sequential(
        grow(KasminaLayer(nn.Linear(6, 8, bias=False), num_seeds=4, num_blueprints=4), 1), nn.ReLU(), nn.Linear(8, 2)
    ).to(device)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 6, device=device)
    y = compiled(x)
    assert fold_(compiled) is compiled and isinstance(model[0], nn.Linear)
    torch.testing.assert_close(compiled(x), y)
    assert unfold_(compiled) is compiled
    torch.testing.assert_close(compiled(x), y)
    with pytest.raises(FoldError, match="layer itself was compiled"):
        fold_(torch.compile(model[0], backend="eager"))


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report(net):
    a, b = effect(net.stem)
    fold_(net)
    report = fold_report(net)
    assert list(report) == ["stem", "norm", "block", "block.base_layer.2", "twice.0", "asleep"]
    row = report["stem"]
    assert (row["into"], row["kind"], row["features"], row["added"]) == ("stem", "Conv2d", 8, "bias")
    assert row["changed"] == int(((a != 1) | (b != 0)).sum())
    assert row["scale"] == (a - 1).abs().max() and row["shift"] == b.abs().max()
    weight = net.stem.weight.detach().double().abs().flatten(1).sum(1) + net.stem.bias.detach().double().abs()
    assert row["bound"] == pytest.approx(2.0**-24 * weight.max().item(), rel=1e-6)
    assert report["block"]["into"] == report["block.base_layer.2"]["into"] == "block.2"
    asleep = report["asleep"]
    assert (asleep["into"], asleep["changed"], asleep["bound"], asleep["kind"]) == ("", 0, 0.0, "Sequential")
    assert json.dumps(report) and report.skipped == {}
    text = str(report)
    assert "6 of 6 layers folded into Net" in text and "the undo keeps" in text and "note" not in text
    assert pickle.loads(pickle.dumps(report)).kept_bytes == report.kept_bytes


def test_the_report_is_of_this_model_and_of_now(net):
    with pytest.raises(ValueError, match="not what fold_ returned"):
        fold_report(net)
    fold_(net)
    assert fold_report(net) is fold_report(net)
    unfold_(net)
    with pytest.raises(ValueError, match="unfolded again"):
        fold_report(net)


# ---- without the package ---------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys, torch

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kasmina_ext":
            raise ModuleNotFoundError("there is no kasmina_ext here")

sys.meta_path.insert(0, Nothing())
try:
    import kasmina_ext
    raise SystemExit("it could be imported")
except ModuleNotFoundError:
    pass
found = torch.load(sys.argv[1], weights_only=False)
torch.set_num_threads(int(sys.argv[3]))
with torch.no_grad():
    torch.save(found["model"](found["x"]), sys.argv[2])
assert not any(name.startswith("kasmina_ext") for name in sys.modules)
"""


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_process_without_the_package_gives_the_same_logits(tmp_path: Path, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        KasminaLayer(nn.Conv2d(3, 8, 3, bias=False), chunk_size=2, num_blueprints=4),
        KasminaLayer(nn.BatchNorm2d(8), chunk_size=3, num_blueprints=4),
        nn.Flatten(),
        KasminaLayer(nn.Sequential(nn.Linear(32, 16), nn.Dropout(0.1)), num_blueprints=4),
        nn.Linear(16, 4),
    )
    model = model.to(dtype).eval()
    for seed in (0, 1, 3):
        grow(model[seed], seed)
    x = torch.randn(6, 3, 4, 4, dtype=dtype)
    unfolded = model(x)
    fold_(model)
    y = model(x)
    torch.testing.assert_close(y, unfolded, rtol=40 * ROUNDOFF[dtype], atol=40 * ROUNDOFF[dtype])
    torch.save({"model": model, "x": x}, tmp_path / "model.pt")
    files = [str(tmp_path / name) for name in ("model.pt", "y.pt")]
    command = [sys.executable, "-c", ELSEWHERE, *files, str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), y)

    # The state_dict fits the network as it was written, but for the bias that the first layer has gained.
    written = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Sequential(nn.Linear(32, 16), nn.Dropout(0.1)),
        nn.Linear(16, 4),
    )
    written.to(dtype).eval().load_state_dict(model.state_dict())
    assert torch.equal(written(x), y)
