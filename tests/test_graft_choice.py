"""Which modules of a model get seeds, which cannot, and what is said about it."""

from __future__ import annotations

import math

import pytest
import torch
from graft_model import ALL, IDS, MLPS, Model, RMSNorm, flags, grow_some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kasmina_ext import KasminaLayer, Seeds, graft_, ungraft_

# ---- which modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "which, found",
    [
        ("*.mlp.*", MLPS),
        ("blocks.0.*", ALL[1:4]),
        ("*", ALL),
        ("head", ["head"]),
        ("last_norm", ["norm"]),
        ("blocks.[!0].mlp.2", MLPS[3:]),
        (lambda name, module: isinstance(module, nn.Linear) and "blocks" in name, MLPS),
        (lambda name, module: name == "last_norm", ["norm"]),
        (["head", "*.norm"], ["blocks.0.norm", "blocks.1.norm", "head"]),
        (nn.LayerNorm, ["blocks.0.norm", "blocks.1.norm"]),
        ([nn.Embedding, RMSNorm], ["embed", "norm"]),
        (["head", lambda name, module: name == "embed"], ["embed", "head"]),
        (("head", "head", "he*"), ["head"]),
    ],
)
def test_what_is_found(which, found):
    model = Model()
    y = model(IDS)
    seeds = graft_(model, which, table=False)
    assert list(seeds.layers) == found
    assert {n for n, m in model.named_modules() if isinstance(m, KasminaLayer)} == set(found)
    assert model.last_norm is model.norm and torch.equal(model(IDS), y)


def test_modules_themselves_and_what_is_inside_of_them():
    model = Model()
    assert list(graft_(model, model.blocks[1], table=False).layers) == ALL[4:7]
    assert list(graft_(model, [model.head, model.blocks[0].mlp], table=False).layers) == [*MLPS[:2], *ALL[4:7], "head"]
    with pytest.raises(ValueError, match="^the Linear given finds none of the modules"):
        graft_(model, nn.Linear(2, 2))


def test_left_out():
    for exclude in ("blocks.0.*", ["blocks.0.mlp.0", lambda name, module: name == "blocks.0.mlp.2"]):
        assert list(graft_(Model(), "*.mlp.*", exclude=exclude, table=False).layers) == MLPS[2:]
    model = Model()
    graft_(model, "*", exclude=model.blocks, table=False)
    assert list(Seeds(model).layers) == ["embed", "norm", "head"]
    model = Model()
    assert list(graft_(model, "norm", exclude="blocks.*", table=False).layers) == ["norm"]
    with pytest.raises(ValueError, match="nothing left to graft:\n  everything found is excluded"):
        graft_(Model(), "norm", exclude="last_norm")


def test_any_part_of_the_model_may_be_left_out():
    """Also one that could have no seeds: nobody mistakes it for another."""
    model = Model()
    assert list(graft_(model, "*", exclude=[*model.blocks.modules()], table=False).layers) == ["embed", "norm", "head"]


def test_what_is_to_be_left_out_must_be_there():
    """Else what a slip of the pen was to keep out would have seeds."""
    for exclude, message in (
        ("heads", r"^exclude: 'heads' finds none of the modules that can have seeds, which are:\n  embed "),
        (
            ["norm", "blocks.0"],
            r"^exclude: 'blocks.0' finds .* \('blocks.0.\*' finds what is inside of it\), which are",
        ),
        ("lm.head", r"^exclude: 'lm.head' finds none"),
        (nn.Linear(2, 2), "^exclude: the Linear given finds none"),
    ):
        model = Model()
        with pytest.raises(ValueError, match=message):
            graft_(model, "*", exclude=exclude)
        assert not any(isinstance(module, KasminaLayer) for module in model.modules()) and all(flags(model).values())
    for exclude in ((), nn.Conv2d, lambda name, module: False, [nn.Conv2d, "head"]):  # which suit many models
        assert list(graft_(Model(), "norm", exclude=exclude, table=False).layers) == ["norm"]
    model = Model()
    graft_(model, "head", table=False)
    assert list(graft_(model, "*", exclude=["head", "blocks.*"], table=False).layers) == ["embed", "norm", "head"]


def test_nothing_found_says_what_there_is():
    model = Model()
    for which in ("*.attention.*", ["head", "*.attention.*"]):
        with pytest.raises(ValueError) as error:
            graft_(model, which)
        assert str(error.value).splitlines() == [
            "'*.attention.*' finds none of the modules that can have seeds, which are:",
            "  embed  (Embedding)",
            "  blocks.*.norm  (2 LayerNorm)",
            "  blocks.*.mlp.*  (4 Linear)",
            "  norm  (RMSNorm)",
            "  head  (Linear)",
        ]
    assert not any(isinstance(module, KasminaLayer) for module in model.modules())
    with pytest.raises(ValueError, match=r"'\*\.mlp' finds .* \('\*\.mlp\.\*' finds what is inside of it\), which are"):
        graft_(model, "*.mlp")
    for part in ("mlp", "*.mlp.*.", r"^.*\.mlp\..*$"):
        with pytest.raises(ValueError, match=r"\(patterns are of whole names: '\*mlp\*' finds 4\), which are"):
            graft_(model, part)
    with pytest.raises(ValueError, match=r"'\.\*' finds none of the modules that can have seeds, which are"):
        graft_(model, ".*")
    with pytest.raises(ValueError, match="the predicate finds none"):
        graft_(model, lambda name, module: False)
    with pytest.raises(ValueError, match="finds nothing: there is no module in the model that can have seeds"):
        graft_(nn.Sequential(nn.ReLU(), nn.Dropout()), "*")
    with pytest.raises(ValueError, match="which is empty: give a pattern"):
        graft_(model, [])
    wide = nn.ModuleDict({f"layer{letter * count}": nn.Linear(2, 2) for letter in "abcde" for count in range(1, 11)})
    with pytest.raises(ValueError, match=r"\n  layera  \(Linear\)\n(.*\n)+  \.\.\. and 10 more$"):
        graft_(wide, "x")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((nn.Linear(2, 2).forward, "*"), TypeError, "model must be a torch.nn.Module, got method"),
        ((Model(), 3), TypeError, "which must be a pattern, a predicate, a class, a module or a list, got int"),
        ((Model(), int), TypeError, "which must be .* got type"),
        ((Model(), nn.Conv2d), ValueError, "Conv2d finds none of the modules"),
        ((Model(), ["head", ["norm"]]), TypeError, "which must be a flat list, it has a list in it"),
        ((Model(), "*", {"exclude": 3}), TypeError, "exclude must be a pattern"),
        ((Model(), "*", {"chunk_size": 0}), ValueError, "chunk_size must be at least 1"),
        ((Model(), "*", {"chunk_size": 2.0}), TypeError, "chunk_size must be an integer"),
        ((Model(), "*", {"strategy": "xor"}), ValueError, "unknown .*strategy"),
        ((Model(), "*", {"num_seeds": 3}), TypeError, "graft_ has no setting 'num_seeds'; there are alpha_schedule"),
        ((Model(), "*", {"chunking": "odd"}), ValueError, "cannot graft 'embed': chunking must be one of"),
        ((Model(), "*", {"num_blueprints": 1}), ValueError, "cannot graft 'embed': strategy AFFINE takes 2 rows"),
        ((Model(), "*", {"blueprint_dtype": "float32"}), TypeError, "blueprint_dtype must be a torch.dtype, got str"),
        ((nn.Linear(2, 2), "*"), ValueError, r"  \(model\): it is the model itself: KasminaLayer\(model\) wraps it"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    model, which, *keywords = arguments
    with pytest.raises(error, match=message):
        graft_(model, which, **dict(*keywords))
    if isinstance(model, nn.Module):
        assert not any(isinstance(module, KasminaLayer) for module in model.modules())
        assert all(flags(model).values())


def test_names_that_look_like_patterns():
    model = nn.ModuleDict({"a[b]": nn.Linear(2, 2), "ab": nn.Linear(2, 2), "c?": nn.Linear(2, 2)})
    assert list(graft_(model, ["a[b]", "c?"], table=False).layers) == ["a[b]", "ab", "c?"]
    seeds = graft_(nn.ModuleDict({"a[b]": nn.Linear(2, 2), "[ab": nn.Linear(2, 2)}), ["a[b]", "[ab"], table=False)
    assert list(seeds.layers) == ["a[b]", "[ab"] and len(seeds["a[b]"]) == 1


@given(st.integers(1, 70), st.integers(1, 80))
@settings(deadline=None, max_examples=60)
def test_no_seed_owns_more_than_chunk_size(features, chunk_size):
    model = nn.Sequential(nn.Linear(2, features))
    (layer,) = graft_(model, "0", chunk_size=chunk_size, table=False)
    sizes = layer.seed_offsets.diff()
    assert layer.num_seeds == math.ceil(features / chunk_size)
    assert sizes.sum() == features and sizes.max() <= chunk_size and sizes.max() - sizes.min() <= 1


def test_settings_reach_every_layer():
    seeds = graft_(
        Model(), "*.mlp.*", chunk_size=4, strategy="multiplicative", alpha_schedule="cosine", ramp_epochs=7,
        telemetry=False, blueprint_dtype=torch.float64, table=False,
    )  # fmt: skip
    for layer in seeds:
        assert layer.alpha_schedule.name == "COSINE" and layer.ramp_epochs == 7 and not layer.telemetry_enabled
        assert layer.strategy.name == "MULTIPLICATIVE"
        assert layer.blueprint_weights.shape == (1, layer.hidden_dim)  # no rows that nothing uses
        assert layer.blueprint_weights.dtype == torch.float64
    assert [layer.num_blueprints for layer in graft_(Model(), "head", num_blueprints=4, table=False)] == [4]


# ---- what cannot be ---------------------------------------------------------------------------------------------------


def test_the_out_proj_of_attention_is_left_out_and_named(capsys):
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    seeds = graft_(model, "*")
    assert list(seeds.layers) == ["linear1", "linear2", "norm1", "norm2"]
    assert list(seeds.skipped) == ["self_attn.out_proj"]
    out = capsys.readouterr().out
    assert "not grafted: self_attn.out_proj, nn.MultiheadAttention reads its weight and never calls it" in out
    for which in ("self_attn.out_proj", model.self_attn.out_proj, ["norm1", "self_attn.out_proj"]):
        with pytest.raises(ValueError, match=r"cannot graft 'self_attn\.out_proj': nn\.MultiheadAttention reads"):
            graft_(model, which)
    # Nor does the encoder's fused kernel pass its parts by.
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        y = model(x)
        grow_some(seeds)
        assert not torch.allclose(model(x), y)
    assert all(layer.telemetry[:, 0].gt(0).all() for layer in seeds)


class Sixteenth(nn.Module):
    """What parametrizes a weight has modules of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, weight):
        return self.inner(weight)


def test_parts_of_a_model_that_are_no_places_for_layers():
    model = nn.ModuleDict(
        {
            "lazy": nn.LazyLinear(4),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "script": torch.jit.script(nn.Sequential(nn.Linear(4, 4))),
            "parametrized": nn.Linear(4, 6),
            "compiled": torch.compile(nn.Linear(4, 4), backend="eager"),
        }
    )
    nn.utils.parametrize.register_parametrization(model["parametrized"], "weight", Sixteenth())
    seeds = graft_(model, "*", table=False)
    assert list(seeds.layers) == ["parametrized"]
    assert seeds.skipped == {
        "lazy": "it is lazy and not initialized: run the model once",
        "complex": "its weights are complex, and seeds are for real activations",
        "compiled": "it was compiled by itself: graft first, then compile",
    }
    with pytest.raises(ValueError, match="cannot graft 'lazy': it is lazy"):
        graft_(model, "lazy")
    model["script"] = torch.compile(KasminaLayer(nn.Linear(4, 4)), backend="eager")
    with pytest.raises(ValueError, match="cannot ungraft 'script._orig_mod': the layer was compiled by itself"):
        ungraft_(model)
    assert isinstance(model["parametrized"], KasminaLayer)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_the_table(capsys):
    model = Model()
    own = sum(p.numel() for p in model.parameters())
    seeds = graft_(model, "blocks.*", chunk_size=5)
    lines = capsys.readouterr().out.splitlines()
    table = seeds.table()
    assert str(table).splitlines() == lines
    assert list(table) == ALL[1:7]
    assert table["blocks.0.mlp.0"] == {
        "kind": "Linear", "features": 24, "seeds": 5, "parameters": 48, "share": 48 / own,
    }  # fmt: skip
    count = sum(2 * row["features"] for row in table.values())
    seeds_in_all = sum(math.ceil(row["features"] / 5) for row in table.values())
    assert table.own_parameters == own and table.trained_parameters == count
    assert lines[0] == (
        f"{seeds_in_all} seeds in 6 layers: {count} parameters beside {own} ({count / own:.3%}); {count} can be trained"
    )
    assert lines[1].split() == ["module", "kind", "features", "seeds", "parameters", "share"]
    assert lines[3].split() == ["blocks.0.norm", "LayerNorm", "12", "3", "24", f"{24 / own:.3%}"]
    graft_(Model(), "*", table=False)
    assert capsys.readouterr().out == ""
