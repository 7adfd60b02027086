"""Every kind of module that can have seeds: grafted, trained a step, folded, unfolded and given back, in every dtype."""

from __future__ import annotations

import pytest
import torch
from folding import ROUNDOFF, Scale, as_double, bits, same
from torch import nn
from torch.nn import functional as F

from kasmina_ext import KasminaLayer, Seeds, fold_, graft_, param_groups, unfold_, ungraft_
from kasmina_ext.graftable import features_of


class LlamaRMSNorm(Scale):
    """As every model has its own: no more than a weight."""


class GemmaRMSNorm(Scale):
    def __init__(self, features):
        super().__init__(features, offset=1.0)


class LayerNorm2d(nn.LayerNorm):
    """Features in dimension 1: torchvision's."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNextLayerNorm(nn.LayerNorm):
    """transformers': ``data_format`` says where the features are."""

    def __init__(self, features, data_format):
        super().__init__(features)
        self.data_format = data_format

    def forward(self, x):
        if self.data_format == "channels_last":
            return super().forward(x)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class FrozenBatchNorm2d(nn.Module):
    """Of detection models: all of it in buffers."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("weight", torch.rand(features) + 0.5)
        self.register_buffer("bias", torch.randn(features))

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(14, 6)


# name: (module, shape of the input, dimension of the features, whether it only takes a scale)
KINDS = {
    "linear": (lambda: nn.Linear(6, 14), (5, 6), -1, False),
    "linear_no_bias": (lambda: nn.Linear(6, 14, bias=False), (2, 5, 6), -1, False),
    "bilinear": (lambda: Twice(nn.Bilinear(6, 6, 14)), (5, 6), -1, False),
    "conv1d_of_transformers": (conv1d_of_transformers, (2, 5, 6), -1, False),
    "conv1d": (lambda: nn.Conv1d(6, 14, 3), (2, 6, 8), 1, False),
    "conv2d": (lambda: nn.Conv2d(6, 14, 3, padding="same", padding_mode="circular"), (2, 6, 5, 5), 1, False),
    "conv2d_channels_last": (
        lambda: nn.Conv2d(6, 14, 3).to(memory_format=torch.channels_last), (2, 6, 5, 5), 1, False,
    ),
    "conv2d_unbatched": (lambda: nn.Conv2d(6, 14, 3), (6, 5, 5), 0, False),
    "conv2d_grouped": (lambda: nn.Conv2d(6, 14, 3, groups=2), (2, 6, 5, 5), 1, False),
    "conv2d_depthwise": (lambda: nn.Conv2d(14, 14, 3, groups=14, bias=False), (2, 14, 5, 5), 1, False),
    "conv3d": (lambda: nn.Conv3d(6, 14, 2), (2, 6, 3, 3, 3), 1, False),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(6, 14, 3), (2, 6, 5), 1, False),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(6, 14, 3, stride=2, bias=False), (2, 6, 4, 4), 1, False),
    "conv_transpose2d_grouped": (lambda: nn.ConvTranspose2d(6, 14, 3, groups=2), (2, 6, 4, 4), 1, False),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(6, 14, 2), (1, 6, 3, 3, 3), 1, False),
    "batch_norm1d": (lambda: nn.BatchNorm1d(14), (6, 14), 1, False),
    "batch_norm2d": (lambda: nn.BatchNorm2d(14), (4, 14, 3, 3), 1, False),
    "batch_norm3d": (lambda: nn.BatchNorm3d(14), (4, 14, 2, 2, 2), 1, False),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(14, affine=True), (2, 14, 4, 4), 1, False),
    "group_norm": (lambda: nn.GroupNorm(7, 14), (2, 14, 4), 1, False),
    "layer_norm": (lambda: nn.LayerNorm(14), (3, 4, 14), -1, False),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(14, bias=False), (3, 4, 14), -1, False),
    "layer_norm_2d": (lambda: LayerNorm2d(14), (2, 14, 4, 4), 1, False),
    "layer_norm_channels_first": (lambda: ConvNextLayerNorm(14, "channels_first"), (2, 14, 4, 4), 1, False),
    "layer_norm_channels_last": (lambda: ConvNextLayerNorm(14, "channels_last"), (2, 4, 4, 14), -1, False),
    "frozen_batch_norm": (lambda: FrozenBatchNorm2d(14), (2, 14, 4, 4), 1, False),
    "rms_norm": (lambda: nn.RMSNorm(14), (3, 4, 14), -1, True),
    "own_rms_norm": (lambda: LlamaRMSNorm(14), (3, 4, 14), -1, True),
    "own_rms_norm_one_plus": (lambda: GemmaRMSNorm(14), (3, 4, 14), -1, True),
    "embedding": (lambda: nn.Embedding(30, 14, padding_idx=2), None, -1, False),
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Twice(nn.Module):
    """Two inputs of one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x)


def made(kind, dtype, device):
    make, shape, dim, scales = KINDS[kind]
    model = nn.Sequential(make()).to(dtype).to(device).eval()
    x = torch.randint(30, (4, 9)) if shape is None else torch.randn(shape, dtype=torch.float64)
    return model, x.to(device), dim, scales


def as_input(x, dtype):
    return x if x.dtype == torch.int64 else x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", KINDS)
def test_graft_train_fold_unfold(kind, dtype, device):
    model, x, dim, scales = made(kind, dtype, device)
    x_own = as_input(x, dtype)
    pristine, y = bits(model), model(x_own).detach()
    modules = list(model.modules())
    seeds = graft_(model, "*", chunk_size=4, strategy="multiplicative" if scales else "affine", table=False)
    (layer,) = seeds
    assert layer.num_seeds == 4 and layer.hidden_dim == 14 and y.shape[dim] == 14
    assert layer.blueprint_weights.dtype == torch.float32 and layer.device.type == device.type
    assert seeds[:].graft()
    assert torch.equal(model(x_own), y) and model(x_own).stride() == y.stride()  # neutral: every bit

    # A step that halves the distance to other scales and shifts of the features.
    along = [1] * y.dim()
    along[dim] = 14
    scale, shift = (torch.linspace(low, high, 14, device=device).view(along) for low, high in ((0.5, 2), (-1, 1)))
    target = y.float() * scale + (0 if scales else shift)
    optimizer = torch.optim.Adam(param_groups(model, lr=0.3))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(F.mse_loss(model(x_own).float(), target))
        losses[-1].backward()
        optimizer.step()
    assert min(losses) < 0.5 * losses[0]
    assert all(p.grad is None for n, p in model.named_parameters() if "blueprint" not in n)
    with torch.no_grad():
        trained, before = model(x_own), bits(model)
        assert not torch.equal(trained, y)

        # Folded weights against the same seeds in float64: each weight is rounded once.
        truth = as_double(model)(as_input(x.cpu(), torch.float64))
        assert fold_(model) is model and not any(isinstance(module, KasminaLayer) for module in model.modules())
        exact = as_double(model)(as_input(x.cpu(), torch.float64))
        terms = 6 * 27 if shape_sums(kind) else 2
        assert (exact - truth).abs().max() <= terms * ROUNDOFF[dtype] * truth.abs().max().clamp(min=1)
        folded = model(x_own)
        assert folded.dtype == dtype
        torch.testing.assert_close(
            folded.double(), trained.double(), rtol=0, atol=20 * ROUNDOFF[dtype] * max(1, trained.abs().max().item())
        )
        assert unfold_(model) is model and same(bits(model), before) and torch.equal(model(x_own), trained)
    ungraft_(seeds)
    assert list(model.modules()) == modules
    assert list(bits(model)) == list(pristine)
    assert same(bits(model), pristine) and torch.equal(model(x_own), y)


def shape_sums(kind):
    return kind.startswith(("linear", "bilinear", "conv"))


@pytest.mark.parametrize("kind", ["batch_norm1d", "batch_norm2d", "instance_norm2d"])
def test_statistics_go_on_in_training(kind, device):
    """The layer changes what a norm puts out, not what it sees."""
    model, x, *_ = made(kind, torch.float32, device)
    twin, *_ = made(kind, torch.float32, device)
    x = as_input(x, torch.float32)
    seeds = graft_(model, "0", table=False)
    assert seeds[:].graft()
    model.train(), twin.train()
    for _ in range(3):
        model(x), twin(x)
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, model[0].base_layer.get_buffer(name.removeprefix("0."))), name
    ungraft_(model)
    assert same(bits(model), bits(twin))


class Quantised(nn.Module):
    """A linear module of somebody else, whose weight is no floating tensor."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 14
        self.register_buffer("packed", torch.randint(-127, 127, (14, 6), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.packed.to(x.dtype) / 127)


def test_a_quantised_linear_module(device):
    model = nn.Sequential(Quantised()).to(device)
    x = torch.randn(5, 6, device=device)
    y = model(x)
    seeds = graft_(model, "0", chunk_size=4, table=False)
    assert next(iter(seeds)).device.type == next(iter(seeds)).blueprint_weights.device.type == device.type
    assert seeds[:].graft() and torch.equal(model(x), y)
    model(x).square().sum().backward()
    assert model[0].blueprint_weights.grad.any(1).all()
    with pytest.raises(ValueError, match="0: Quantised: "):
        with torch.no_grad():
            model[0].blueprint_weights += 0.5
        fold_(model)
    ungraft_(model)
    assert torch.equal(model(x), y)


class Packed(nn.Module):
    """As torch's own quantised modules: the weight is in a module of its own."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self._packed_params = 6, 14, Quantised()
        del self._packed_params.in_features

    def forward(self, x):
        return self._packed_params(x)


def test_a_module_that_keeps_its_weight_in_another():
    model = nn.Sequential(Packed(), nn.ReLU())
    x = torch.randn(5, 6)
    y = model(x)
    seeds = graft_(model, "*", chunk_size=4, table=False)
    assert list(seeds.layers) == ["0"] and seeds[:].graft() and torch.equal(model(x), y)


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(), nn.Dropout(), nn.Sequential(nn.Linear(2, 2)), nn.MultiheadAttention(4, 2), nn.LSTM(2, 2),
        nn.LocalResponseNorm(2), nn.MaxPool2d(2), nn.TransformerEncoderLayer(4, 2, 4), nn.PReLU(4),
        nn.CrossEntropyLoss(torch.ones(4)),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_kinds_that_have_no_features_to_grow(module):
    assert features_of(module) is None


def test_everything_of_a_network_at_once(device):
    """Outer names and inner ones, kinds of all sorts, and one handle."""
    model = nn.ModuleDict(
        {kind: make() for kind, (make, _, _, scales) in KINDS.items() if not scales and kind != "frozen_batch_norm"}
    ).to(device)
    before = bits(model)
    seeds = graft_(model, "*", chunk_size=14, table=False)
    assert len(seeds) == len(model) and len(Seeds(model).table()) == len(model)
    assert seeds[:].graft() and seeds.states().eq(3).all()
    ungraft_(model)
    assert same(bits(model), before)
