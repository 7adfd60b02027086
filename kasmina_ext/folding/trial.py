"""Trying out what a module with a forward of its own does with its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kasmina_ext.folding.targets import Form, NotFoldable, form_of, is_known, own_tensor, writable

TOLERANCE = 1e-3
"""Of the greatest output; a form that is wrong is off by about as much as the output itself."""


def checked_form(module: nn.Module, feature_dim: int) -> Form:
    """The form of a module that puts out features in ``feature_dim``; NotFoldable where it has none, or another one.

    What torch's own forward does is known. Any other module is run, as a copy with weights of its
    own kind but random, before and after they are folded: ``weight`` and ``1 + weight`` are told apart
    so, and what is neither is refused.
    """
    form = form_of(module)
    if form is None:
        raise NotFoldable("it has no weight that its output is known to be proportional to")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise NotFoldable("its max_norm changes the weights in each forward")
    known = is_known(module)
    if feature_dim not in form.feature_dims and (known or feature_dim not in (-1, 1)):
        raise NotFoldable(
            f"the layer takes dimension {feature_dim} of its output for the features, "
            f"which lie in dimension {form.feature_dims[0]}"
        )
    if known:
        return form
    writable(module, "weight")  # a quantised one cannot be tried out
    candidates = [form] if form.shift == "weight" else [form, replace(form, offset=1.0)]
    seen: list[str] = []
    for candidate in candidates + [replace(each, adds=False) for each in candidates if form.shift]:
        if _computes(module, candidate, feature_dim, seen):
            return candidate
    reason = f" ({seen[0]})" if seen else ""
    raise NotFoldable(f"its forward is its own, and folding a and b into its weights would not do the same{reason}")


def _computes(module: nn.Module, form: Form, feature_dim: int, reasons: list[str]) -> bool:
    """Whether a copy with random weights, once ``a`` and ``b`` are folded into it, computes ``a y + b``."""
    try:
        twin = stripped_copy(module).float().requires_grad_(False)
        device = own_tensor(twin, "weight").device
        random = _Random(device)
        weight = own_tensor(twin, "weight")
        has_bias = form.shift == "bias" and (form.adds or own_tensor(twin, "bias") is not None)
        old = {"weight": random.away_from_zero(weight.shape)}
        if has_bias:
            old["bias"] = random.away_from_zero(weight.shape if form.is_norm else (form.features,))
        a = random.away_from_zero((form.features,)).double()
        b = random.away_from_zero((form.features,)).double() if form.shift and form.adds else torch.zeros_like(a)
        new = {
            "weight": old["weight"] * form.spread(a)
            + form.spread(b if form.shift == "weight" else (a - 1) * form.offset)
        }
        if has_bias:
            new["bias"] = old["bias"] * a + b
    except Exception as error:  # whatever a stranger's class does when it is copied
        reasons.append(f"a copy of it could not be tried out: {error}")
        return False
    tried = False
    for inputs in _probe_inputs(module, form, feature_dim, random):
        for training in (False, True):
            try:
                y, folded = (_run(twin, tensors, inputs, training, feature_dim) for tensors in (old, new))
            except Exception as error:
                reasons.append(f"it does not run on a trial input: {error}")
                break
            if y.size(-1) != form.features or y.shape != folded.shape:
                return False
            expected = a * y + b
            scale = expected.abs().max()
            if not bool((folded - expected).abs().max() <= TOLERANCE * scale) or not bool(scale > 0):
                return False
            tried = True
    return tried


def _run(twin: nn.Module, tensors: dict[str, Tensor], inputs: tuple[Tensor, ...], training: bool, dim: int) -> Tensor:
    for name, values in tensors.items():
        store = twin._buffers if name in twin._buffers else twin._parameters
        store[name] = values.float() if store is twin._buffers else nn.Parameter(values.float(), requires_grad=False)
    devices = [inputs[0].device] if inputs[0].is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        out = twin.train(training)(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    return out.movedim(dim, -1).double()


def stripped_copy(module: nn.Module, share_tensors: bool = False) -> nn.Module:
    """A deep copy without hooks: nobody hears of what it is used for."""
    tensors = [*module.parameters(), *module.buffers()] if share_tensors else []
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for each in twin.modules():
        for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks):
            hooks.clear()
    return twin


class _Random:
    """Numbers of its own: torch's generator is left alone."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._generator = device, torch.Generator().manual_seed(0)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, device="cpu").to(self._device)

    def away_from_zero(self, shape: tuple[int, ...]) -> Tensor:
        """Half of them negative, sizes from 1/2 to 2."""
        size = torch.rand(shape, generator=self._generator, device="cpu") * 1.5 + 0.5
        return size.to(self._device) * self.normal(shape).sign()

    def below(self, count: int) -> Tensor:
        return torch.arange(min(count, 64), device=self._device)


def _probe_inputs(module, form: Form, feature_dim: int, random: _Random) -> Iterator[tuple[Tensor, ...]]:
    """Inputs of the shapes that such a module may take; at least one has to run."""
    normal: Callable[[tuple[int, ...]], Tensor] = random.normal
    if isinstance(module, nn.Embedding):
        yield (random.below(module.num_embeddings),)
    elif isinstance(module, nn.Bilinear):
        yield normal((5, module.in1_features)), normal((5, module.in2_features))
    elif isinstance(module, _ConvNd):
        sizes = (d * (k - 1) + 3 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        yield (normal((2, module.in_channels, *sizes)),)
    elif isinstance(module, nn.Linear) or hasattr(module, "nf"):
        width = module.in_features if isinstance(module, nn.Linear) else own_tensor(module, "weight").size(0)
        yield (normal((5, width)),)
        yield (normal((2, 3, width)),)
    elif feature_dim == -1:
        width = getattr(module, "normalized_shape", (form.features,))
        yield (normal((5, *width)),)
        yield (normal((2, 3, *width)),)
    else:
        for rank in (2, 1, 0, 3):
            yield (normal((5, form.features, *(3 for _ in range(rank)))),)
