"""What cannot be folded: said with name and reason, for the whole model at once, before anything is changed."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from folding import Scale, bits, grow, same
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from kasmina_ext.fold import FoldError, fold_, fold_report, unfold_
from kasmina_ext.layer import KasminaLayer


def grown(base, strategies=(3,), seed=0, **arguments):
    arguments = {"num_seeds": 4, "num_blueprints": 4, **arguments}
    return grow(KasminaLayer(base, **arguments), seed, strategies)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.lin(x)


class SometimesResidual(Residual):
    """Its last module is the last thing that runs, but for callers who leave ``skip`` out."""

    def forward(self, x, skip=True):
        return self.lin(x) + x if skip is True else self.lin(x)


class MaybeResidual(Residual):
    def forward(self, x, before=None, scale=None):
        x = x if scale is None else x * scale
        return self.lin(x) + x if before is None else self.lin(before)


class InTraining(Residual):
    def forward(self, x):
        return self.lin(x) * 2 if self.training else self.lin(x)


class DependsOnData(Residual):
    def forward(self, x):
        return self.lin(x) if x.sum() > 0 else x


class UsesWeight(Residual):
    def forward(self, x):
        return self.lin(x * self.lin.weight.norm())


class CallsTwice(Residual):
    def forward(self, x):
        return self.lin(self.lin(x))


class ReturnsTwice(Residual):
    def forward(self, x):
        y = self.lin(x)
        return y, y


class UsesOutput(Residual):
    def forward(self, x):
        y = self.lin(x)
        return y, y.mean()


class Branches(Residual):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 8)

    def forward(self, x, fast=False):
        return self.lin(x) if fast else self.other(x)


class Drops(Residual):
    def forward(self, x):
        return F.dropout(self.lin(x), 0.1, self.training)


class Standardized(nn.Conv2d):
    """Its output does not depend on the scale of its weight."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None], self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Squared(Scale):
    def forward(self, x):
        return x * self.weight**2


class OnlyInEval(Scale):
    def forward(self, x):
        return x * self.weight**2 if self.training else x * self.weight


class Needs(Scale):
    def forward(self, x, gate):
        return super().forward(x) * gate


class Int8(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        del self.weight
        self.register_buffer("weight", torch.ones(8, 8, dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def with_weight(values):
    lin = nn.Linear(8, 8)
    lin.weight = nn.Parameter(values, requires_grad=values.is_floating_point() and values.element_size() > 1)
    return lin


def infinite(layer):
    layer.blueprint_weights.data[:, 0] = torch.inf
    layer.lifecycle_states[0], layer.blueprint_ids[0] = 4, 0
    return layer


def trains(layer, index):
    layer.eval().base_layer[index].train()
    return layer


def replaced(module):
    module.forward = lambda x: x
    return module


class OwnBlend(KasminaLayer):
    def _blend(self, x):
        return super()._blend(x) + 1


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(8, 8))


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)))[0]


# name: (layer, what the reason says)
REFUSED = {
    "relu": (lambda: grown(nn.ReLU(), hidden_dim=8), "ReLU: its output is made by relu"),
    "identity": (lambda: grown(nn.Sequential(nn.Identity()), hidden_dim=8), "no module with weights in it"),
    "empty": (lambda: grown(nn.Sequential(), hidden_dim=8), "no module with weights in it"),
    "lstm": (lambda: grown(nn.LSTM(8, 8, proj_size=4), hidden_dim=4), "LSTM: it is a block, and tracing"),
    "prelu": (lambda: grown(nn.PReLU(8), hidden_dim=8, feature_dim=1), "its forward is its own"),
    "embedding_bag": (lambda: grown(nn.EmbeddingBag(9, 8)), "EmbeddingBag: its output is made by embedding_bag"),
    "sequential_with_an_end": (lambda: grown(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), "made by relu"),
    "sequential_twice": (
        lambda: grown(nn.Sequential(*[nn.Linear(8, 8)] * 2)),
        r"base_layer\.0 is also used as bad\.base_layer\.1",
    ),
    "pre_norm": (
        lambda: grown(nn.TransformerEncoderLayer(8, 2, norm_first=True, batch_first=True)),
        "TransformerEncoderLayer: (it is a block|its output)",
    ),
    "residual": (lambda: grown(Residual()), "its output is made by add"),
    "residual_by_default": (lambda: grown(SometimesResidual()), "made by add"),
    "residual_for_some": (lambda: grown(MaybeResidual()), "made by add"),
    "residual_in_training": (lambda: grown(InTraining()).eval(), "made by mul"),
    "depends_on_data": (lambda: grown(DependsOnData()), "tracing which module makes its output failed"),
    "weight_used_beside": (lambda: grown(UsesWeight()), r"it uses lin\.weight beside calling lin"),
    "called_twice": (lambda: grown(CallsTwice()), "it calls lin more than once"),
    "returned_twice": (lambda: grown(ReturnsTwice()), "returned twice"),
    "output_used_beside": (lambda: grown(UsesOutput()), "what lin puts out is used for more than the output"),
    "branches": (lambda: grown(Branches(), hidden_dim=8), "comes from one of lin, other"),
    "forward_replaced": (
        lambda: grown(replaced(nn.Sequential(nn.Linear(8, 8)))),
        "forward was replaced on the instance",
    ),
    "linear_replaced": (lambda: grown(replaced(nn.Linear(8, 8))), "its forward is its own"),
    "standardized": (lambda: grown(Standardized(3, 8, 3)), "its forward is its own"),
    "cosine": (lambda: grown(Cosine(8, 8)), "its forward is its own"),
    "square_of_weight": (lambda: grown(Squared(8), (0,), hidden_dim=8), "its forward is its own"),
    "square_in_training": (lambda: grown(OnlyInEval(8), (0,), hidden_dim=8).eval(), "its forward is its own"),
    "another_input": (lambda: grown(Needs(8), (0,), hidden_dim=8), "does not run on a trial input"),
    "rms_norm_with_b": (lambda: grown(nn.RMSNorm(8)), "it has no bias, and [0-9] of its 8 features are added to"),
    "own_rms_norm_with_b": (lambda: grown(Scale(8), hidden_dim=8), "it has no bias"),
    "max_norm": (lambda: grown(nn.Embedding(9, 8, max_norm=1.0)), "max_norm changes the weights"),
    "feature_dim": (lambda: grown(nn.Linear(8, 8), feature_dim=1), "dimension 1 of its output .* lie in dimension -1"),
    "feature_dim_of_norm": (lambda: grown(nn.BatchNorm1d(8), feature_dim=-1), "lie in dimension 1"),
    "other_features": (
        lambda: grown(nn.Sequential(nn.Linear(8, 4)), hidden_dim=8),
        "puts out 4 features, the layer has 8",
    ),
    "dropout": (lambda: grown(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))), r"call eval\(\) first"),
    "dropout_alone_trains": (
        lambda: trains(grown(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))), 1),
        r"call eval\(\) first",
    ),
    "functional_dropout": (lambda: grown(Drops(), hidden_dim=8), r"call eval\(\) first"),
    "int8": (lambda: grown(Int8()), "int8: quantised"),
    "float8": (lambda: grown(with_weight(torch.ones(8, 8).to(torch.float8_e4m3fn))), "float8_e4m3fn: quantised"),
    "quantized": (lambda: grown(quantized()), "Linear: its weight is packed: quantised"),
    "sparse": (lambda: grown(with_weight(torch.eye(8).to_sparse())), "its weight is sparse"),
    "expanded": (lambda: grown(with_weight(torch.ones(8, 1).expand(8, 8))), "share memory"),
    "parametrized": (lambda: grown(parametrizations.orthogonal(nn.Linear(8, 8))), "weight is parametrized; call"),
    "spectral_norm": (lambda: grown(nn.utils.spectral_norm(nn.Linear(8, 8))), "computed before each forward"),
    "pruned": (
        lambda: grown(prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5)),
        "computed before each forward",
    ),
    "weight_norm": (lambda: grown(old_weight_norm()), "weight is computed"),
    "not_finite": (lambda: infinite(grown(nn.Linear(8, 8))), "blueprint is not finite"),
    "overflow": (
        lambda: grown(with_weight(torch.full((8, 8), 6e4, dtype=torch.float16))),
        "leave the range of float16",
    ),
    "own_layer": (lambda: grow(OwnBlend(nn.Linear(8, 8), num_seeds=4)), "OwnBlend has its own _blend"),
    "compiled": (lambda: torch.compile(grown(nn.Linear(8, 8)), backend="eager"), "layer itself was compiled"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason_and_nothing_changed(case):
    torch.manual_seed(0)
    make, reason = REFUSED[case]
    model = nn.ModuleDict({"good": grown(nn.Linear(8, 8)), "bad": make()})
    kept = copy.deepcopy(model.state_dict()) if case == "sparse" else bits(model)
    modules = list(model.modules())
    with pytest.raises(FoldError, match=reason) as error:
        fold_(model)
    (name,) = error.value.problems
    assert name.startswith("bad") and f"{name}: " in str(error.value) and "nothing was changed" in str(error.value)
    assert list(model.modules()) == modules
    assert case == "sparse" or same(bits(model), kept)

    fold_(model, strict=False)
    assert type(model["good"]) is nn.Linear and list(fold_report(model).skipped) == [name]
    row = fold_report(model)[name]
    assert not row["folded"] and row["note"] == error.value.problems[name] and str(fold_report(model))
    unfold_(model)
    assert list(model.modules()) == modules
    assert case == "sparse" or same(bits(model), kept)


def test_a_model_without_values():
    with torch.device("meta"):
        layer = KasminaLayer(nn.Linear(8, 8))
    with pytest.raises(FoldError, match="on the meta device"):
        fold_(layer)
    layer = grown(nn.Linear(8, 8))
    layer.base_layer.to("meta")
    with pytest.raises(FoldError, match="its weight is on the meta device"):
        fold_(layer)


def test_all_problems_are_named_at_once():
    model = nn.ModuleDict(
        {"a": grown(nn.ReLU(), hidden_dim=8), "b": nn.Sequential(grown(nn.RMSNorm(8)), nn.Linear(2, 2))}
    )
    with pytest.raises(FoldError) as error:
        fold_(model)
    assert list(error.value.problems) == ["a", "b.0"]
    assert "ReLU" in error.value.problems["a"] and "RMSNorm" in error.value.problems["b.0"]
    with pytest.raises(FoldError, match="the model: ReLU"):
        fold_(model["a"])


def test_seeds_that_do_nothing_fold_into_anything():
    for case, (make, _) in REFUSED.items():
        if case in ("own_layer", "compiled", "not_finite"):
            continue
        model = nn.ModuleList([make()])
        base = model[0].base_layer
        model[0].lifecycle_states = 0
        assert fold_(model)[0] is base and fold_report(model)["0"]["into"] == ""


# ---- weights and modules that something else uses, too ---------------------------------------------------------------


class Tied(nn.Module):
    """As a language model: the embedding is the head."""

    def __init__(self, wrap=("wte",), strategies=(3,)):
        super().__init__()
        self.wte, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.wte.weight
        for name in wrap:
            setattr(self, name, grown(getattr(self, name), strategies))


@pytest.mark.parametrize(("wrapped", "other"), [("wte", r"head\.weight"), ("head", r"wte\.weight")])
def test_tied_weights_are_refused(wrapped, other):
    model = Tied((wrapped,))
    with pytest.raises(FoldError, match=f"{wrapped}: .*its weight is tied: {other}"):
        fold_(model)


def test_both_tied_weights_are_refused():
    with pytest.raises(FoldError) as error:
        fold_(Tied(("wte", "head")))
    assert set(error.value.problems) == {"wte", "head"}


@torch.no_grad()
def test_a_tied_weight_that_does_not_change_is_no_obstacle():
    model = Tied(("head",), strategies=(1,))  # adds: only a bias
    x = torch.randn(3, 8)
    y = model.head(x)
    fold_(model)
    assert model.head.weight is model.wte.weight
    torch.testing.assert_close(model.head(x), y)


def test_weights_that_share_memory_are_refused():
    flat = torch.randn(2, 8, 8)
    model = nn.ModuleList([grown(with_weight(flat[0])), with_weight(flat[1])])
    fold_(model)  # one storage, but no common element
    model = nn.ModuleList([grown(with_weight(flat.view(16, 8)[:8])), with_weight(flat.view(16, 8)[4:12])])
    with pytest.raises(FoldError, match="its weight is tied: 1.weight"):
        fold_(model)
    owner = nn.Module()
    owner.cache = flat
    with pytest.raises(FoldError, match=r"tied: 1\.cache"):
        fold_(nn.ModuleList([model[0], owner]))


def test_a_base_that_is_used_elsewhere_is_refused():
    lin = nn.Linear(8, 8)
    with pytest.raises(FoldError, match=r"0\.base_layer is also used as 1"):
        fold_(nn.ModuleList([grown(lin), lin]))
    with pytest.raises(FoldError) as error:
        fold_(nn.ModuleDict({"a": grown(lin), "b": grown(lin)}))
    assert set(error.value.problems) == {"a", "b"}
    block = nn.Sequential(nn.ReLU(), lin)
    with pytest.raises(FoldError, match=r"0\.base_layer\.1 is also used as 1"):
        fold_(nn.ModuleList([grown(block), lin]))


def test_a_weight_that_attention_reads_itself_is_refused():
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = grown(nn.Linear(8, 8))  # its own kind is refused when it is wrapped
    with pytest.raises(FoldError, match="uses out_proj's weight without calling it"):
        fold_(attention)
    attention.out_proj.lifecycle_states = 0
    assert isinstance(fold_(attention).out_proj, nn.Linear)


# ---- layers in layers ------------------------------------------------------------------------------------------------


def test_a_layer_around_one_that_cannot_be_folded_is_skipped_with_it():
    inner = grown(nn.RMSNorm(8), seed=1)
    outer = grown(nn.Sequential(nn.Linear(8, 8), inner), (0,), seed=2)
    other = grown(nn.Linear(8, 8))
    model = nn.ModuleList([outer, other])
    with pytest.raises(FoldError) as error:
        fold_(model)
    assert list(error.value.problems) == ["0", "0.base_layer.1"]
    fold_(model, strict=False)
    assert model[0] is outer and outer.base_layer[1] is inner and isinstance(model[1], nn.Linear)
    assert list(fold_report(model).skipped) == ["0", "0.base_layer.1"]

    inner.blueprint_weights.register_hook(lambda g: g)
    inner.blueprint_weights.data[:, 0] = torch.nan
    inner.lifecycle_states[0], inner.blueprint_ids[0] = 4, 0
    with pytest.raises(FoldError, match=r"0\.base_layer\.1 lies in between and cannot be folded"):
        fold_(model)


def test_a_layer_inside_one_that_cannot_be_folded_is_folded():
    inner = grown(nn.Linear(8, 8), seed=1)
    outer = grown(nn.Sequential(inner, nn.ReLU()), seed=2)
    x = torch.randn(3, 8)
    y = outer(x)
    assert fold_(outer, strict=False) is outer and isinstance(outer.base_layer[0], nn.Linear)
    torch.testing.assert_close(outer(x), y)
    unfold_(outer)
    assert outer.base_layer[0] is inner and torch.equal(outer(x), y)


# ---- distributed -----------------------------------------------------------------------------------------------------


@contextmanager
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_sharded_weights_and_banks_are_refused():
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    with one_process():
        mesh = DeviceMesh("cpu", [0])
        layer = grown(nn.Linear(8, 8))
        whole = layer.base_layer.weight
        layer.base_layer.weight = nn.Parameter(distribute_tensor(whole.data, mesh, [Shard(0)]))
        with pytest.raises(FoldError, match="its weight is sharded, a DTensor"):
            fold_(layer)
        layer.base_layer.weight = whole
        layer.blueprint_weights = nn.Parameter(distribute_tensor(layer.blueprint_weights.data, mesh, [Shard(1)]))
        with pytest.raises(FoldError, match="blueprint_weights is a DTensor"):
            fold_(layer)


def test_ddp_is_folded_inside():
    with one_process():
        model = nn.Sequential(grown(nn.Linear(8, 8)))
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(FoldError, match=r"fold its \.module"):
            fold_(wrapped)
        assert isinstance(fold_(wrapped.module)[0], nn.Linear)
        with pytest.raises(FoldError, match=r"unfold its \.module"):
            unfold_(nn.parallel.DistributedDataParallel(model))


def test_a_parametrized_bank_is_read():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    layer = grown(nn.Linear(8, 8))
    parametrize.register_parametrization(layer, "blueprint_weights", Twice())
    x = torch.randn(3, 8)
    y = layer(x)
    torch.testing.assert_close(fold_(layer)(x), y)
