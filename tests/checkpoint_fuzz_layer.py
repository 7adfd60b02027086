"""Whole checkpoints of a layer, its controller and its optimizer with random changes to what is in them, all sums right.

Each is refused with one of the package's errors, and the layer, the controller and the optimizer are as they were, bit
for bit; or it is loaded, and they hold what a second, plain reader finds in the files, within the ranges that the
documentation gives.
"""

from __future__ import annotations

import math
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import read_plainly, same
from checkpoint_fuzz import FILES, Fuzzer, change_sealed, odd_value, places_in
from torch import Tensor, nn

from kasmina_ext import CheckpointError, GrowthController, KasminaLayer
from kasmina_ext.checkpoint import format
from kasmina_ext.checkpoint.content import mapped
from kasmina_ext.checkpoint.header import layer_header
from kasmina_ext.checkpoint.layer_content import pack
from kasmina_ext.telemetry import TelemetryColumn

NOT_LOADED = {"config", "record"}
"""Of a controller: its own settings hold, and it keeps no record here."""
NAME = "layer_latest_5_00000000"
HEADER = layer_header("layer", "latest", 5, "normal", {})
_DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint32),
]
_NUMBERS = [0, -1, 1, 0.5, 2, 3, 4, 10, 11, 21, 22, 23, 127, -128, 2**31 - 1, -(2**31), 2**31, 2**40, 1e-40, 1e30, 3e38]
_NUMBERS += [math.nan, math.inf, -math.inf]


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


class Subject:
    """A layer that has lived, with what trains and what grows it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(5, 22), nn.BatchNorm1d(22))
        self.layer = KasminaLayer(base, num_seeds=4, num_blueprints=3, alpha_schedule="linear")
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=0.01, foreach=False)
        self.control = GrowthController(self.layer, self.optimizer, budget=0.5, tick_every=2)
        self.layer.request_state_transitions([0, 1], "GERMINATED", strategies=[0, 3])
        for _ in range(2 * seed + 3):
            self.use()
        self._state = self._now(copied)

    def use(self) -> None:
        """A step of training."""
        self.optimizer.zero_grad()
        self.layer(torch.randn(4, 5)).square().mean().backward()
        self.optimizer.step()
        self.control.step(0.5)

    def _now(self, kept: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Everything that a checkpoint may change."""
        return {
            "layer": mapped(dict(self.layer.state_dict()), kept),
            "optimizer": mapped(self.optimizer.state_dict(), kept),
            "controller": self.control._state(kept),
        }

    def unchanged(self) -> bool:
        return same(self._state, self._now(lambda tensor: tensor))

    def restore(self) -> None:
        self.layer.load_state_dict(self._state["layer"])
        self.optimizer.load_state_dict(mapped(self._state["optimizer"], copied))
        self.control.load_state_dict(self._state["controller"])

    def pack(self) -> dict[str, Any]:
        return pack(self.layer, include_base=True, controller=self.control, optimizer=self.optimizer)

    def load(self, root: Path) -> None:
        self.layer.load_checkpoint(
            NAME, checkpoint_dir=root, layer_id=None, controller=self.control, optimizer=self.optimizer
        )


class Layers(Fuzzer):
    """Checkpoints of one layer, changed, loaded into another one."""

    COUNTED = ("unchanged", "unwritable", "refused", "accepted", "wrong_content", "crashes")

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root, self._target = root, Subject(0)
        self._content = mapped(Subject(1).pack(), copied)
        format.write(root, NAME, HEADER, {"content": self._content})
        self._files = {name: (root / NAME / name).read_bytes() for name in FILES}

    def try_one(self, generator: random.Random) -> str:
        path = self._root / NAME
        if generator.randrange(4):
            content = mapped(self._content, lambda tensor: tensor)  # changes make new tensors
            for _ in range(generator.choice([1, 1, 1, 2, 3])):
                change_content(content, generator)
            shutil.rmtree(path)
            try:
                format.write(self._root, NAME, HEADER, {"content": content})
            except (TypeError, ValueError):
                outcome = "unwritable"
            else:
                outcome = self._judge()
        else:
            change_sealed(path, self._files, generator)
            outcome = self._judge()
        path.mkdir(exist_ok=True)
        for name, data in self._files.items():
            (path / name).write_bytes(data)
        return outcome

    def _judge(self) -> str:
        before = {id(tensor) for tensor in (*self._target.layer.parameters(), *self._target.layer.buffers())}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self._target.load(self._root)
            except CheckpointError as error:
                if self._target.unchanged():
                    return "refused" if str(error).strip() else "crashes: an error without a word"
                self._target.restore()
                return f"wrong_content: refused, but not as it was before: {error}"
            except BaseException as error:
                self._target.restore()
                return f"crashes: {type(error).__name__}: {error}"
        told = [str(each.message) for each in caught if "was saved by a layer with" not in str(each.message)]
        outcome = f"crashes: a warning: {told[0]}" if told else "accepted"
        try:
            if before != {id(tensor) for tensor in (*self._target.layer.parameters(), *self._target.layer.buffers())}:
                return "wrong_content: tensors were replaced"
            found = read_plainly(self._root / NAME)[1]["content"]
            differs = difference(self._target, found)
            if differs:
                return f"wrong_content: {differs}"
            if same(found, self._content):
                return "unchanged"
            self._target.layer(torch.randn(2, 5)).sum().backward()
            self._target.layer.step_lifecycle()
            self._target.control.step(0.5)
            self._target.layer.seed_report()
        except Exception as error:
            return f"crashes: when it is used: {type(error).__name__}: {error}"
        finally:
            self._target.restore()
        return outcome


# ---- what was loaded -----------------------------------------------------------------------------


def difference(subject: Subject, content: dict[str, Any]) -> str:
    """What of the subject is not what the content says, or out of its range; "" where nothing is."""
    layer = subject.layer
    for name in layer.BUFFER_DTYPES:
        own, given = layer._buffers[name], content["layer"][name]
        given = given.to(own.dtype) if own.is_floating_point() else given  # integers without error, others rounded
        if own.shape != given.shape or not equal(own, given):
            return f"{name} is {own}, the file has {given}"
    for name, low, high in (
        ("alpha", 0, 1),
        ("history", 0, 10),
        ("history_count", 0, 2**31 - 1),
        ("grad_telemetry", 0, math.inf),
    ):
        if not ((layer._buffers[name] >= low) & (layer._buffers[name] <= high)).all():
            return f"{name} is out of range"
    if layer.seed_offsets.tolist() != [0, 6, 12, 17, 22]:
        return f"the offsets are {layer.seed_offsets.tolist()}"
    for row, low, high in ((0, 0, 10), (1, -1, 2), (2, 0, 2**31 - 1), (3, 0, 3)):
        if not ((layer.state[row] >= low) & (layer.state[row] <= high)).all():
            return f"row {row} of the state is out of range"
    counts = [TelemetryColumn.COUNT, TelemetryColumn.BATCHES, TelemetryColumn.NONFINITE]
    if not ((layer.telemetry[:, counts] >= 0) & layer.telemetry[:, counts].isfinite()).all():
        return "telemetry has a count that is none"
    if not equal(layer.blueprint_weights, content["layer"]["blueprint_weights"].to(torch.float32)):
        return "the bank is another"
    own_base = layer.base_layer.state_dict()
    if content["base"] is not None:
        for name, own in own_base.items():
            if not equal(own, content["base"][name].to(own.dtype)):
                return f"{name} of the base layer is another"
    if not same_optimizer(subject.optimizer.state_dict(), content["optimizer"]):
        return "the optimizer's state is another"
    control, given = subject.control.state_dict(), content["controller"]
    for name in control.keys() & given.keys() - NOT_LOADED:
        if plain(control[name]) != plain(given[name]):
            return f"{name} of the controller is {control[name]}, the file has {given[name]}"
    return ""


def equal(one: Tensor, two: Tensor) -> bool:
    """As numbers, without error; NaN equals NaN."""
    one, two = (t.detach().double() if t.is_floating_point() else t.detach() for t in (one, two))
    if one.dtype != two.dtype:
        one, two = one.double(), two.double()  # which holds every int32
    return bool(((one == two) | ((one != one) & (two != two))).all())


def same_optimizer(own: dict[str, Any], given: dict[str, Any]) -> bool:
    for group, theirs in zip(own["param_groups"], given["param_groups"], strict=True):
        names = group.keys() & theirs.keys() - {"decoupled_weight_decay"}  # which AdamW sets by itself
        if any(plain(group[name]) != plain(theirs[name]) for name in names):
            return False
    if own["state"].keys() != given["state"].keys():
        return False
    for number, values in own["state"].items():
        theirs = given["state"][number]
        if values.keys() != theirs.keys():
            return False
        for name, value in values.items():
            if isinstance(value, Tensor):
                other = theirs[name]
                other = other.to(value.dtype) if isinstance(other, Tensor) else torch.tensor(other, dtype=value.dtype)
                if value.shape != other.shape or not equal(value, other):
                    return False
            elif plain(value) != plain(theirs[name]):
                return False
    return True


def plain(value: Any) -> Any:
    """To be compared with ==: tensors as dtype, shape and text (an integer as such), NaN as text, tuples as lists."""
    if isinstance(value, Tensor) and not value.dim() and value.dtype in (torch.int32, torch.int64):
        return value.item()
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), str(value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return repr(value) if isinstance(value, float) else value


# ---- changes -------------------------------------------------------------------------------------


def change_content(content: dict[str, Any], generator: random.Random) -> None:
    """One change, in place: of a tensor, or of a value, a name or an entry anywhere in the tree."""
    places = places_in(content)
    tensors = [(parent, key) for parent, key in places if isinstance(parent[key], Tensor)]
    if generator.randrange(3) and tensors:
        of_seeds = [(parent, key) for parent, key in tensors if parent is content.get("layer")]
        parent, key = generator.choice(of_seeds if of_seeds and generator.randrange(2) else tensors)
        other, other_key = generator.choice(tensors)
        parent[key] = changed_tensor(parent[key], other[other_key], generator)
        return
    parent, key = generator.choice(places)
    kind = generator.randrange(5)
    if kind == 0:
        number = generator.choice([*_NUMBERS, torch.tensor(3), torch.ones(4)])
        parent[key] = generator.choice([number, odd_value(generator)])
    elif kind == 1:
        del parent[key]
    elif kind == 2:
        other, other_key = generator.choice(places)
        parent[key] = mapped(other[other_key], lambda tensor: tensor)
    elif kind == 3 and isinstance(parent, dict):
        parent[generator.choice(["", "more", "$tuple", "state", 0, 7, -1, "alpha", "bias"])] = parent.pop(key)
    elif isinstance(parent, dict):
        parent["added"] = odd_value(generator)
    else:
        parent.insert(0, odd_value(generator))


def changed_tensor(tensor: Tensor, other: Tensor, generator: random.Random) -> Tensor:
    kind = generator.randrange(12)
    if kind == 0:
        dtype = generator.choice(_DTYPES)
        return tensor.to(dtype)
    if kind == 1:
        return other.clone()
    if kind == 2:
        return generator.choice([tensor.T if tensor.dim() == 2 else tensor[None], tensor[..., None], tensor.flatten()])
    if kind == 3 and tensor.dim():
        return generator.choice([tensor[:-1], torch.cat([tensor, tensor[:1]]), tensor[:0], tensor.flip(0)])
    if kind == 4 and not tensor.is_complex():
        return tensor.to(generator.choice([torch.float64, torch.int64])) + generator.choice([0.5, 1, -1, 2**33])
    number = generator.choice(_NUMBERS)
    if not tensor.is_floating_point() and not tensor.is_complex():
        if not math.isfinite(number) or abs(number) >= 2**62:
            number = -7
        if tensor.dtype != torch.bool:
            tensor = tensor.to(torch.int64)
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if tensor.numel():
        tensor.view(-1)[generator.randrange(tensor.numel())] = number
    return tensor
