"""Loading a layer's checkpoint is all or nothing, whatever is in it, for the optimizer and the base layer too; and one
layer does not load another's.
"""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from growing import Run
from test_checkpoint_layer import at, same_values
from test_state_dict import assert_bits, empty, lived, tensors
from torch import nn

from kasmina_ext import CheckpointManager, KasminaLayer
from kasmina_ext.checkpoint import CheckpointMismatch, CheckpointNotFound, CheckpointSaveError, layer_content
from kasmina_ext.checkpoint import manager as manager_module
from kasmina_ext.checkpoint.layer import LayerCheckpoints


def trained(kind: type = torch.optim.AdamW, **options) -> tuple[KasminaLayer, torch.optim.Optimizer]:
    layer = empty()
    optimizer = kind(layer.parameters(), lr=0.1, **options)
    layer(torch.randn(2, 5)).square().sum().backward()
    optimizer.step()
    return layer, optimizer


# ---- what an optimizer does not take ---------------------------------------------------------------------------------


def every(name: str, value: object):
    """Spoils an entry of every parameter's state."""

    def spoil(state: dict) -> None:
        for values in state["state"].values():
            values[name] = value(values[name]) if callable(value) else value

    return spoil


def group(**entries: object):
    return lambda state: state["param_groups"][0].update(entries)


SPOILED = {
    "step is text": (every("step", "x"), "step of parameter 0 is 'x', must be a number"),
    "step is a vector": (every("step", torch.zeros(7)), r"step of parameter 0 is a tensor of shape \[7\]"),
    "a moment is text": (every("exp_avg", "evil"), "exp_avg of parameter 0 is 'evil'"),
    "a moment is missing": (
        lambda s: s["state"][1].pop("exp_avg_sq"),
        "of parameter 1 it does not remember exp_avg_sq",
    ),
    "a moment is complex": (every("exp_avg", lambda t: t + 0j), "exp_avg of parameter 0 is a tensor"),
    "more is text": (every("more", ["a"]), r"more of parameter 0 is \['a'\]"),
    "lr is text": (group(lr="hello"), "lr of group 0 is 'hello', in this one 0.1"),
    "lr is a vector": (group(lr=torch.ones(2)), r"lr of group 0 is a tensor of shape \[2\], in this one 0.1"),
    "betas are one": (group(betas=(0.9,)), r"betas of group 0 is \(0.9,\)"),
    "betas are missing": (lambda s: s["param_groups"][0].pop("betas"), "group 0 has no betas"),
    "a flag is text": (group(amsgrad="no"), "amsgrad of group 0 is 'no'"),
    "a flag is None": (group(amsgrad=None), "amsgrad of group 0 is None"),
    "amsgrad without": (group(amsgrad=True), "does not remember max_exp_avg_sq"),
    "numbers are a tensor": (group(params=torch.ones(3)), "its state is not what an optimizer saves"),
    "numbers are mixed": (lambda s: s["param_groups"][0]["params"].reverse(), "not numbered from 0 on"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_an_optimizers_state_that_it_would_not_make(tmp_path, name):
    spoil, message = SPOILED[name]
    layer, optimizer = trained()
    content = copy.deepcopy(layer_content.pack(layer, include_base=False, controller=None, optimizer=optimizer))
    spoil(content["optimizer"])
    CheckpointManager(tmp_path).save_layer("layer", "latest", content)
    before, bits = copy.deepcopy(optimizer.state_dict()), tensors(layer)
    with pytest.raises(CheckpointMismatch, match=f"fit the optimizer: .*{message}"):
        layer.load_checkpoint(checkpoint_dir=tmp_path, optimizer=optimizer)
    assert same_values(optimizer.state_dict(), before)
    assert_bits(layer, bits)


KINDS = {
    "AdamW": (torch.optim.AdamW, {"amsgrad": True}),
    "AdamW, tensor": (torch.optim.AdamW, {"foreach": False}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD, plain": (torch.optim.SGD, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Rprop": (torch.optim.Rprop, {}),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_optimizer_takes_back_its_own(tmp_path, name, used):
    kind, options = KINDS[name]
    layer, optimizer = trained(kind, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which leaves an entry in the group
    layer.save_checkpoint(checkpoint_dir=tmp_path, optimizer=optimizer)
    other = empty()
    fresh = trained(kind, **options)[1] if used else kind(other.parameters(), lr=0.5, **options)
    other.load_checkpoint(checkpoint_dir=tmp_path, optimizer=fresh)
    assert same_values(fresh.state_dict(), optimizer.state_dict())
    del scheduler


def test_lbfgs_and_a_rate_that_is_a_tensor(tmp_path):
    layer, _ = trained()
    optimizer = torch.optim.LBFGS([layer.blueprint_weights])
    x = torch.randn(2, 5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    layer.save_checkpoint(checkpoint_dir=tmp_path, optimizer=optimizer)
    fresh = torch.optim.LBFGS([layer.blueprint_weights])
    layer.load_checkpoint(checkpoint_dir=tmp_path, optimizer=fresh)
    assert same_values(fresh.state_dict(), optimizer.state_dict())
    one, two = (torch.optim.SGD([layer.blueprint_weights], lr=torch.tensor(rate)) for rate in (0.25, 0.5))
    layer.save_checkpoint(checkpoint_dir=tmp_path, optimizer=one)
    layer.load_checkpoint(checkpoint_dir=tmp_path, optimizer=two)
    assert two.param_groups[0]["lr"] == 0.25


def test_entries_of_groups_that_the_checkpoint_lacks_stay(tmp_path):
    layer, optimizer = trained()
    layer.save_checkpoint(checkpoint_dir=tmp_path, optimizer=optimizer)
    optimizer.param_groups[0]["initial_lr"] = 0.5
    layer.load_checkpoint(checkpoint_dir=tmp_path, optimizer=optimizer)
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


# ---- refused after all: everything is put back -----------------------------------------------------------------------


class Refusing(nn.Linear):
    """Checks nothing before, writes its weight, and then says no."""

    refuse: str | None = None

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.refuse == "interrupt":
            raise KeyboardInterrupt
        if self.refuse:
            args[-1].append(self.refuse)


class Writing(torch.optim.SGD):
    """Writes into its own tensors, and then says no."""

    refuse = False

    def load_state_dict(self, state_dict) -> None:
        if self.refuse:
            for values in self.state.values():
                values["momentum_buffer"].fill_(77)
            self.param_groups[0]["lr"] = 9.0
            self.param_groups[0]["params"].clear()
            raise ZeroDivisionError("no")
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("kind", ["alike", "strided", "of another dtype"])
@pytest.mark.parametrize("stops_after", range(8))
def test_an_exchange_is_taken_back_wherever_it_stopped(monkeypatch, kind, stops_after):
    """An interrupt comes after any copy, or after none."""
    monkeypatch.setattr(layer_content, "_STEP", 4)
    dtype = torch.float32 if kind == "of another dtype" else torch.float64
    own = [torch.arange(n, dtype=dtype) for n in (6, 0, 3)]
    if kind == "strided":
        own = [torch.stack([tensor, tensor], 1)[:, 0] for tensor in own]
    given = [torch.arange(n, dtype=torch.float64) - 10 for n in (6, 0, 3)]
    before, expected, exchange = [t.clone() for t in own], [t.to(dtype) for t in given], layer_content.Exchange()
    copy_, calls = torch.Tensor.copy_, iter(range(100))

    def copies(tensor, source):
        copy_(tensor, source)
        if next(calls) == stops_after:
            raise KeyboardInterrupt
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copies)
        try:
            for one, source in zip(own, given, strict=True):
                exchange.write(one, source)
        except KeyboardInterrupt:
            pass
        else:
            assert kind != "alike" and stops_after > 2
            assert all(map(torch.equal, own, expected))
    exchange.undo()
    assert all(map(torch.equal, own, before))


@pytest.mark.parametrize("who", ["base layer", "optimizer", "interrupt", "layer"])
def test_what_is_refused_while_it_is_written_is_put_back(tmp_path, who, monkeypatch):
    run = Run()
    run.step(5)
    layer, control = run.model.first, run.control
    layer.base_layer = Refusing(layer.base_layer.in_features, layer.base_layer.out_features)
    optimizer = Writing(layer.parameters(), lr=0.1, momentum=0.9)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parts = {"controller": control, "optimizer": optimizer}
    layer.save_checkpoint(checkpoint_dir=tmp_path, include_base=True, **parts)
    run.step(3)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.blueprint_weights.fill_(3)
    optimizer.param_groups[0]["lr"] = 5.0
    before, bits = copy.deepcopy(optimizer.state_dict()), tensors(layer)
    state, loaded = control.state_dict(), layer._loaded_history_count
    layer.base_layer.refuse = {"base layer": "no", "interrupt": "interrupt"}.get(who)
    optimizer.refuse = who == "optimizer"
    if who == "layer":
        monkeypatch.setattr(KasminaLayer, "_write_bank", lambda *args: 1 / 0)
    error = KeyboardInterrupt if who == "interrupt" else CheckpointMismatch
    with pytest.raises(error, match=None if who == "interrupt" else f"does not fit the {who}: "):
        layer.load_checkpoint(checkpoint_dir=tmp_path, **parts)
    assert same_values(optimizer.state_dict(), before) and same_values(control.state_dict(), state)
    assert_bits(layer, bits)
    assert layer._loaded_history_count is loaded
    assert optimizer.param_groups[0]["params"][0] is next(layer.parameters())


# ---- content of other types than ours --------------------------------------------------------------------------------

TYPES = {
    "format": lambda c: c.update(format=torch.ones(2)),
    "num_seeds": lambda c: c["configuration"].update(num_seeds=torch.ones(2)),
    "strategy": lambda c: c["configuration"].update(strategy=torch.ones(2)),
    "chunking": lambda c: c["configuration"].update(chunking=torch.ones(2)),
    "auto_advance": lambda c: c["configuration"].update(auto_advance=1),
    "controller": lambda c: c["controller"].update(format=torch.ones(2)),
    "controller's layers": lambda c: c["controller"].update(layers=torch.ones(2)),
    "base": lambda c: c.update(base={("a", 1): torch.ones(2)}),
}


@pytest.mark.parametrize("name", TYPES)
def test_tensors_where_numbers_belong(tmp_path, name):
    run = Run()
    layer = run.model.first
    content = copy.copy(layer_content.pack(layer, include_base=True, controller=run.control, optimizer=None))
    content["configuration"], content["controller"] = dict(content["configuration"]), dict(content["controller"])
    TYPES[name](content)
    CheckpointManager(tmp_path).save_layer("layer", "latest", content)
    bits = tensors(layer)
    with pytest.raises(CheckpointMismatch):
        layer.load_checkpoint(checkpoint_dir=tmp_path, controller=run.control)
    assert_bits(layer, bits)


OTHER_SHAPES = {
    "seeds": lambda c: c["configuration"].update(num_seeds=5),
    "bank": lambda c: c["layer"].update(blueprint_weights=torch.zeros(1 << 12, 1 << 8)),
    "base": lambda c: c["base"].update(weight=torch.zeros(1 << 12, 1 << 8)),
    "optimizer": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1 << 12, 1 << 8)),
    "layer_id": None,
}


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_what_does_not_fit_by_its_shapes_is_not_read(tmp_path, name, monkeypatch):
    layer, optimizer = trained()
    content = layer_content.pack(layer, include_base=True, controller=None, optimizer=optimizer)
    content["layer"] = dict(content["layer"])
    spoil = OTHER_SHAPES[name]
    if spoil is not None:
        spoil(content)
    found = CheckpointManager(tmp_path).save_layer("layer" if spoil else "other", "latest", content)
    read = []
    monkeypatch.setattr(manager_module.format, "read_tensors", lambda *args: read.append(args))
    with pytest.raises(CheckpointMismatch):
        layer.load_checkpoint(found, checkpoint_dir=tmp_path, optimizer=optimizer)
    assert read == []


def test_numbers_do_not_become_truths(tmp_path):
    base = nn.Linear(5, 22)
    base.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
    layer = KasminaLayer(base, num_seeds=4)
    content = layer_content.pack(layer, include_base=True, controller=None, optimizer=None)
    content["base"] = content["base"] | {"mask": torch.tensor([0, 1, 2])}
    CheckpointManager(tmp_path).save_layer("layer", "latest", content)
    with pytest.raises(CheckpointMismatch, match="base_layer.mask is torch.int64, in this layer torch.bool"):
        layer.load_checkpoint(checkpoint_dir=tmp_path)


# ---- bases in wrappers -----------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """What torch.compile makes of a module, without compiling: all names get ``_orig_mod.``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._orig_mod(x)


@pytest.mark.parametrize("source", ["plain", "wrapped", "compiled"])
@pytest.mark.parametrize("target", ["plain", "wrapped", "compiled"])
def test_a_base_layer_in_a_wrapper_goes_into_one_without_and_back(tmp_path, source, target):
    make = {"plain": lambda m: m, "wrapped": Wrapped, "compiled": torch.compile}
    layer, other = (
        KasminaLayer(make[way](nn.Linear(5, 22)), num_seeds=4, hidden_dim=22, feature_dim=-1)
        for way in (source, target)
    )
    layer.save_checkpoint(checkpoint_dir=tmp_path, include_base=True)
    other.load_checkpoint(checkpoint_dir=tmp_path)
    for one, two in zip(layer.base_layer.parameters(), other.base_layer.parameters(), strict=True):
        assert torch.equal(one, two)


# ---- tensors that no file can hold -----------------------------------------------------------------------------------


class Odd(torch.Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> Odd:
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(str(function))


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("where", ["base", "optimizer"])
def test_tensors_without_memory_are_refused(tmp_path, where, blocking):
    layer, optimizer = trained()
    if where == "base":
        layer.base_layer.register_buffer("odd", Odd(torch.ones(3)))
    else:
        next(iter(optimizer.state.values()))["exp_avg"] = Odd(torch.ones(3))
    with pytest.raises(ValueError, match=f"whose {where}.*(odd|exp_avg) is a Odd, no plain tensor"):
        layer.save_checkpoint(checkpoint_dir=tmp_path, include_base=True, optimizer=optimizer, blocking=blocking)
    assert list(tmp_path.iterdir()) == []
    layer.base_layer.odd = None
    layer.save_checkpoint(checkpoint_dir=tmp_path, include_base=True)


# ---- several layers in one directory ---------------------------------------------------------------------------------


def test_a_layer_loads_what_it_saved_itself(tmp_path):
    layer, other = lived(), lived()
    with torch.no_grad():
        other.blueprint_weights.fill_(9)
    mine = layer.save_checkpoint(checkpoint_dir=tmp_path)
    theirs = other.save_checkpoint(checkpoint_dir=tmp_path, layer_id="other")
    assert layer.load_checkpoint(checkpoint_dir=tmp_path) == mine  # though the other's is newer
    assert layer.load_checkpoint(checkpoint_dir=tmp_path, layer_id="other") == theirs
    bits = tensors(layer)
    for wrong, options in ((theirs, {}), (mine, {"layer_id": "other"})):
        with pytest.raises(
            CheckpointMismatch, match="was saved as layer_id='(other|layer)', not '(layer|other)': pass"
        ):
            layer.load_checkpoint(wrong, checkpoint_dir=tmp_path, **options)
    with pytest.raises(CheckpointNotFound):
        layer.load_checkpoint(checkpoint_dir=tmp_path, layer_id="third")
    assert_bits(layer, bits)
    assert layer.load_checkpoint(theirs, checkpoint_dir=tmp_path, layer_id=None) == theirs


def test_two_layers_that_save_as_one_are_told(tmp_path, monkeypatch):
    layer, other = lived(), lived()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            layer.save_checkpoint(checkpoint_dir=tmp_path)
        other.save_checkpoint("another", checkpoint_dir=tmp_path)
        other.save_checkpoint(checkpoint_dir=tmp_path, layer_id="other")
        other.save_checkpoint(checkpoint_dir=tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="give every layer a layer_id= of its own") as told:
        other.save_checkpoint(checkpoint_dir=".", blocking=False).result()
    assert told[0].filename == __file__
    del layer
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.save_checkpoint(checkpoint_dir=tmp_path)


def test_loading_tells_of_saves_that_failed_before(tmp_path, monkeypatch):
    layer = lived()
    good = layer.save_checkpoint(checkpoint_dir=tmp_path)

    def full(*args, **options) -> None:
        raise CheckpointSaveError(28, "disk full")

    with monkeypatch.context() as patched:
        patched.setattr(manager_module.format, "write", full)
        pending = layer.save_checkpoint(checkpoint_dir=tmp_path, blocking=False)
        while not pending.done():
            pass
    with pytest.warns(RuntimeWarning, match="was not saved: CheckpointSaveError.*disk full") as told:
        assert layer.load_checkpoint(checkpoint_dir=tmp_path) == good
    assert told[0].filename == __file__


def test_the_defaults_of_saving_and_loading_agree():
    save, load = (getattr(LayerCheckpoints, f"{name}_checkpoint").__kwdefaults__ for name in ("save", "load"))
    assert save["layer_id"] == load["layer_id"] == "layer"


def test_a_layer_of_inference_mode_is_loaded_there_only(tmp_path):
    """torch refuses to write its tensors elsewhere: that is said before any is written."""
    name = lived().save_checkpoint(checkpoint_dir=tmp_path)
    with torch.inference_mode():
        layer = empty()
    before = tensors(layer)
    with pytest.raises(CheckpointMismatch, match="whose tensors were made in inference mode: load it in torch.infe"):
        layer.load_checkpoint(checkpoint_dir=tmp_path)
    assert_bits(layer, before)
    with torch.inference_mode():
        assert layer.load_checkpoint(checkpoint_dir=tmp_path) == name
        assert layer.save_checkpoint(checkpoint_dir=tmp_path) != name


def test_a_directory_that_is_passed_is_looked_at_once(tmp_path, monkeypatch):
    """A save in the background must not wait for what others have in it."""
    layer, looks = lived(), []
    look = CheckpointManager._next_timestamp
    monkeypatch.setattr(CheckpointManager, "_next_timestamp", lambda *args: looks.append(1) or look(*args))
    for directory in ("one", "one", "one", "two", "two"):
        layer.save_checkpoint(checkpoint_dir=tmp_path / directory, blocking=False)
    assert len(looks) == 2
    layer.load_checkpoint(checkpoint_dir=tmp_path / "one")
    assert copy.deepcopy(layer).load_checkpoint(checkpoint_dir=tmp_path / "two").startswith("layer_latest_")


def test_values_are_still_looked_at(tmp_path):
    layer = lived()
    content = layer_content.pack(layer, include_base=False, controller=None, optimizer=None)
    content["layer"] |= {"alpha": at(1, 2.0)(content["layer"]["alpha"])}
    CheckpointManager(tmp_path).save_layer("layer", "latest", content)
    with pytest.raises(CheckpointMismatch, match="alpha must be"):
        layer.load_checkpoint(checkpoint_dir=tmp_path)
