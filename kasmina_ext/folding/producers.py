"""Which module inside a block makes its output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from kasmina_ext.folding.targets import NotFoldable, form_of
from kasmina_ext.folding.trial import stripped_copy
from kasmina_ext.layer import KasminaLayer

# They keep the factor of what goes through, and drop what was added along with the rest.
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)


class Production(NamedTuple):
    """Who makes a module's output."""

    path: list[tuple[str, nn.Module]]
    """From the module itself, named "", to the one that makes it; names are relative to the module."""
    dropouts: list[nn.Module]
    """That come after it and do drop something when they train; or blocks that do so themselves."""

    @property
    def target(self) -> nn.Module:
        return self.path[-1][1]


def production_of(module: nn.Module) -> Production:
    """The module with weights (see :func:`~kasmina_ext.folding.targets.form_of`) that makes ``module``'s output, or the
    first element of its tuple.

    Known of Sequential and some of torch's blocks; of other blocks it is traced, symbolically, for
    all arguments (flags both ways), for none of the optional ones and for each of them, training and
    not: NotFoldable where these do not all end in the same module, called once.
    """
    path, dropouts = [("", module)], []
    while not _is_end(path[-1][1]):
        name, block = path[-1]
        inner, after = _inside(block)
        dropouts += after
        for part in inner.split("."):  # all on the way: none of them may be used elsewhere
            name, block = f"{name}.{part}" if name else part, block._modules[part]
            path.append((name, block))
    return Production(path, dropouts)


def _is_end(module: nn.Module) -> bool:
    return not isinstance(module, KasminaLayer) and form_of(module) is not None


def _inside(block: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name of the module that makes ``block``'s output, and the dropouts that follow it."""
    kind = type(block)
    if isinstance(block, KasminaLayer):
        return "base_layer", []
    if kind.__name__ == "OptimizedModule" and "_orig_mod" in block._modules:  # torch.compile's
        return "_orig_mod", []
    if "_packed_params" in block._modules:  # torch.ao's
        raise NotFoldable("its weight is packed: quantised")
    if "forward" in vars(block):
        raise NotFoldable("its forward was replaced on the instance, so what makes its output is not known")
    if kind.forward is nn.MultiheadAttention.forward:
        return "out_proj", []
    if kind.forward is nn.TransformerEncoderLayer.forward and not block.norm_first:
        return "norm2", []
    if kind.forward is nn.TransformerDecoderLayer.forward and not block.norm_first:
        return "norm3", []
    if kind.forward is nn.Sequential.forward:
        after = []
        for name, child in reversed(block._modules.items()):
            if not _passes(child):
                return name, after
            after += [child] if _drops(child) else []
        raise NotFoldable("there is no module with weights in it")
    return _traced(block)


def _passes(module: nn.Module) -> bool:
    return type(module) is nn.Identity or type(module) in _DROPOUTS


def _drops(module: nn.Module) -> bool:
    return type(module) in _DROPOUTS and module.p > 0


# ---- symbolic tracing ------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Modules that may take a and b stay whole; so do layers with seeds."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, KasminaLayer) or form_of(m) is not None
        return whole or super().is_leaf_module(m, module_qualified_name)


def _traced(block: nn.Module) -> tuple[str, list[nn.Module]]:
    kind = type(block).__name__
    found: set[str] = set()
    dropouts: set[str] = set()
    try:
        # Parameters are shared, all else is a copy: a forward may keep what it sees on its module.
        skeleton = stripped_copy(block, share_tensors=True)
        for training in (True, False):
            for given in _ways_to_call(skeleton):
                tracer = _Tracer()
                graph = tracer.trace(skeleton.train(training), concrete_args=given or None)
                name, after = _end_of(graph, skeleton)
                found.add(name)
                dropouts |= set(after) if training else set()
    except NotFoldable:
        raise
    except Exception as error:  # tracing runs a stranger's code with stand-ins for tensors
        line = str(error).strip().splitlines() or [type(error).__name__]
        raise NotFoldable(f"it is a block, and tracing which module makes its output failed: {line[0]}") from None
    if len(found) != 1:
        raise NotFoldable(f"{kind}'s output comes from one of {', '.join(sorted(found))}, as it is called")
    return found.pop(), [block.get_submodule(name) for name in dropouts]


def _ways_to_call(block: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments that are not stand-ins: none of the optional ones as by default, all of them, all but one.

    A flag is one or the other; what is not given otherwise could be anything.
    """
    parameters = inspect.signature(type(block).forward).parameters.values()
    plain = (type(None), bool, int, float, str)
    default = {p.name: p.default for p in parameters if p.default is not p.empty and isinstance(p.default, plain)}
    flags = {name: not value for name, value in default.items() if isinstance(value, bool)}
    yield flags
    if default:
        yield default
    for name in default if len(default) > 1 else ():
        others = {other: value for other, value in default.items() if other != name}
        yield others | ({name: flags[name]} if name in flags else {})


def _end_of(graph: fx.Graph, block: nn.Module) -> tuple[str, list[str]]:
    """Names of the module that makes the output and of those that drop some of it later, "" for the block itself."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    node = output.args[0]
    if isinstance(node, (tuple, list)) and node:
        first, *others = node
        if first in others:
            raise NotFoldable("its output is returned twice")
        node = first
    after = []
    while isinstance(node, fx.Node):
        if len(node.users) > 1:
            raise NotFoldable(f"what {node.target} puts out is used for more than the output")
        if node.op == "call_module":
            module = block.get_submodule(node.target)
            if not _passes(module):
                return _checked_end(graph, node.target), after
            after += [node.target] if _drops(module) else []
        elif node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS:
            after.append("")
        elif node.op != "call_method" or node.target != "contiguous":
            break
        node = node.args[0]
    last = getattr(node, "target", node)
    raise NotFoldable(f"its output is made by {getattr(last, '__name__', last)}, not by a module with weights")


def _checked_end(graph: fx.Graph, name: str) -> str:
    """NotFoldable where the block uses the module, or its weights, for something else as well."""
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith(f"{name}."):
            raise NotFoldable(f"it uses {node.target} beside calling {name}")
    if sum(node.op == "call_module" and node.target == name for node in graph.nodes) > 1:
        raise NotFoldable(f"it calls {name} more than once")
    return name
