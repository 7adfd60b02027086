"""What an optimizer saved, checked against another one before that takes it, and how to take it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_ext.checkpoint.content import mapped

# What optimizers remember in a parameter's shape ...
_MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "sum"})
# ... and as one number.
_NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})
# What may be None, too.
_CHOICES = frozenset({"foreach", "fused"})
# What they cannot step without, once they remember anything of a parameter.
_MADE = {
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},  # and AdamW
    torch.optim.NAdam: {"step", "exp_avg", "exp_avg_sq", "mu_product"},
    torch.optim.RAdam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Adamax: {"step", "exp_avg", "exp_inf"},
    torch.optim.RMSprop: {"step", "square_avg"},
    torch.optim.Adagrad: {"step", "sum"},
    torch.optim.Adadelta: {"step", "square_avg", "acc_delta"},
}


def optimizer_problems(optimizer: Optimizer, state: Any) -> Iterator[str]:
    """Why ``state`` is none of this optimizer's: groups of other sizes, entries missing or of another kind, and what it
    remembers of parameters. Believes nothing, changes nothing.
    """
    groups = state.get("param_groups") if isinstance(state, dict) else None
    remembered = state.get("state") if isinstance(state, dict) else None
    if not _is_saved(groups, remembered):
        yield "its state is not what an optimizer saves"
        return
    theirs = [len(group["params"]) for group in groups]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        yield f"it trained groups of {theirs} parameters, this one {ours}"
        return
    numbers = [number for group in groups for number in group["params"]]
    if not all(type(number) is int for number in numbers) or numbers != list(range(len(numbers))):
        yield "its parameters are not numbered from 0 on"
        return
    for index, (group, mine) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        for name, own in mine.items():
            unset = name in _CHOICES and group.get(name, own) is None
            if name in group and name != "params" and not unset and not _same_kind(group[name], own):
                yield f"{name} of group {index} is {_shown(group[name])}, in this one {_shown(own)}"
            if name not in group and name in optimizer.defaults:  # others are a scheduler's, say: then ours stay
                yield f"group {index} has no {name}"
    trained = [(p, group) for group, mine in zip(groups, optimizer.param_groups, strict=True) for p in mine["params"]]
    for number, values in remembered.items():
        if type(number) is not int or not 0 <= number < len(trained):
            yield f"there is no parameter {_shown(number)}"
            continue
        parameter, group = trained[number]
        if hasattr(parameter, "placements"):
            yield f"parameter {number} is sharded: use torch.distributed.checkpoint"
            continue
        missing = sorted(_needed(optimizer, group) - values.keys()) if values else []
        if missing:
            yield f"of parameter {number} it does not remember {', '.join(missing)}"
        own = optimizer.state.get(parameter, {})
        for name, value in values.items():
            problem = _value_problem(name, value, parameter, own)
            if problem is not None:
                yield f"{str(name)[:40]} of parameter {number} {problem}"


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` of what :func:`optimizer_problems` found nothing wrong with. Entries of groups that
    ``state`` lacks stay as they are.
    """
    groups = []
    for group, mine in zip(state["param_groups"], optimizer.param_groups, strict=True):
        moved = {name: _moved(value, mine.get(name)) for name, value in group.items()}
        groups.append({name: value for name, value in mine.items() if name != "params"} | moved)
    optimizer.load_state_dict({**state, "param_groups": groups})


def undo_of(optimizer: Optimizer) -> Callable[[], None]:
    """What puts state and groups back as they are now."""
    # torch's own loading writes into no tensor that is there; another class's may.
    plain = type(optimizer).load_state_dict is Optimizer.load_state_dict
    keep = (lambda tensor: tensor) if plain else (lambda tensor: tensor.detach().clone())
    state, groups = optimizer.state, optimizer.param_groups
    remembered = {parameter: mapped(values, keep) for parameter, values in state.items()}
    entries = [(group, dict(group), list(group["params"])) for group in groups]

    def undo() -> None:
        state.clear()
        state.update(remembered)
        for group, entry, parameters in entries:
            group.clear()
            group.update(entry)
            group["params"][:] = parameters
        groups[:] = [group for group, _, _ in entries]
        optimizer.state, optimizer.param_groups = state, groups

    return undo


def _is_saved(groups: Any, remembered: Any) -> bool:
    return (
        isinstance(groups, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        and isinstance(remembered, dict)
        and all(isinstance(values, dict) for values in remembered.values())
    )


def _needed(optimizer: Optimizer, group: Mapping[str, Any]) -> set[str]:
    made = set().union(*(names for kind, names in _MADE.items() if isinstance(optimizer, kind)))
    if "exp_avg_sq" in made and group.get("amsgrad") is True:
        made.add("max_exp_avg_sq")
    if "square_avg" in made and group.get("centered") is True:
        made.add("grad_avg")
    return made


def _same_kind(theirs: Any, ours: Any) -> bool:
    """Whether an optimizer that has ``ours`` in a group can have ``theirs`` there."""
    if isinstance(theirs, Tensor) or isinstance(ours, Tensor):
        return _is_tensor_like(theirs, ours)
    if ours is None:  # foreach, for one
        return theirs is None or type(theirs) is bool
    if type(ours) in (int, float):
        return type(theirs) in (int, float)
    if isinstance(ours, (list, tuple)):
        return isinstance(theirs, (list, tuple)) and len(theirs) == len(ours) and all(map(_same_kind, theirs, ours))
    return type(theirs) is type(ours)


def _is_tensor_like(theirs: Any, ours: Any) -> bool:
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor) or theirs.shape != ours.shape:
        return False
    return (theirs.is_floating_point(), theirs.is_complex()) == (ours.is_floating_point(), ours.is_complex())


def _value_problem(name: Any, value: Any, parameter: Tensor, own: Mapping[str, Any]) -> str | None:
    if name in _MOMENTS:
        if value is None and name == "momentum_buffer":
            return None
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            return f"has shape {list(value.shape)}, the parameter {list(parameter.shape)}"
        return None if _is_tensor_like(value, parameter) else f"is {_shown(value)}"
    if name in _NUMBERS:
        real = isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()
        return None if real or type(value) in (int, float) else f"is {_shown(value)}, must be a number"
    mine = own.get(name)
    if isinstance(value, Tensor) and isinstance(mine, Tensor):
        return None if _is_tensor_like(value, mine) else f"is {_shown(value)}, in this one {_shown(mine)}"
    return None if _is_numeric(value) or type(value) is type(mine) else f"is {_shown(value)}"


def _is_numeric(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_numeric, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_numeric, value))
    return value is None or isinstance(value, (Tensor, bool, int, float))


def _moved(value: Any, own: Any) -> Any:
    return value.to(own.device, own.dtype) if isinstance(value, Tensor) and isinstance(own, Tensor) else value


def _shown(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]
