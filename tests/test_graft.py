"""Seeds in a model that there is: it goes on as it was, grows, and is given back."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from folding import bits, same
from graft_model import ALL, IDS, MLPS, Model, flags, grow_some, tree
from torch import nn
from torch.nn import functional as F

from kasmina_ext import (
    GrowthController,
    KasminaLayer,
    Seeds,
    fold_,
    graft,
    graft_,
    param_groups,
    save_seeds,
    ungraft_,
)

# ---- the model goes on as before -------------------------------------------------------------------------------------


def test_the_grafted_model_is_a_drop_in():
    model = nn.Sequential(nn.Conv2d(3, 8, (3, 2), padding=1), nn.Flatten(), nn.Linear(8 * 4 * 5, 4), nn.BatchNorm1d(4))
    x = torch.randn(2, 3, 4, 4)
    plain = copy.deepcopy(model)
    y = model(x)
    names = dict(model.state_dict())
    graft_(model, "*", table=False)
    conv, _, linear, norm = model
    assert conv.kernel_size == (3, 2) and conv.padding == (1, 1) and conv.out_channels == 8
    assert linear.in_features == 160 and linear.out_features == 4 and norm.num_features == 4
    assert torch.equal(conv.weight, plain[0].weight) and linear.bias is linear.base_layer.bias
    assert torch.equal(norm.running_mean, norm.base_layer.running_mean)
    assert {name.replace(".base_layer", "") for name in model.state_dict()} >= set(names)
    model.eval(), plain.eval()
    norm.base_layer.load_state_dict(plain[3].state_dict())
    assert torch.equal(model(x), plain(x)) and y.shape == (2, 4)


def test_modes_devices_and_dtypes_are_each_modules_own(device):
    model = Model().to(device)
    model.blocks[1].eval()
    model.blocks[0].bfloat16()
    graft_(model, "*", table=False)
    for name, layer in Seeds(model).layers.items():
        training = not name.startswith("blocks.1")
        assert layer.training == layer.base_layer.training == layer.calls_only.training == training, name
        assert layer.device.type == layer.blueprint_weights.device.type == device.type
        assert layer.blueprint_weights.dtype == torch.float32
        assert layer.weight.dtype == (torch.bfloat16 if name.startswith("blocks.0") else torch.float32)
    assert not model.blocks[1].training and model.training


def test_tied_weights_stay_tied():
    model = Model()
    graft_(model, ["embed", "head"], freeze=False, table=False)
    assert model.embed.weight is model.head.weight and isinstance(model.embed, KasminaLayer)
    assert sum(p is model.embed.weight for p in model.parameters()) == 1
    model(IDS).sum().backward()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
    optimizer.step()
    assert model.embed.weight is model.head.weight
    ungraft_(model)
    assert model.embed.weight is model.head.weight


def test_frozen_weights_do_not_move_and_seeds_do():
    model = Model()
    model.blocks[0].mlp[0].weight.requires_grad_(False)
    own = {name: p for name, p in model.named_parameters()}
    before, was = bits(model), flags(model)
    earlier = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)  # it knows all of them
    model(IDS).square().mean().backward()
    earlier.step()
    model.load_state_dict({n: b[1].view(b[0]).view(own[n].shape) for n, b in before.items() if n in own}, strict=False)
    seeds = graft_(model, "*.mlp.*", table=False)
    assert {n for n, f in flags(model).items() if f} == {f"{name}.blueprint_weights" for name in MLPS}
    assert seeds[:].graft()
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1, weight_decay=1.0))
    for _ in range(3):
        loss = model(IDS).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        earlier.step()
    assert model(IDS).square().mean() < loss
    assert all(layer.blueprint_weights.grad.abs().sum() > 0 for layer in seeds)
    ungraft_(model)
    assert same(bits(model), before) and flags(model) == was


def test_not_frozen_where_that_is_not_wanted():
    model = Model()
    model.head.weight.requires_grad_(False)
    was = flags(model)
    graft_(model, "*.mlp.*", freeze=False, table=False)
    assert all(f for n, f in flags(model).items() if n != "embed.weight")
    ungraft_(model)
    assert flags(model) == was and not was["embed.weight"]


# ---- taken out again -------------------------------------------------------------------------------------------------


def test_the_original_modules_come_back_bit_for_bit(device):
    model = Model().to(device)
    model.blocks[0].mlp[2].weight.requires_grad_(False)
    model.blocks[1].norm.eval()
    before, was, held = bits(model), flags(model), tree(model)
    y = model(IDS.to(device))
    seeds = graft_(model, "*", chunk_size=5, table=False)
    grow_some(seeds)
    assert not torch.equal(model(IDS.to(device)), y)
    model.train(), model.blocks[1].norm.eval()
    assert ungraft_(model) is model
    assert same(bits(model), before) and flags(model) == was and tree(model) == held
    assert list(flags(model)) == list(was)
    assert torch.equal(model(IDS.to(device)), y)
    with pytest.raises(ValueError, match="there is no KasminaLayer in the model"):
        ungraft_(model)
    with pytest.raises(ValueError, match="there is no KasminaLayer"):
        len(seeds)
    grow_some(graft_(model, "*", table=False))  # and again
    ungraft_(Seeds(model))
    assert same(bits(model), before) and flags(model) == was and tree(model) == held


def test_flags_survive_new_parameters_and_are_known_to_the_model_that_holds_this_one():
    inner = Model()
    inner.head.weight.requires_grad_(False)
    graft_(inner, "*.mlp.*", table=False)
    inner.load_state_dict({n: t.clone() for n, t in inner.state_dict().items()}, assign=True)
    outer = nn.ModuleDict({"inner": inner})
    ungraft_(outer)
    assert not inner.embed.weight.requires_grad and inner.norm.weight.requires_grad


def test_a_copy_is_taken_apart_too_and_has_no_flags():
    model = Model()
    graft_(model, "*.mlp.*", table=False)
    twin = copy.deepcopy(model)
    ungraft_(twin)
    assert not any(isinstance(module, KasminaLayer) for module in twin.modules()) and not any(flags(twin).values())
    assert len(Seeds(model).layers) == 4
    ungraft_(model)
    assert all(flags(model).values())


def test_layers_by_hand_go_as_well():
    model = Model()
    plain = model.blocks[0].mlp[0]
    outer = model.blocks[0].mlp[0] = KasminaLayer(KasminaLayer(plain, num_seeds=2), num_seeds=3)
    block = model.blocks[1]
    model.blocks[1] = KasminaLayer(block, hidden_dim=12)
    graft_(model, "blocks.1.mlp.*", table=False)  # inside of a layer, by its own name
    assert list(Seeds(model).layers) == [
        "blocks.0.mlp.0", "blocks.0.mlp.0.base_layer", "blocks.1", "blocks.1.base_layer.mlp.0",
        "blocks.1.base_layer.mlp.2",
    ]  # fmt: skip
    ungraft_(model)
    assert model.blocks[0].mlp[0] is plain and model.blocks[1] is block and type(block.mlp[0]) is nn.Linear
    assert outer.base_layer.base_layer is plain
    layer = KasminaLayer(nn.Linear(3, 4))
    base = layer.base_layer
    assert ungraft_(layer) is base


# ---- more of it ------------------------------------------------------------------------------------------------------


def test_grafting_more_of_a_model():
    model = Model()
    was, held = flags(model), tree(model)
    first = graft_(model, "blocks.0.*", table=False)
    layers = dict(first.layers)
    grow_some(first)
    bank = layers["blocks.0.norm"].blueprint_weights
    y = model(IDS)
    model.head.weight.requires_grad_(True)
    second = graft_(model, "blocks.*", table=False)
    assert list(second.layers) == ALL[1:7]
    assert {name: second.layers[name] for name in layers} == layers and bank.requires_grad
    assert second.skipped == dict.fromkeys(ALL[1:4], "it has seeds already")
    assert torch.equal(model(IDS), y) and len(first) == len(second)  # a handle goes by what there is
    with pytest.raises(ValueError, match="nothing left to graft:\n  blocks.0.norm: it has seeds already\n"):
        graft_(model, "blocks.*")
    with pytest.raises(ValueError, match="nothing left to graft"):
        graft_(second, model.blocks[0].mlp[0])
    ungraft_(model)
    assert flags(model) == was and tree(model) == held


def test_flags_are_those_before_the_first_layer():
    model = Model()
    graft_(model, "*.mlp.*", table=False)
    fold_(model)
    assert not any(flags(model).values())
    model.blocks.requires_grad_(True)
    was = flags(model)
    graft_(model, "*.mlp.*", table=False)
    graft_(model, "*.norm", table=False)
    ungraft_(model)
    assert flags(model) == was


def test_a_module_under_two_names_is_one():
    model = Model()
    held = tree(model)
    seeds = graft_(model, ["norm", "last_norm"], table=False)
    assert list(seeds.layers) == ["norm"] and model.norm is model.last_norm is seeds.layers["norm"]
    ungraft_(model)
    assert tree(model) == held
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(3, 4)
    y = model(x)
    seeds = graft_(model, "2", table=False)
    assert model[0] is model[2] is seeds.layers["0"] and torch.equal(model(x), y)
    assert seeds.layers["0"].telemetry[:, 3].eq(2).all()  # both calls


# ---- among other tools --------------------------------------------------------------------------------


def test_a_model_that_is_compiled_compiles_anew():
    model = Model()
    compiled = torch.compile(model, backend="eager")
    y = compiled(IDS)
    seeds = graft_(compiled, "*.mlp.*", table=False)
    assert list(seeds.layers) == MLPS and isinstance(model.blocks[0].mlp[0], KasminaLayer)
    torch.testing.assert_close(compiled(IDS), y)
    assert all(layer.telemetry[:, 3].eq(1).all() for layer in seeds)
    grow_some(seeds)
    changed = compiled(IDS)
    torch.testing.assert_close(changed, model(IDS))
    assert not torch.allclose(changed, y)
    assert ungraft_(compiled) is compiled
    torch.testing.assert_close(compiled(IDS), y)


def test_models_of_several_processes_are_grafted_before():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (nn.parallel.DistributedDataParallel, lambda model: distributed.fsdp.fully_shard(model)):
            model = wrap(Model())
            with pytest.raises(ValueError, match="the model is wrapped for several processes by .*: graft it before"):
                graft_(model, "*.mlp.*")
            grafted = Model()
            graft_(grafted, "*.mlp.*", freeze=False, table=False)
            outer = nn.ModuleDict({"inner": wrap(grafted)})
            with pytest.raises(ValueError, match="'inner' is wrapped .*: ungraft it before"):
                ungraft_(outer)
            assert len(Seeds(outer).layers) == 4
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("fails", ["building", "freezing", "table", "printing"])
def test_all_or_nothing(fails, monkeypatch):
    model = Model()
    model.norm.weight.requires_grad_(False)
    model(IDS).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    before, was, held = bits(model), flags(model), tree(model)
    calls = []

    def third(original):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    if fails == "building":
        monkeypatch.setattr("kasmina_ext.graft.KasminaLayer.reset_parameters", third(KasminaLayer.reset_parameters))
    elif fails == "freezing":
        freeze = graft._freeze

        def freeze_and_stop(model):
            freeze(model)
            raise KeyboardInterrupt

        monkeypatch.setattr(graft, "_freeze", freeze_and_stop)
    elif fails == "table":
        calls = [1, 2]
        monkeypatch.setattr(Seeds, "table", third(Seeds.table))
    else:
        calls = [1, 2]
        monkeypatch.setattr("kasmina_ext.seed_tables.GraftTable.show", third(None))
    with pytest.raises(KeyboardInterrupt):
        graft_(model, "*.mlp.*")
    monkeypatch.undo()
    assert same(bits(model), before) and flags(model) == was and tree(model) == held
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    graft_(model, "*.mlp.*", table=False)
    ungraft_(model)
    assert flags(model) == was  # nothing was remembered of the first try


# ---- as people type it -----------------------------------------------------------------------------------------------


def test_what_people_type_first(tmp_path):
    """As in the documentation, in one go: damage, repair, save, ship."""
    import kasmina_ext as kx

    model = Model()
    teacher = copy.deepcopy(model)
    with torch.no_grad():  # damage
        for block in model.blocks:
            block.mlp[2].weight *= torch.randn(12, 1).exp()

    def loss_fn(batch):
        return F.kl_div(model(batch).log_softmax(-1), teacher(batch).softmax(-1), reduction="none").sum((1, 2))

    val_loader = [torch.randint(20, (8, 5)) for _ in range(4)]
    damaged = torch.cat([loss_fn(batch) for batch in val_loader]).mean()

    seeds = kx.graft_(model, "*.mlp.*", chunk_size=16)
    opt = torch.optim.AdamW(kx.param_groups(model, lr=5e-2))
    grow = kx.GrowthController(seeds, opt, budget=0.9, tick_every=1, scale=0.02)
    for _ in range(60):
        loss = loss_fn(torch.randint(20, (16, 5))).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        grow.step(loss)
    verdict = grow.evaluate(val_loader, loss_fn)
    assert verdict.alive and verdict.loss < 0.5 * damaged
    rows = seeds.report()
    assert list(rows) == MLPS
    kx.save_seeds(model, tmp_path / "seeds.safetensors")
    y = model(IDS)
    plain = kx.fold_(model)
    assert plain is model and list(plain.state_dict()) == list(teacher.state_dict())
    torch.testing.assert_close(plain(IDS), y, rtol=1e-4, atol=1e-5)


def test_the_page_that_describes_it(capsys):
    """Its code runs, and prints what it says."""
    page = (Path(__file__).parent.parent / "docs" / "grafting.md").read_text()
    names: dict = {}
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for language, code in blocks:
        if language == "python":
            exec(code, names)
    printed, shown = capsys.readouterr().out, [text for language, text in blocks if not language]
    assert len(shown) == 2 and all(text in printed for text in shown)


def test_handles_where_models_are_asked_for(tmp_path):
    model = Model()
    seeds = graft_(model, "*.mlp.*", table=False)
    grow_some(seeds)
    y = model(IDS)
    assert list(graft_(seeds, "head", table=False).layers) == [*MLPS, "head"]
    control = GrowthController(seeds, tick_every=1)
    assert control.names == [*MLPS, "head"]
    save_seeds(seeds, tmp_path / "seeds")
    with pytest.raises(ValueError, match="of several modules, not of one model"):
        fold_(Seeds(list(seeds)))
    assert fold_(seeds) is model
    torch.testing.assert_close(model(IDS), y, rtol=1e-4, atol=1e-5)
