"""Every kind of module that takes a and b: against float64, within one rounding of each weight, in every dtype."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from folding import ROUNDOFF, Scale, along, as_double, bits, effect, grow, same
from torch import nn
from torch.nn import functional as F

from kasmina_ext.fold import fold_, fold_report, unfold_
from kasmina_ext.folding.targets import rounded
from kasmina_ext.layer import KasminaLayer

MULTIPLIES = (0,)


class Mlp(nn.Module):
    """As in transformers: the last module of the forward is neither the last that was made, nor the last child."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(9, 12)
        self.up = nn.Linear(6, 9)
        self.drop = nn.Dropout(0.1)

    def forward(self, x, residual=None):
        return self.drop(self.down(F.gelu(self.up(x))))


class Attention(nn.Module):
    """Returns a tuple, and knows an optional argument that changes nothing about who makes its first element."""

    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(6, 12), nn.Linear(12, 12, bias=False)

    def forward(self, x, mask=None):
        scores = self.q(x)
        if mask is not None:
            scores = scores + mask
        return self.out(scores.softmax(-1)), scores


class Upper(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x.abs()) * 2


class PixelNorm(nn.LayerNorm):
    """Features in dimension 1, as in torchvision and ConvNeXt."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class LayerNorm1P(nn.LayerNorm):
    """Nemotron's: 1 + weight."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Frozen(nn.Module):
    """BatchNorm with everything in buffers, as detection models have it."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("weight", torch.rand(features) + 0.5)
        self.register_buffer("bias", torch.randn(features))
        self.register_buffer("running_mean", torch.randn(features))
        self.register_buffer("running_var", torch.rand(features) + 0.5)

    def forward(self, x):
        scale = self.weight * torch.rsqrt(self.running_var + 1e-5)
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def moved(norm):
    """With weights that are not 1 and 0, and statistics that are not those of a new one."""
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5 if "bias" not in name else torch.randn_like(tensor)
    return norm


# name: (base layer, arguments of the layer, shapes of an input, strategies)
KINDS = {
    "linear": (lambda: nn.Linear(7, 12), {}, [(5, 7)], None),
    "linear_no_bias": (lambda: nn.Linear(7, 12, bias=False), {}, [(2, 5, 7)], None),
    "linear_one_feature": (lambda: nn.Linear(7, 1), {"num_seeds": 1}, [(5, 7)], (3,)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 12), {}, [(5, 3), (5, 4)], None),
    "conv1d": (lambda: nn.Conv1d(3, 12, 3), {}, [(2, 3, 8)], None),
    "conv1d_unbatched": (lambda: nn.Conv1d(3, 12, 3), {}, [(3, 8)], None),
    "conv2d": (lambda: nn.Conv2d(3, 12, (3, 2), padding="same", padding_mode="circular"), {}, [(2, 3, 6, 6)], None),
    "conv2d_no_bias": (lambda: nn.Conv2d(3, 12, 3, bias=False, stride=2), {}, [(2, 3, 7, 7)], None),
    "conv2d_grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3), {}, [(2, 6, 5, 5)], None),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, bias=False), {}, [(2, 6, 5, 5)], None),
    "conv2d_channels_last": (
        lambda: nn.Conv2d(3, 12, 3).to(memory_format=torch.channels_last),
        {"feature_dim": -3},
        [(2, 3, 5, 5)],
        None,
    ),
    "conv3d": (lambda: nn.Conv3d(2, 12, 2), {}, [(2, 2, 4, 4, 4)], None),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 12, 3), {}, [(2, 4, 6)], None),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 12, 3, stride=2, bias=False), {}, [(2, 4, 5, 5)], None),
    "conv_transpose2d_grouped": (lambda: nn.ConvTranspose2d(6, 12, 3, groups=3), {}, [(2, 6, 5, 5)], None),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 12, 2, groups=2), {}, [(1, 4, 3, 3, 3)], None),
    "batch_norm1d": (lambda: moved(nn.BatchNorm1d(12)), {}, [(6, 12)], None),
    "batch_norm1d_long": (lambda: moved(nn.BatchNorm1d(12)), {}, [(6, 12, 5)], None),
    "batch_norm2d": (lambda: moved(nn.BatchNorm2d(12)), {}, [(4, 12, 3, 3)], None),
    "batch_norm2d_not_affine": (lambda: moved(nn.BatchNorm2d(12, affine=False)), {}, [(4, 12, 3, 3)], None),
    "batch_norm3d": (lambda: moved(nn.BatchNorm3d(12)), {}, [(4, 12, 2, 2, 2)], None),
    "sync_batch_norm": (lambda: moved(nn.SyncBatchNorm(12)), {}, [(4, 12, 3, 3)], None),
    "instance_norm": (lambda: moved(nn.InstanceNorm2d(12, affine=True)), {}, [(2, 12, 4, 4)], None),
    "instance_norm_not_affine": (lambda: nn.InstanceNorm1d(12), {}, [(2, 12, 5)], None),
    "instance_norm_statistics": (
        lambda: moved(nn.InstanceNorm1d(12, track_running_stats=True)),
        {},
        [(2, 12, 5)],
        None,
    ),
    "group_norm": (lambda: moved(nn.GroupNorm(3, 12)), {}, [(2, 12, 4)], None),
    "group_norm_not_affine": (lambda: nn.GroupNorm(3, 12, affine=False), {}, [(2, 12, 4)], None),
    "layer_norm": (lambda: moved(nn.LayerNorm(12)), {}, [(3, 4, 12)], None),
    "layer_norm_no_bias": (lambda: moved(nn.LayerNorm(12, bias=False)), {}, [(3, 4, 12)], None),
    "layer_norm_two_dims": (lambda: moved(nn.LayerNorm((5, 12))), {}, [(3, 5, 12)], None),
    "layer_norm_two_dims_no_bias": (lambda: moved(nn.LayerNorm((5, 12), bias=False)), {}, [(3, 5, 12)], None),
    "layer_norm_not_affine": (lambda: nn.LayerNorm((5, 12), elementwise_affine=False), {}, [(3, 5, 12)], None),
    "rms_norm": (lambda: moved(nn.RMSNorm(12)), {}, [(3, 4, 12)], MULTIPLIES),
    "rms_norm_not_affine": (lambda: nn.RMSNorm(12, elementwise_affine=False), {}, [(3, 12)], MULTIPLIES),
    "embedding": (lambda: nn.Embedding(30, 12, padding_idx=2), {}, [None], None),
    "own_rms_norm": (lambda: Scale(12), {"hidden_dim": 12}, [(3, 4, 12)], MULTIPLIES),
    "own_norm_with_bias": (lambda: Scale(12, bias=True), {"hidden_dim": 12}, [(3, 4, 12)], None),
    "own_one_plus_weight": (lambda: Scale(12, offset=1.0), {"hidden_dim": 12}, [(3, 4, 12)], MULTIPLIES),
    "own_one_plus_weight_bias": (lambda: Scale(12, 1.0, True), {"hidden_dim": 12}, [(3, 4, 12)], None),
    "own_linear": (lambda: Upper(7, 12, bias=False), {}, [(5, 7)], MULTIPLIES),
    "own_layer_norm": (lambda: moved(PixelNorm(12)), {"feature_dim": 1}, [(2, 12, 4, 4)], None),
    "own_layer_norm_1p": (lambda: moved(LayerNorm1P(12)), {}, [(2, 12)], None),
    "own_frozen_norm": (lambda: Frozen(12), {"hidden_dim": 12, "feature_dim": 1}, [(2, 12, 4, 4)], None),
    "sequential": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 12, 1)),
        {},
        [(2, 3, 5, 5)],
        None,
    ),
    "sequential_that_ends_in_nothing": (
        lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(7, 12), nn.Identity()), nn.Dropout(0.5)),
        {},
        [(5, 7)],
        None,
    ),
    "mlp": (Mlp, {"hidden_dim": 12}, [(5, 6)], None),
    "attention_with_a_tuple": (Attention, {"hidden_dim": 12}, [(5, 6)], None),
    "multihead_attention": (lambda: nn.MultiheadAttention(12, 3, batch_first=True), {}, [(2, 5, 12)] * 3, None),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), {}, [(2, 5, 12)], None),
    "decoder_layer": (lambda: nn.TransformerDecoderLayer(12, 3, 16, batch_first=True), {}, [(2, 5, 12)] * 2, None),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def made(kind, dtype=torch.float32, device="cpu"):
    """A grown layer of the kind, in eval mode, and inputs for it, float64."""
    base, arguments, shapes, strategies = KINDS[kind]
    torch.manual_seed(1)
    arguments = arguments if "num_seeds" in arguments else {"chunk_size": 2, **arguments}
    layer = KasminaLayer(base().to(dtype), num_blueprints=4, **arguments)
    grow(layer, 3, strategies or (0, 1, 2, 3))
    # A norm without weights takes the dtype of the model's others.
    model = nn.ModuleDict({"layer": layer, "other": nn.Linear(2, 2).to(dtype)}).eval().to(device)
    inputs = [
        torch.randint(30, (4, 9)) if shape is None else torch.randn(shape, dtype=torch.float64) for shape in shapes
    ]
    return model, inputs


def first(out):
    return out[0] if isinstance(out, tuple) else out


def slack(folded, plain, inputs, dtype):
    """What rounding each folded weight once may do to each output, by definition: the output is linear in them, so
    the sum over them of half a step each times the output's slope, taken one weight at a time.

    ``folded`` and ``plain`` are float64 copies. What float64 itself rounds comes on top.
    """
    before = dict(tensors_of(plain))
    y = first(folded(*inputs))
    total, size = torch.zeros_like(y), y.abs()
    for name, tensor in tensors_of(folded):
        if name in before and torch.equal(before[name], tensor):
            continue
        flat = tensor.data.view(-1)
        for i, value in enumerate(flat.tolist()):
            flat[i] = value + 1
            slope = (first(folded(*inputs)) - y).abs()
            flat[i] = value
            total += slope * max(abs(value), torch.finfo(dtype).smallest_normal) * ROUNDOFF[dtype]
            size += slope * abs(value)
    return total * (1 + 2 * ROUNDOFF[dtype]) * (2 if dtype == torch.float64 else 1) + 1e-12 * size


def tensors_of(module):
    return [*module.named_parameters(), *module.named_buffers()]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_is_unfolded_within_one_rounding_of_each_weight(kind, dtype, device):
    model, inputs = made(kind, dtype, device)
    before = bits(model)
    plain = as_double(model["layer"].base_layer)
    a, b = effect(model["layer"], dtype)
    layer, base = model["layer"], model["layer"].base_layer
    assert fold_(model) is model and model["layer"] is base
    assert not any("base_layer" in name or "blueprint" in name for name in model.state_dict())

    folded = as_double(model["layer"])
    y = first(plain(*inputs))
    dim = layer.feature_dim - (1 if kind.endswith("unbatched") else 0)
    truth = along(a, dim, y.dim()) * y + along(b, dim, y.dim())
    error = (first(folded(*inputs)) - truth).abs()
    allowed = slack(folded, plain, inputs, dtype)
    assert (error <= allowed).all(), (error / allowed).max()
    assert (a != 1).any() and error.max() < truth.abs().max() / 20
    # The report's bound is for inputs of at most 1, which a norm's normalized ones may well exceed.
    row = fold_report(model)["layer"]
    assert row["folded"] and row["changed"] == int(((a != 1) | (b != 0)).sum())
    assert row["scale"] == (a - 1).abs().max().item() and row["shift"] == b.abs().max().item()

    flags = {name: getattr(base, name, None) for name in ("affine", "elementwise_affine")}
    assert not any(flag is False for flag in flags.values())
    assert unfold_(model) is model and model["layer"] is layer
    assert same(bits(model), before)
    assert any(getattr(base, name, None) is False for name in flags) == kind.endswith(("not_affine", "norm_statistics"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_runs_as_unfolded_did_in_its_own_dtype(kind, dtype, device):
    model, inputs = made(kind, dtype, device)
    inputs = [x.to(device) if x.dtype == torch.int64 else x.to(device, dtype) for x in inputs]
    unfolded = first(model["layer"](*inputs)).double()
    fold_(model)
    folded = first(model["layer"](*inputs)).double()
    assert first(model["layer"](*inputs)).dtype == dtype
    # Each rounds activations of up to about 20 some ten times on its way.
    assert (folded - unfolded).abs().max() <= 20 * ROUNDOFF[dtype] * unfolded.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    "kind", ["batch_norm2d", "sync_batch_norm", "batch_norm2d_not_affine", "instance_norm_statistics"]
)
def test_batch_norms_fold_in_training_too_and_keep_their_statistics(kind):
    model, (x,) = made(kind)
    if kind == "sync_batch_norm":  # in training it wants a GPU and other processes
        model["layer"].base_layer.momentum = 0.0
    else:
        model.train()
    x = x.float()
    twin = copy.deepcopy(model)
    statistics = [b.clone() for n, b in model["layer"].base_layer.named_buffers()]
    fold_(model)
    assert all(map(torch.equal, statistics, model["layer"].buffers()))
    torch.testing.assert_close(model["layer"](x), twin["layer"](x), rtol=1e-5, atol=1e-5)
    # The same statistics, since they are of the input.
    for name, buffer in model["layer"].named_buffers():
        assert torch.equal(buffer, twin["layer"].base_layer.get_buffer(name)), name


def test_every_kind_trains_a_step_and_then_folds():
    for kind in KINDS:
        model, inputs = made(kind)
        inputs = [x if x.dtype == torch.int64 else x.float() for x in inputs]
        layer = model["layer"]
        layer.base_layer.requires_grad_(False)
        optimizer = torch.optim.AdamW([layer.blueprint_weights], lr=1e-2, weight_decay=0.0)
        first(layer(*inputs)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            y = first(layer(*inputs))
            fold_(model)
            torch.testing.assert_close(first(model["layer"](*inputs)), y, rtol=1e-4, atol=1e-5, msg=kind)


# ---- what is rounded, and how ----------------------------------------------------------------------------------------


def nearest(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The number of ``dtype`` nearest to ``value``; of two, the even one. By the definition of the format."""
    if value == 0:
        return value
    info = torch.finfo(dtype)
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    while Fraction(2) ** exponent > abs(value):
        exponent -= 1
    smallest = Fraction(info.smallest_normal)
    step = max(Fraction(2) ** exponent, smallest) * Fraction(info.eps)
    return round(value / step) * step  # Python rounds halves to even


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_weights_are_the_nearest_numbers_of_their_dtype(dtype):
    torch.manual_seed(2)
    base = nn.Linear(20, 12).to(dtype)
    with torch.no_grad():
        base.weight[:, :4] *= torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 1
    layer = KasminaLayer(base, chunk_size=2, num_blueprints=4)
    grow(layer, 3)
    weight, bias = base.weight.detach().double().clone(), base.bias.detach().double().clone()
    a, b = effect(layer)
    fold_(layer)
    for o in range(12):
        exact_a, exact_b = Fraction(a[o].item()), Fraction(b[o].item())
        for i in range(20):
            expected = nearest(exact_a * Fraction(weight[o, i].item()), dtype)
            assert Fraction(base.weight[o, i].item()) == expected
        exact = exact_a * Fraction(bias[o].item()) + exact_b
        if dtype == torch.float64:  # product and sum are rounded
            exact = nearest(exact_a * Fraction(bias[o].item()), dtype) + exact_b
        assert Fraction(base.bias[o].item()) == nearest(exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype):
    """By way of float32, what is a little above a tie becomes the tie, and then goes to the even side."""
    half = torch.finfo(dtype).eps / 2
    base = nn.Linear(1, 2).to(dtype)
    with torch.no_grad():
        base.bias.copy_(torch.tensor([1.0, -1.0]))
    layer = KasminaLayer(base, num_seeds=1, num_blueprints=1, strategy="additive")
    layer.extended_state.update_state(None, {"lifecycle": 3, "blueprint": 0})
    with torch.no_grad():
        layer.blueprint_weights.copy_(torch.tensor([[half + 2.0**-30, -half - 2.0**-30]]))
    fold_(layer)
    assert base.bias.tolist() == [1 + 2 * half, -1 - 2 * half]


def test_rounding_in_one_step_of_everything_special():
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e300, -1e300, 1e-300, 65504.0, 65520.0, 65519.9]
    )
    special = torch.cat(
        (special.double(), torch.tensor([1e-46, 2.0**-25, 2.0**-25 + 2.0**-60, 3.38e38], dtype=torch.float64))
    )
    for dtype in (torch.bfloat16, torch.float16):
        got = rounded(special, dtype)
        assert torch.equal(got.isnan(), special.isnan())
        signs = [t[~special.isnan()].signbit() for t in (got, special)]
        assert torch.equal(*signs)
        for value, result in zip(special.tolist(), got.tolist(), strict=True):
            if abs(value) < 60000:
                assert Fraction(result) == nearest(Fraction(value), dtype), (value, result)
    assert rounded(special, torch.float16)[-6:].tolist()[:2] == [torch.inf, 65504.0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "kind", ["linear", "linear_no_bias", "conv2d_grouped", "conv_transpose2d_grouped", "embedding"]
)
def test_the_reported_bound_is_one_and_not_a_loose_one(kind, dtype):
    model, inputs = made(kind, dtype)
    inputs = [x if x.dtype == torch.int64 else x.clamp(-1, 1).sign() for x in inputs]
    layer, plain = model["layer"], as_double(model["layer"].base_layer)
    a, b = effect(layer)
    fold_(model)
    y = plain(*inputs)
    truth = along(a, layer.feature_dim, y.dim()) * y + along(b, layer.feature_dim, y.dim())
    error = (as_double(model["layer"])(*inputs) - truth).abs().max().item()
    bound = fold_report(model)["layer"]["bound"]
    assert error <= bound + 1e-15 * truth.abs().max().item()
    if dtype != torch.float64:  # in which the truth is rounded as well
        assert bound <= 100 * error


def test_features_without_a_grafted_seed_keep_their_bits():
    torch.manual_seed(4)
    base = nn.Linear(6, 11)
    with torch.no_grad():
        base.weight[:, 0] = -0.0
        base.weight[4, 1] = torch.nan
        base.bias[2] = -0.0
    layer = KasminaLayer(base, num_seeds=3, chunking="uniform", num_blueprints=2)
    layer.extended_state.update_state(1, {"lifecycle": 3, "blueprint": 0})
    with torch.no_grad():
        layer.blueprint_weights.copy_(torch.randn(2, 11))
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    fold_(layer)
    others = [0, 1, 2, 6, 7, 8, 9, 10]
    for now, was in ((base.weight, weight), (base.bias, bias)):
        assert torch.equal(now[others].view(torch.int32), was[others].view(torch.int32))
    assert not torch.equal(base.weight[3], weight[3]) and not torch.equal(base.weight[5], weight[5])


def test_a_bias_is_gained_only_where_something_is_added(device):
    for strategy, gains in ((0, False), (1, True), (2, True), (3, True)):
        layer = KasminaLayer(
            nn.Linear(3, 8, bias=False, device=device).requires_grad_(False), num_seeds=4, num_blueprints=4
        )
        grow(layer, 0, (strategy,))
        plain = fold_(layer)
        assert (plain.bias is not None) == gains
        assert fold_report(plain)[""]["added"] == ("bias" if gains else "")
        if gains:
            assert not plain.bias.requires_grad and plain.bias.device == plain.weight.device
        assert unfold_(plain).base_layer.bias is None and "bias" not in plain.state_dict()


def test_a_large_weight_is_folded_in_pieces():
    base = nn.Embedding(3000, 700)
    layer = KasminaLayer(base, chunk_size=50, num_blueprints=4)
    grow(layer)
    before = base.weight.detach().double().clone()
    a, b = effect(layer)
    fold_(layer)
    assert torch.equal(base.weight.detach(), (a * before + b).float())
    layer = unfold_(base)
    assert torch.equal(base.weight.detach().double(), before)
