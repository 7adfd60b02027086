"""A layer saves itself and goes on where it was saved: in full, on any device, in any dtype; or is left as it was."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from growing import Run
from test_state_dict import assert_bits, empty, lived, tensors
from torch import Tensor, nn

from kasmina_ext import CheckpointManager, GrowthController, KasminaLayer, TritonChunkedKasminaLayer, param_groups
from kasmina_ext.checkpoint import CheckpointDamaged, CheckpointMismatch, CheckpointNotFound, layer_content


def seeds(layer: KasminaLayer) -> dict[str, Tensor]:
    """Copies of the layer's own tensors."""
    return {name: t for name, t in tensors(layer).items() if not name.startswith("base_layer.")}


def assert_seeds(
    layer: KasminaLayer, expected: dict[str, Tensor], without: frozenset[str] | set[str] = frozenset()
) -> None:
    now = seeds(layer)
    assert now.keys() - without == expected.keys()
    for name, tensor in expected.items():
        assert now[name].dtype == tensor.dtype, name
        ours, theirs = (t.contiguous().cpu().flatten().view(torch.uint8) for t in (now[name], tensor))
        assert torch.equal(ours, theirs), name


def saved(directory: Path, layer: KasminaLayer | None = None, **options) -> tuple[str, dict[str, Tensor]]:
    layer = lived() if layer is None else layer
    return layer.save_checkpoint(checkpoint_dir=directory, **options), tensors(layer)


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["identifier", "tag"])
def test_every_tensor_of_the_seeds_comes_back_bit_for_bit(device, tmp_path, by):
    layer = lived(device)
    expected = seeds(layer)
    name = layer.save_checkpoint("one", checkpoint_dir=tmp_path)
    assert isinstance(name, str) and name.startswith("layer_one_")
    other = empty().to(device)
    weight = other.base_layer.weight.clone()
    assert other.load_checkpoint(name if by == "identifier" else "one", checkpoint_dir=tmp_path) == name
    assert_seeds(other, expected)
    assert torch.equal(other.base_layer.weight, weight)  # was not asked for
    assert_seeds(layer, expected)


def test_the_base_layer_on_request(tmp_path):
    base = nn.Sequential(nn.Linear(5, 22), nn.BatchNorm1d(22))
    layer = KasminaLayer(base, num_seeds=4)
    layer(torch.randn(8, 5))
    layer.save_checkpoint(checkpoint_dir=tmp_path, include_base=True)
    expected = tensors(layer)
    other = KasminaLayer(nn.Sequential(nn.Linear(5, 22), nn.BatchNorm1d(22)), num_seeds=4)
    weight = other.base_layer[0].weight
    other.load_checkpoint(checkpoint_dir=tmp_path)
    assert_bits(other, expected)
    assert other.base_layer[0].weight is weight
    wrong = KasminaLayer(nn.Linear(5, 22), num_seeds=4)
    with pytest.raises(CheckpointMismatch, match="holds another base layer: .* is not in both"):
        wrong.load_checkpoint(checkpoint_dir=tmp_path)
    smaller = KasminaLayer(nn.Sequential(nn.Linear(3, 22), nn.BatchNorm1d(22)), num_seeds=4)
    before = tensors(smaller)
    with pytest.raises(CheckpointMismatch, match=r"base_layer.0.weight has shape \[22, 5\], in this layer \[22, 3\]"):
        smaller.load_checkpoint(checkpoint_dir=tmp_path)
    assert_bits(smaller, before)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_bank_goes_into_another_dtype(device, tmp_path, source, target):
    layer = lived().to(source)
    layer.save_checkpoint(checkpoint_dir=tmp_path)
    expected = seeds(layer)
    other = empty().to(device, target)
    other.load_checkpoint(checkpoint_dir=tmp_path)
    bank = expected.pop("blueprint_weights").to(target)
    # Not bit by bit: a device may cast a NaN to one of another payload.
    torch.testing.assert_close(other.blueprint_weights.detach().cpu(), bank, rtol=0, atol=0, equal_nan=True)
    assert_seeds(other, expected, without={"blueprint_weights"})


def test_parameters_stay_and_versions_move(tmp_path):
    name, expected = saved(tmp_path)
    other = empty()
    bank, optimizer = other.blueprint_weights, torch.optim.AdamW(param_groups(other, lr=0.1))
    other(torch.randn(2, 5)).sum().backward()
    gradient = bank.grad
    y = other(torch.randn(2, 5)).sum()
    versions = {key: t._version for key, t in other.named_buffers()} | {"bank": bank._version}
    other.load_checkpoint(name, checkpoint_dir=tmp_path)
    moved = {key: t._version for key, t in other.named_buffers()} | {"bank": bank._version}
    assert all(moved[key] > version for key, version in versions.items())
    assert other.blueprint_weights is bank is optimizer.param_groups[0]["params"][0] and bank.grad is gradient
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    gradient.fill_(1)
    optimizer.step()
    assert not torch.equal(bank.nan_to_num(), expected["blueprint_weights"].nan_to_num())


def test_the_directory_of_a_layer(tmp_path):
    layer = KasminaLayer(nn.Linear(5, 22), checkpoint_dir=tmp_path / "deep" / "here")
    assert isinstance(layer.checkpoint_manager, CheckpointManager)
    assert layer.checkpoint_manager is layer.checkpoint_manager
    name = layer.save_checkpoint()
    assert (tmp_path / "deep" / "here" / name / "tensors.safetensors").exists()
    layer.checkpoint_dir = str(tmp_path)
    with pytest.raises(CheckpointNotFound):
        layer.load_checkpoint(name)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin.checkpoint_dir = tmp_path / "deep" / "here"
        assert twin.load_checkpoint(name) == name
    old = TritonChunkedKasminaLayer(nn.Linear(5, 22), 4, "cpu", str(tmp_path / "old"))
    assert old.load_checkpoint(old.save_checkpoint("best")).startswith("layer_best_")


def test_without_a_directory():
    layer = KasminaLayer(nn.Linear(5, 22))
    assert layer.checkpoint_manager is None
    for call in (layer.save_checkpoint, layer.load_checkpoint):
        with pytest.raises(RuntimeError, match="give the layer checkpoint_dir=, set layer.checkpoint_dir, or pass"):
            call()


def test_tags_retention_and_lists(tmp_path):
    layer = lived()
    layer.checkpoint_dir = tmp_path
    manager = layer.checkpoint_manager
    manager.max_checkpoints_per_seed = 2
    best = layer.save_checkpoint("best", priority="critical", include_base=True)
    names = []
    for errors in range(4):
        layer.extended_state.update_state(0, {"error_count": errors})
        names.append(layer.save_checkpoint())
    listed = manager.list_checkpoints()
    assert [entry["checkpoint_id"] for entry in listed] == [*names[:1:-1], best]
    summary = listed[-1]["summary"]
    assert summary["num_seeds"] == 4 and summary["states"] == {
        "DORMANT": 1,
        "GERMINATED": 1,
        "TRAINING": 1,
        "GRAFTING": 1,
    }
    assert summary["with"] == ["base"]
    other = empty(checkpoint_dir=tmp_path)
    other.load_checkpoint()
    assert other.state[7, 0] == 3
    other.load_checkpoint(names[2])
    assert other.state[7, 0] == 2
    other.load_checkpoint("best")
    assert other.state[7, 0] == 0
    layer.save_checkpoint(layer_id="second")
    other.load_checkpoint("latest", layer_id="second")
    for wrong in ("", "a b", "../x", "x" * 33, 7):
        with pytest.raises(ValueError, match="Invalid tag"):
            layer.save_checkpoint(wrong)
    with pytest.raises(ValueError, match="Invalid priority"):
        layer.save_checkpoint(priority="urgent")


# ---- what is refused -------------------------------------------------------------------------------------------------

OTHERS = {
    "seeds": (lambda: empty(num_seeds=5), "has 4 seeds, this layer 5"),
    "features": (
        lambda: KasminaLayer(nn.Linear(5, 24), num_seeds=4, num_blueprints=3),
        "has 22 features, this layer 24",
    ),
    "blueprints": (lambda: empty(num_blueprints=2), "has 3 blueprints, this layer 2"),
    "chunking": (
        lambda: empty(chunking="uniform"),
        "seed_offsets are cut with chunking='balanced', in this layer with 'uniform'",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_of_another_shape_is_told_what_differs(tmp_path, name):
    saved(tmp_path)
    make, message = OTHERS[name]
    other = make()
    before = tensors(other)
    with pytest.raises(CheckpointMismatch, match=message):
        other.load_checkpoint(checkpoint_dir=tmp_path)
    assert_bits(other, before)


def test_arguments_that_need_not_agree(tmp_path):
    saved(tmp_path)
    other = empty(alpha_schedule=None, ramp_epochs=7)
    with pytest.warns(UserWarning, match=r"alpha_schedule='linear' \(now 'none'\), ramp_epochs=50 \(now 7\): the"):
        other.load_checkpoint(checkpoint_dir=tmp_path)
    assert other.ramp_epochs == 7
    uniform = KasminaLayer(nn.Linear(5, 24), num_seeds=4, chunking="uniform")
    name, expected = saved(tmp_path, uniform)
    balanced = KasminaLayer(nn.Linear(5, 24), num_seeds=4, chunking="balanced")  # the same cuts
    balanced.load_checkpoint(name, checkpoint_dir=tmp_path)
    assert torch.equal(balanced.blueprint_weights, expected["blueprint_weights"])


def change(*path: str, to: object):
    def changed(content: dict) -> None:
        *parents, last = path
        for parent in parents:
            content = content[parent]
        content[last] = to(content[last]) if callable(to) else to

    return changed


def at(index: object, value: float):
    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return changed


REFUSED = {
    "format": (change("format", to=2), "no layer's checkpoint of format 1"),
    "parts": (lambda c: c.pop("base"), "no layer's checkpoint of format 1"),
    "more parts": (lambda c: c.update(more=1), "no layer's checkpoint"),
    "configuration": (change("configuration", to=[]), "does not tell its layer's configuration"),
    "lying": (change("configuration", "num_seeds", to="4"), "has 4 seeds, this layer 4"),
    "no tensors": (change("layer", to=None), "does not hold the layer's tensors"),
    "a tensor less": (lambda c: c["layer"].pop("alpha"), "does not hold the layer's tensors"),
    "a tensor more": (lambda c: c["layer"].update(x=torch.ones(1)), "does not hold the layer's tensors"),
    "no tensor": (change("layer", "alpha", to=[1.0] * 4), "alpha must be a tensor, got list"),
    "state's shape": (change("layer", "state", to=lambda t: t[:, :3]), r"state must have shape \[8, 4\], got \[8, 3\]"),
    "state's dtype": (change("layer", "state", to=lambda t: t > 0), "state must be integers, got torch.bool"),
    "state's values": (change("layer", "state", to=at((0, 2), 11)), r"state must be in \[0, 10\], got 11 as LIFECYCLE"),
    "blueprint": (change("layer", "state", to=at((1, 2), 3)), r"state must be in \[-1, 2\], got 3 as BLUEPRINT_ID"),
    "offsets": (change("layer", "seed_offsets", to=at(1, -7)), "seed_offsets cuts the features differently"),
    "alpha": (change("layer", "alpha", to=at(1, 2.0)), r"alpha must be in \[0, 1\], got 2.0"),
    "alpha is NaN": (change("layer", "alpha", to=at(1, torch.nan)), r"alpha must be in \[0, 1\], got nan"),
    "counts": (
        change("layer", "telemetry", to=at((0, 0), -1)),
        r"telemetry must be in \[0, inf\), got -1.0 in a count",
    ),
    "endless counts": (
        change("layer", "telemetry", to=at((0, 3), torch.inf)),
        "telemetry must be in .*, got inf in a co",
    ),
    "history": (change("layer", "history", to=at((0, 0, 0), 99)), r"history must be in \[0, 10\], got 99"),
    "history count": (change("layer", "history_count", to=at(0, -1)), "history_count must be in"),
    "bank": (change("layer", "blueprint_weights", to=lambda t: t.t()), r"blueprint_weights must have shape \[3, 22\]"),
    "complex bank": (change("layer", "blueprint_weights", to=lambda t: t + 0j), "blueprint_weights must be numbers"),
    "base": (change("base", to={"weight": torch.ones(1)}), "holds another base layer: bias is not in both"),
    "base's dtype": (
        lambda c: c.update(base={"weight": torch.ones(22, 5, dtype=torch.int8), "bias": torch.ones(22)}),
        "base_layer.weight is torch.int8, in this layer torch.float32",
    ),
    "base's tensors": (change("base", to={"weight": 1, "bias": 2}), "base_layer.weight is no tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_whatever_is_wrong_with_a_whole_checkpoint_the_layer_stays_as_it_was(tmp_path, name):
    """Hashes and all are right: somebody wrote it so."""
    spoil, message = REFUSED[name]
    layer = lived()
    content = copy.copy(layer_content.pack(layer, include_base=False, controller=None, optimizer=None))
    content["layer"], content["configuration"] = dict(content["layer"]), dict(content["configuration"])
    spoil(content)
    found = CheckpointManager(tmp_path).save_layer("layer", "latest", content)
    other = empty()
    before, versions = tensors(other), [t._version for t in other.buffers()]
    with pytest.raises(CheckpointMismatch, match=f"checkpoint {found} .*{message}"):
        other.load_checkpoint(checkpoint_dir=tmp_path)
    assert_bits(other, before)
    assert [t._version for t in other.buffers()] == versions


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    content = layer_content.pack(lived(), include_base=False, controller=None, optimizer=None)
    content["layer"] |= {"alpha": torch.full((4,), 3.0), "history_count": torch.full((4,), -1)}
    CheckpointManager(tmp_path).save_layer("layer", "latest", content)
    with pytest.raises(CheckpointMismatch, match="alpha must.*; history_count must"):
        empty().load_checkpoint(checkpoint_dir=tmp_path)


def test_a_flipped_bit_and_a_checkpoint_that_is_not_there(tmp_path):
    name, _ = saved(tmp_path)
    file = tmp_path / name / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    other = empty(checkpoint_dir=tmp_path)
    before = tensors(other)
    with pytest.raises(CheckpointDamaged, match="tensors.safetensors"):
        other.load_checkpoint(name)
    for missing in ("never", "layer_latest_1_00000000"):
        with pytest.raises(CheckpointNotFound, match="Checkpoint not found"):
            other.load_checkpoint(missing)
    with pytest.raises(ValueError):
        other.load_checkpoint("../" + name)
    assert_bits(other, before)


@pytest.mark.parametrize("blocking", [True, False])
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, blocking):
    layer = lived()
    layer.lifecycle_states[2] = 99
    with pytest.raises(ValueError, match="not saved: state must be in .*, got 99 as LIFECYCLE_STATE"):
        save = layer.save_checkpoint(checkpoint_dir=tmp_path, blocking=blocking)
        save.result()
    assert list(tmp_path.iterdir()) == []


def test_layers_that_cannot_be_saved_or_loaded(tmp_path):
    with torch.device("meta"):
        meta = KasminaLayer(nn.Linear(5, 22), num_seeds=4, num_blueprints=3, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        meta.save_checkpoint()
    bound = empty(checkpoint_dir=tmp_path)
    torch.nn.utils.parametrize.register_parametrization(bound, "blueprint_weights", nn.Tanh())
    with pytest.raises(ValueError, match="parametrized"):
        bound.save_checkpoint()
    saved(tmp_path)
    for layer in (meta, bound):
        with pytest.raises(CheckpointMismatch, match="cannot be loaded into a layer whose"):
            layer.load_checkpoint()
    assert len(list(tmp_path.iterdir())) == 1


# ---- with a controller and an optimizer ------------------------------------------------------------------------------


def test_with_controller_and_optimizer(tmp_path):
    run, fresh = Run(), Run()
    run.step(20)
    first, second = run.model.layers
    first.save_checkpoint("a", checkpoint_dir=tmp_path, controller=run.control, optimizer=run.optimizer)
    second.save_checkpoint("b", checkpoint_dir=tmp_path)
    state, moments = run.control.state_dict(), copy.deepcopy(run.optimizer.state_dict()["state"])
    banks = list(fresh.optimizer.param_groups[0]["params"])
    fresh.model.first.load_checkpoint("a", checkpoint_dir=tmp_path, controller=fresh.control, optimizer=fresh.optimizer)
    fresh.model.second.load_checkpoint("b", checkpoint_dir=tmp_path)
    assert all(old is new for old, new in zip(banks, fresh.optimizer.param_groups[0]["params"], strict=True))
    for one, two in ((state, fresh.control.state_dict()), (moments, fresh.optimizer.state_dict()["state"])):
        assert same_values(one, two)
    with pytest.raises(CheckpointMismatch, match="holds no controller's state.*; holds no optimizer's state"):
        fresh.model.second.load_checkpoint(
            "b", checkpoint_dir=tmp_path, controller=fresh.control, optimizer=fresh.optimizer
        )


def same_values(one: object, two: object) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one.cpu(), two.cpu())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_values(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same_values, one, two))
    return one == two


def test_a_controller_or_optimizer_of_something_else_leaves_all_as_it_was(tmp_path):
    run = Run()
    run.step(20)
    run.model.first.save_checkpoint(checkpoint_dir=tmp_path, controller=run.control, optimizer=run.optimizer)
    other = Run()
    other.step(3)
    layer = other.model.first
    alone = GrowthController(layer)
    less = torch.optim.AdamW([layer.blueprint_weights])
    shapes = torch.optim.AdamW([other.model.second.blueprint_weights, layer.blueprint_weights])
    before, moments = tensors(other.model), copy.deepcopy(other.optimizer.state_dict())
    control = other.control.state_dict()
    for given, message in (
        ({"controller": alone}, "does not fit the controller: the state is of layers"),
        ({"optimizer": less}, r"trained groups of \[2\] parameters, this one \[1\]"),
        ({"optimizer": shapes}, "exp_avg of parameter 0 has shape"),
        ({"controller": other.control, "optimizer": less}, "does not fit the optimizer"),
        ({"controller": alone, "optimizer": other.optimizer}, "does not fit the controller"),
    ):
        with pytest.raises(CheckpointMismatch, match=message):
            layer.load_checkpoint(checkpoint_dir=tmp_path, **given)
    assert_bits(other.model, before)
    assert same_values(other.optimizer.state_dict(), moments) and same_values(other.control.state_dict(), control)
    layer.load_checkpoint(checkpoint_dir=tmp_path)  # what is not asked for need not fit


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("steps", -1, "steps must be"),
        ("steps", "5", "steps must be"),
        ("lives", torch.zeros(3), "lives in the state must be"),
        ("lives", torch.zeros(7), "lives in the state must be"),
        ("losses", 0.5, "losses in the state must be"),
        ("watched", [], "watched in the state must be a list of 2"),
        ("reconstruction", [torch.zeros(1)] * 2, "reconstruction in the state must be"),
        ("snapshots", [], "snapshots in the state must be a list of 2"),
        ("snapshots", [[], [torch.zeros(1)]], "other banks"),
        ("snapshots", [[], 7], "of other banks"),
        ("budget", 7.5, "budget must be"),
        ("budget", 2**63, "budget must be"),
        ("layers", {"first": 1}, "is of layers"),
        ("format", 3, "no controller's state"),
    ],
)
def test_a_controllers_state_is_checked_before_anything_changes(name, wrong, message):
    run = Run()
    run.step(5)
    before = run.control.state_dict()
    for state in (before | {name: wrong}, {key: value for key, value in before.items() if key != name}):
        with pytest.raises(ValueError, match=message if name in state else "has no|no controller's state"):
            run.control.load_state_dict(state)
    assert same_values(run.control.state_dict(), before)


def test_an_optimizers_state_that_is_none(tmp_path):
    layer = empty()
    optimizer = torch.optim.SGD([layer.blueprint_weights], lr=0.1, momentum=0.9)
    layer(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    content = layer_content.pack(layer, include_base=False, controller=None, optimizer=optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    for wrong in (
        [],
        {"state": {}, "param_groups": 7},
        {"state": {}, "param_groups": [{}]},
        {"state": {9: {}}, "param_groups": before["param_groups"]},
        {"state": {0: 5}, "param_groups": before["param_groups"]},
        {"state": {"0": {}}, "param_groups": before["param_groups"]},
        {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": before["param_groups"]},
        {"state": {}, "param_groups": before["param_groups"] * 2},
        {"state": {}, "param_groups": [{"params": ["x"], "lr": 0.1}]},
        {"state": {}, "param_groups": [{"params": [0]}]},
    ):
        CheckpointManager(tmp_path).save_layer("layer", "latest", content | {"optimizer": wrong})
        bits = tensors(layer)
        with pytest.raises(CheckpointMismatch, match="fit the optimizer"):
            layer.load_checkpoint(checkpoint_dir=tmp_path, optimizer=optimizer)
        assert_bits(layer, bits)
        assert same_values(optimizer.state_dict(), before)
