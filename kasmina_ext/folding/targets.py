"""Where ``y = a x + b`` goes in a module: which of its tensors take a and b, along which dimension, rounded how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCK_ELEMENTS = 2**17
"""Computed at a time: what is held in float64 stays small, and in the cache."""


class NotFoldable(Exception):
    """Why not, in words that follow the module's name."""


@dataclass(frozen=True)
class Form:
    """How the output of a kind of module depends on its weight and bias, which are linear in it."""

    kind: str
    features: int
    shape: tuple[int, ...]
    """Of ``[H]`` values laid out so that they broadcast against the weight."""
    feature_dims: tuple[int, ...] = (-1,)
    """Dimensions of the output that a layer may take for the features."""
    shift: str | None = "bias"
    """The tensor that b goes to; None: there is nowhere to add it."""
    adds: bool = True
    """Whether what is added to that tensor is added to the output as it is."""
    offset: float = 0.0
    """The module multiplies by ``offset + weight``."""
    groups: int = 0
    """Of a transposed convolution, whose weight is ``(in, out / groups, ...)``."""
    sums: bool = True
    """Whether an output feature is a sum over its weights, rather than made with one of them."""

    @property
    def is_norm(self) -> bool:
        """Weight and bias have one shape: one of each for an output."""
        return not self.sums and self.shift != "weight"

    def spread(self, values: Tensor) -> Tensor:
        """``values [H]`` so that they broadcast against the weight, of the same rank."""
        if self.groups:
            rows = self.shape[0] // self.groups
            values = values.view(self.groups, 1, -1).expand(-1, rows, -1).reshape(self.shape)
        return values.reshape(self.shape)

    def fits(self, weight: Tensor) -> bool:
        """Whether the weight has the shape that one of this form has."""
        return weight.dim() == len(self.shape) and all(
            size == own or own == 1 for size, own in zip(weight.shape, self.shape, strict=True)
        )

    def gather(self, sums: Tensor) -> Tensor:
        """The reverse for sums (maxima) over what the weight is wider: ``[H]``."""
        if self.groups:
            return sums.view(self.groups, self.shape[0] // self.groups, -1).sum(1).flatten()
        return sums.flatten()


class Change(NamedTuple):
    """What becomes of a module's tensor: ``scale * old + shift``, rounded once; ``shift`` where there was none."""

    name: str
    scale: Tensor
    """float64, broadcasts against the tensor; so does ``shift``."""
    shift: Tensor
    created: nn.Parameter | None = None

    def on(self, device: torch.device) -> Change:
        """With what it is computed from on ``device``."""
        return self._replace(scale=self.scale.to(device), shift=self.shift.to(device))

    def new_values(self, like: Tensor) -> Tensor:
        """Of a tensor that was created: of the dtype and shape of ``like``."""
        return rounded(self.shift, like.dtype).expand(like.shape)

    def exact_pieces(self, old: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Of the first dimension: where, and the new values before they are rounded, float64."""
        rows = max(1, BLOCK_ELEMENTS // max(1, old[:1].numel()))
        adds = bool((self.shift != 0).any())
        for start in range(0, old.size(0), rows):
            where = slice(start, start + rows)
            scale, shift = (t if t.size(0) == 1 else t[where] for t in (self.scale, self.shift))
            wide = old[where].detach().to(torch.float64, copy=True).mul_(scale)
            yield where, wide.add_(shift) if adds else wide

    def pieces(self, old: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same, rounded to the dtype of ``old``."""
        return ((where, rounded(wide, old.dtype)) for where, wide in self.exact_pieces(old))


def rounded(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to ``dtype``, to nearest even, in one rounding.

    torch rounds to float32 on the way to 16 bits. Where that first rounding goes to odd instead, the
    second one is right: Boldo and Melquiond, When double rounding is odd, 2005. (Below 2^-126, where
    float32 has fewer digits itself, some of bfloat16's subnormals are still rounded twice.)
    """
    if dtype in (torch.float32, torch.float64):
        return wide.to(dtype)
    bits = wide.view(torch.int64)
    lost = (1 << 29) - 1  # 52 digits after the point in float64, 23 in float32
    odd = (bits & ~lost) | ((bits & lost) != 0).to(torch.int64).mul_(lost + 1)
    return odd.view(torch.float64).float().to(dtype)


# ---- the tensors of a module -----------------------------------------------------------------------------------------


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of the module itself; None where it has none of this name that can be written."""
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def writable(module: nn.Module, name: str) -> Tensor:
    """The module's own tensor; NotFoldable where new values cannot simply be written into it."""
    tensor = own_tensor(module, name)
    if tensor is None:
        if parametrize.is_parametrized(module, name):
            raise NotFoldable(f"its {name} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations")
        if f"{name}_orig" in module._parameters:
            raise NotFoldable(f"its {name} is computed before each forward (pruning, spectral norm); make it permanent")
        raise NotFoldable(f"its {name} is computed, not a parameter of its own")
    if isinstance(tensor, UninitializedParameter):
        raise NotFoldable(f"its {name} is not initialized: run the lazy module once")
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = type(tensor).__name__
        reason = "is sharded, a DTensor" if kind == "DTensor" else f"is a {kind}: quantised, or no plain tensor"
        raise NotFoldable(f"its {name} {reason}")
    if tensor.is_meta:
        raise NotFoldable(f"its {name} is on the meta device: it has no values")
    if tensor.layout != torch.strided:
        raise NotFoldable(f"its {name} is sparse ({tensor.layout})")
    if tensor.dtype not in FLOATS:
        raise NotFoldable(f"its {name} is {str(tensor.dtype).removeprefix('torch.')}: quantised, or not floating")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise NotFoldable(f"elements of its {name} share memory (an expanded tensor)")
    return tensor


def changes_of(
    module: nn.Module, form: Form, a: Tensor, b: Tensor, dtype: torch.dtype | None
) -> tuple[list[Change], Tensor]:
    """What folding ``a`` and ``b`` (float64 ``[H]``) does to the module, and how far it rounds: float64 ``[H]``.

    For inputs of at most 1 in size (of a norm: once normalized) the output feature moves by no more than
    that beside ``a y + b``. ``dtype`` is for the weights of a norm that has none, and no statistics either;
    None: not known. A feature with a = 1 and b = 0 keeps its bits. NotFoldable where it cannot be;
    nothing is written.
    """
    adds = bool((b != 0).any())
    if adds and form.shift is None:
        count = int((b != 0).sum())
        raise NotFoldable(f"it has no bias, and {count} of its {form.features} features are added to")
    if adds and not form.adds:
        raise NotFoldable("a b added to its weights would not be added to its output, since its forward is its own")
    affine = _affine_flag(module)
    if affine and own_tensor(module, "weight") is None and not getattr(module, affine):
        return _made_affine(module, form, a, b, dtype)
    changes = []
    bound = torch.zeros_like(a)
    weight_shift = b if form.shift == "weight" else (a - 1) * form.offset
    if bool((a != 1).any()) or (adds and form.shift == "weight"):
        weight = writable(module, "weight")
        if not form.fits(weight):
            raise NotFoldable(
                f"its weight has shape {list(weight.shape)}, which is not a {form.kind}'s: packed or sharded"
            )
        change = Change("weight", form.spread(a), form.spread(_no_zero(weight_shift))).on(weight.device)
        changes.append(change)
        bound = bound + form.gather(_bound(change, weight, form.sums)).to(bound.device)
    if form.shift == "bias" and (adds or bool((a != 1).any())):
        if getattr(module, "bias", None) is not None:
            bias = writable(module, "bias")
            scale, shift = a, _no_zero(b)
            if bias.dim() > 1:  # of a LayerNorm over several dimensions
                scale, shift = form.spread(scale), form.spread(shift)
            change = Change("bias", scale, shift).on(bias.device)
            changes.append(change)
            bound = bound + _bound(change, bias, False).flatten().to(bound.device)
        elif adds:
            weight = getattr(module, "weight", None)
            if weight is None or weight.dtype not in FLOATS:
                raise NotFoldable("its weight does not tell of what dtype a bias would be")
            like = weight if form.is_norm else weight.new_empty(form.features)
            changes.append(_created("bias", b.to(weight.device), like, weight.requires_grad))
            bound = bound + _half_ulp(b, weight.dtype)
    return changes, bound


def _bound(change: Change, old: Tensor, sums: bool) -> Tensor:
    """Sum (or maximum) of rounding errors over all that ``change.scale`` broadcasts over; NotFoldable on overflow."""
    info = torch.finfo(old.dtype)
    total, greatest = torch.zeros_like(change.scale), change.scale.new_zeros(())
    whole = total.size(0) == 1
    wider = [d for d in range(old.dim()) if total.size(d) == 1 and (d > 0 or whole)]

    # Half a step of each: eps / 2 of the number, or of the least normal one.
    for where, wide in change.exact_pieces(old):
        size = torch.where(torch.isfinite(old[where]), wide.abs_(), 0.0)
        greatest = torch.maximum(greatest, size.max())
        if old.dtype == torch.float64:  # the product before the shift is rounded, too
            scale, shift = (t if t.size(0) == 1 else t[where] for t in (change.scale, change.shift))
            product = (old[where] * scale).abs_()
            size = torch.where((shift != 0) & torch.isfinite(product), size + product, size)
        size = size.add_(info.smallest_normal)
        if wider:
            size = size.sum(wider, keepdim=True) if sums else size.amax(wider, keepdim=True)
        part = total if whole else total[where]
        part.copy_(part + size if sums else torch.maximum(part, size))
    if not bool(rounded(greatest, old.dtype).isfinite()):
        raise NotFoldable(f"its {change.name} would leave the range of {str(old.dtype).removeprefix('torch.')}")
    return total * (info.eps / 2)


def _half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return (values.abs() + info.smallest_normal) * (info.eps / 2)


def _no_zero(shift: Tensor) -> Tensor:
    """-0.0 for zeros: adding it changes no bit."""
    return torch.where(shift == 0, -0.0, shift)


def _created(name: str, values: Tensor, like: Tensor, requires_grad: bool) -> Change:
    change = Change(name, torch.zeros_like(values), values)
    new = change.new_values(like).clone()
    if not bool(torch.isfinite(new).all()):
        raise NotFoldable(f"its new {name} would leave the range of {str(new.dtype).removeprefix('torch.')}")
    return change._replace(created=nn.Parameter(new, requires_grad=requires_grad))


def _affine_flag(module: nn.Module) -> str | None:
    """The attribute that says whether a norm has weights."""
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return "affine"
    return "elementwise_affine" if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else None


def _made_affine(module, form, a, b, dtype) -> tuple[list[Change], Tensor]:
    seen = getattr(module, "running_mean", None)
    dtype = dtype if seen is None else seen.dtype
    if dtype not in FLOATS:
        raise NotFoldable("it has no weight, and nothing tells of what dtype one would be; make it affine")
    like = torch.empty(getattr(module, "normalized_shape", a.shape), dtype=dtype, device=a.device)
    made = {"weight": a} if form.shift is None else {"weight": a, "bias": torch.where(b == 0, 0.0, b)}
    bound = sum(_half_ulp(values, dtype) for values in made.values())
    return [_created(name, values, like, True) for name, values in made.items()], bound


def apply_changes(module: nn.Module, changes: list[Change]) -> None:
    """Write them. Nothing is allocated but a block at a time."""
    for change in changes:
        if change.created is not None:
            setattr(module, change.name, change.created)
            continue
        tensor = own_tensor(module, change.name)
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            for where, new in change.pieces(tensor):
                tensor[where].copy_(new)
    _set_affine(module, changes, True)


def revert_changes(module: nn.Module, changes: list[Change], originals: dict[str, Tensor]) -> None:
    """The reverse: the original bits, and no tensor where there was none."""
    for change in changes:
        if change.created is not None:
            setattr(module, change.name, None)
            continue
        tensor = own_tensor(module, change.name)
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(originals[change.name])
    _set_affine(module, changes, False)


def _set_affine(module: nn.Module, changes: list[Change], affine: bool) -> None:
    if any(change.name == "weight" and change.created is not None for change in changes):
        setattr(module, _affine_flag(module), affine)


# ---- the kinds -------------------------------------------------------------------------------------------------------

# Modules whose forward is known: the form follows from the class alone.
_KNOWN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
)
_METHODS = ("forward", "_conv_forward", "_apply_instance_norm", "__call__", "_call_impl")


def is_known(module: nn.Module) -> bool:
    """Whether its forward is one of torch's, not a subclass's or one that was put in its place."""
    for kind in _KNOWN:
        if isinstance(module, kind) and not any(name in vars(module) for name in _METHODS):
            mine = type(module)
            if all(getattr(mine, name, None) is getattr(kind, name, None) for name in _METHODS):
                return True
    return False


def form_of(module: nn.Module) -> Form | None:
    """The form that the module has if it is what it looks like; None for what looks like nothing known."""
    kind = type(module).__name__
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        ones = (1,) * (2 if isinstance(module, nn.Bilinear) else 1)
        return Form(kind, module.out_features, (module.out_features, *ones))
    if isinstance(module, _ConvNd):
        ones, features = (1,) * len(module.kernel_size), module.out_channels
        dims = (1, -len(ones) - 1)
        if isinstance(module, _ConvTransposeNd):
            shape = (module.in_channels, features // module.groups, *ones)
            return Form(kind, features, shape, dims, groups=module.groups)
        return Form(kind, features, (features, 1, *ones), dims)
    if isinstance(module, _NormBase):
        return Form(kind, module.num_features, (module.num_features,), (1,), sums=False)
    if isinstance(module, nn.GroupNorm):
        return Form(kind, module.num_channels, (module.num_channels,), (1,), sums=False)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        *outer, features = module.normalized_shape
        shift = None if isinstance(module, nn.RMSNorm) else "bias"
        return Form(kind, features, (*(1 for _ in outer), features), shift=shift, sums=False)
    if isinstance(module, nn.Embedding):
        return Form(kind, module.embedding_dim, (1, module.embedding_dim), shift="weight", sums=False)
    weight, bias = (own_tensor(module, name) for name in ("weight", "bias"))
    if weight is None or next(module.children(), None) is not None:
        return None
    shift = "bias" if bias is not None or "bias" in module._parameters else None
    if getattr(module, "nf", None) == weight.size(-1) and weight.dim() == 2:  # transformers' Conv1D
        return Form(kind, weight.size(1), (1, weight.size(1)), shift=shift)
    if weight.dim() == 1:  # a norm with weights of its own
        return Form(kind, weight.size(0), (weight.size(0),), (-1, 1), shift=shift, sums=False)
    return None
