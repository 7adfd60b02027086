"""What modules put out, batch by batch, observed so that nothing notices: for calibration, and recorded for later."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from kasmina_ext.extras import missing_extra
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.names import matches, original_name
from kasmina_ext.wrapper import CallsOnly

Forward = Callable[[nn.Module, Any], Any]
"""Passes one batch through a model; what it returns is not looked at."""
Recorded = Mapping[str, Tensor | Sequence[Tensor]]
"""By a module's name what it put out: a tensor for each call, or one of all batches, joined along dimension 0."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Without DataParallel and its like, whose forward talks to other ranks or copies modules, hooks and all."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that may be called, under its original name; of several that share one, a wrapper and what it wraps,
    the outermost."""
    named: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CallsOnly):
            named.setdefault(original_name(name), module)
    return named


def tensor_of(output: Any, name: str) -> Tensor:
    """A module's output, or the first element of a tuple. TypeError for anything else."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(
            f"{name!r} returned {type(output).__name__}; expected a tensor or a tuple whose first element is one"
        )
    return first


# ---- passing batches through a model -----------------------------------------------------------------------------


class StopForward(BaseException):
    """Ends a forward pass from within a hook: the rest is not wanted. Not an Exception, which models may catch."""


class Passes:
    """A context in which batches can be passed through models again and again, and no trace is left of it.

    Inside, all modules of ``models`` are in eval mode, their KasminaLayers collect no telemetry,
    there are no gradients, compiled modules run eagerly (so that hooks are called), and every
    forward starts from the same random numbers. ``batches`` are walked through once and kept.
    """

    batches: list[Any]

    def __init__(self, models: Iterable[nn.Module], batches: Iterable[Any], forward: Forward | None) -> None:
        self._models, self._given, self._forward = list(models), batches, forward

    def __enter__(self) -> Passes:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            tensors = (tensor for model in self._models for tensor in (*model.parameters(), *model.buffers()))
            self._cuda = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
            stack.enter_context(torch.random.fork_rng(self._cuda))
            self.batches = list(self._given)  # shuffling takes random numbers, too
            if not self.batches:
                raise ValueError("there are no batches: the iterable is empty, or a generator that has been used up")
            self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(index) for index in self._cuda]
            for module in {id(module): module for model in self._models for module in model.modules()}.values():
                self._switch_off(module, "training", stack)
                if isinstance(module, KasminaLayer):
                    self._switch_off(module, "telemetry_enabled", stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self.batches = []

    @staticmethod
    def _switch_off(module: nn.Module, switch: str, stack: contextlib.ExitStack) -> None:
        if getattr(module, switch):
            stack.callback(setattr, module, switch, True)
            setattr(module, switch, False)

    def run(self, model: nn.Module, batch: Any) -> None:
        """One forward of a copy of the batch, since a model may work in place; TypeError where there is no telling how it is
        to be passed.
        """
        cpu, cuda = self._random
        torch.set_rng_state(cpu)
        for index, state in zip(self._cuda, cuda, strict=True):
            torch.cuda.set_rng_state(state, index)
        with contextlib.suppress(StopForward):
            if self._forward is not None:
                self._forward(model, copied(batch))
                return
            if not isinstance(batch, (Tensor, Mapping, tuple, list)):
                raise TypeError(
                    f"a batch must be a tensor, a tuple or a dict, got {type(batch).__name__}; pass forward=, a function "
                    "of the model and a batch"
                )
            args = () if isinstance(batch, Mapping) else copied((batch,) if isinstance(batch, Tensor) else tuple(batch))
            kwargs = copied(dict(batch)) if isinstance(batch, Mapping) else {}
            try:
                model(*args, **kwargs)
            except TypeError as error:
                if _takes(model, args, kwargs):
                    raise
                raise TypeError(
                    f"a batch does not fit {type(model).__name__}'s forward ({error}): pass forward=, a function of the "
                    "model and a batch, as lambda model, batch: model(batch[0]) where batches have labels"
                ) from error


def copied(batch: Any) -> Any:
    """With copies of all tensors in it, also in lists and dicts: leaves to autograd, and none of inference mode."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad), batch)


def _takes(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the model's forward has a place for all of these."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Callable[[str, tuple, dict, Any], None]) -> Iterator[None]:
    """``hook(name, args, kwargs, output)`` after each call of the modules, while the context lasts."""
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():

            def call(_, args, kwargs, output, name=name):
                hook(name, args, kwargs, output)

            stack.callback(module.register_forward_hook(call, with_kwargs=True).remove)
        yield


# ---- what the undamaged modules put out --------------------------------------------------------------------------


class Targets(Protocol):
    """What modules should put out. In each pass over the batches: ``begin``, for each batch ``start``, a ``take`` for each
    call of a wanted module and ``finish_batch``, and in the end ``finish``. ValueError where calls do not fit.
    """

    passes: int
    """Forward passes over all batches that it took so far."""

    def begin(self, wanted: Sequence[str], later: Sequence[str]) -> None:
        """A pass that will ask for ``wanted``; passes after it will ask for ``later``."""

    def start(self, number: int) -> None: ...

    def take(self, name: str, like: Tensor) -> Tensor:
        """What the module put out at its next call; ``like`` is what it puts out now."""

    def finish_batch(self) -> None: ...

    def finish(self) -> None: ...


class RecordedTargets:
    """Activations that somebody recorded, taken in the order of calls."""

    passes = 0

    def __init__(self, recorded: Recorded, names: Iterable[str]) -> None:
        given = {original_name(name): values for name, values in recorded.items()}
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"reference has no activations of {_listed(missing)}; it has {_listed(list(given))}")
        self._given = {name: given[name] for name in names}
        for name, values in self._given.items():
            for each in [values] if isinstance(values, Tensor) else values:
                if not isinstance(each, Tensor):
                    raise TypeError(f"activations of {name!r} must be tensors, got {type(each).__name__}")

    def begin(self, wanted: Sequence[str], later: Sequence[str]) -> None:
        self._at = dict.fromkeys(wanted, 0)

    def start(self, number: int) -> None:
        pass

    def take(self, name: str, like: Tensor) -> Tensor:
        values, at = self._given[name], self._at[name]
        whole = isinstance(values, Tensor)
        step = like.size(0) if whole and like.dim() else 1
        self._at[name] += step
        if self._at[name] > len(values):
            self._complain(name, "more")
        return values[at : at + step] if whole else values[at]

    def finish_batch(self) -> None:
        pass

    def finish(self) -> None:
        for name, at in self._at.items():
            if at < len(self._given[name]):
                self._complain(name, f"only {at}")

    def _complain(self, name: str, has: str) -> None:
        values = self._given[name]
        what = "rows" if isinstance(values, Tensor) else "calls"
        raise ValueError(f"{name!r}: the reference has {len(values)} {what}, the model's batches have {has}")


class ModelTargets:
    """Activations of the undamaged model, kept for as many modules as fit into ``memory`` bytes, else computed again."""

    def __init__(self, model: nn.Module, names: Sequence[str], passes: Passes, memory: int) -> None:
        self.passes = 0
        self._model, self._through, self._memory = model, passes, memory
        known = modules_by_name(model)
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(
                f"the reference has no module {_listed(missing)}; it has {_listed([name for name in known if name])}"
            )
        self.modules = {name: known[name] for name in names}
        self._ranks: dict[str, int] = {}  # by their first calls
        self._kept: dict[str, list[list[Tensor]]] = {}  # by name, batch and call
        self._bytes: Counter[str] = Counter()

    def begin(self, wanted: Sequence[str], later: Sequence[str]) -> None:
        self._wanted = wanted
        self._runs = not all(name in self._kept for name in wanted)
        if self._runs:
            self.passes += 1
            self._kept = {name: [] for name in later}
            self._bytes.clear()

    def start(self, number: int) -> None:
        self._taken: Counter[str] = Counter()
        if not self._runs:
            self._now = {name: self._kept[name][number] for name in self._wanted}
            return
        self._now = self._record(self._through.batches[number])
        for name in list(self._kept):
            self._kept[name].append(self._now[name])
            self._bytes[name] += sum(tensor.nbytes for tensor in self._now[name])
        while self._bytes.total() > self._memory:
            # What will be asked for last.
            last = max((name for name in self._kept if self._bytes[name]), key=self._ranks.__getitem__)
            del self._kept[last], self._bytes[last]

    def _record(self, batch: Any) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = defaultdict(list)

        def hook(name: str, args: tuple, kwargs: dict, output: Any) -> None:
            self._ranks.setdefault(name, len(self._ranks))
            # A copy: the next module may work in place.
            found[name].append(tensor_of(output, name).detach().clone())

        asked_for = {name: self.modules[name] for name in (*self._wanted, *self._kept)}
        with hooked(asked_for, hook):
            self._through.run(self._model, batch)
        return found

    def take(self, name: str, like: Tensor) -> Tensor:
        self._taken[name] += 1
        if self._taken[name] > len(self._now[name]):
            self._complain(name, "more often")
        return self._now[name][self._taken[name] - 1]

    def finish_batch(self) -> None:
        for name in self._wanted:
            if self._taken[name] < len(self._now[name]):
                self._complain(name, f"{self._taken[name]} times")
        self._now = {}

    def finish(self) -> None:
        pass

    def _complain(self, name: str, ran: str) -> None:
        raise ValueError(f"{name!r} ran {len(self._now[name])} times in the reference for a batch, {ran} in the model")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:8]))
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


# ---- recording for later -----------------------------------------------------------------------------------------


def record_activations(
    model: nn.Module, names: str | Iterable[str], batches: Iterable[Any], *, forward: Forward | None = None
) -> dict[str, list[Tensor]]:
    """What modules of ``model`` put out, call by call, on the CPU: the ``reference`` of :func:`calibrate_` where the
    undamaged network will be gone by then.

    ``names`` are module names or patterns as of :mod:`fnmatch` (``"*.mlp.*"``). ``batches`` and
    ``forward`` as in :func:`calibrate_`, which must be given the same batches; modes, telemetry and
    random numbers are left as they were. The dict can be saved with ``torch.save``. Modules that return no
    tensor are left out; ValueError for a name that no module has, TypeError for one of such a module.
    """
    model = unwrapped(model)
    known = modules_by_name(model)
    chosen: dict[str, nn.Module] = {}
    names = [names] if isinstance(names, str) else list(names)
    for pattern in names:
        found = [name for name in known if matches(name, pattern)]
        if not found:
            raise ValueError(f"no module is called {pattern!r}; there are {_listed([name for name in known if name])}")
        chosen |= {name: known[name] for name in found}
    recorded: dict[str, list[Tensor]] = {name: [] for name in chosen}

    def hook(name: str, args: tuple, kwargs: dict, output: Any) -> None:
        try:
            first = tensor_of(output, name)
        except TypeError:
            if name in names:
                raise
            recorded.pop(name, None)
            return
        if name in recorded:
            recorded[name].append(first.detach().to("cpu", copy=True))

    with Passes([model], batches, forward) as passes, hooked(chosen, hook):
        for batch in passes.batches:
            passes.run(model, batch)
    return recorded


# ---- a bar for people --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar(what: str, wanted: bool | None) -> Iterator[Callable[[int, int | None], None]]:
    """A function of (done, total or None) that moves a bar on stderr: with rich, on a terminal; else it does nothing.
    ImportError where one is ``wanted`` and there is no rich.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        if wanted:
            raise missing_extra("a progress bar", "rich", "demo") from error
        wanted = False
    console = None if wanted is False else Console(file=sys.stderr, force_terminal=wanted)
    if console is None or not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
