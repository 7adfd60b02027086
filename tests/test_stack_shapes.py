"""Layers of every kind as base layer: convolutions, norms, embeddings, blocks, modules that take and return more."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

import checks
import pytest
import torch
from layer_checks import blended, check_layer, check_telemetry, scatter
from memory import taken
from torch import Tensor, nn

from kasmina_ext import KasminaLayer

LAST_2D, LAST_3D = torch.channels_last, torch.channels_last_3d


def grown(base: nn.Module, device: torch.device, **arguments) -> KasminaLayer:
    return scatter(KasminaLayer(base.double().to(device), num_seeds=4, num_blueprints=3, **arguments))


def draw(shape: tuple[int, ...], device: torch.device, memory_format=torch.contiguous_format) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, device=device).contiguous(memory_format=memory_format)
    return x.requires_grad_()


# ---- features in the second dimension ----------------------------------------------------------------

CONVOLUTIONS = {
    "Conv1d": (lambda: nn.Conv1d(3, 10, 3), (2, 3, 9)),
    "Conv1d-unbatched": (lambda: nn.Conv1d(3, 10, 3), (3, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 10, 3, stride=2, padding=1), (2, 3, 6, 5)),
    "Conv2d-unbatched": (lambda: nn.Conv2d(3, 10, 3), (3, 6, 5)),
    "Conv2d-channels_last": (lambda: nn.Conv2d(3, 10, 3), (2, 3, 6, 5), LAST_2D),
    "Conv2d-depthwise": (lambda: nn.Conv2d(5, 10, 3, groups=5, bias=False), (2, 5, 6, 5)),
    "Conv3d": (lambda: nn.Conv3d(3, 10, 2), (2, 3, 4, 3, 5)),
    "Conv3d-channels_last": (lambda: nn.Conv3d(3, 10, 2), (2, 3, 4, 3, 5), LAST_3D),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 10, 3), (2, 3, 4, 4)),
}
NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(10), (6, 10)),
    "BatchNorm1d-3d": (lambda: nn.BatchNorm1d(10), (6, 10, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(10), (3, 10, 4, 4)),
    "BatchNorm2d-channels_last": (lambda: nn.BatchNorm2d(10), (3, 10, 4, 4), LAST_2D),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(10), (3, 10, 2, 3, 2)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(10, affine=True), (3, 10, 4, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(5, 10), (3, 10, 4, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(10), (3, 4, 10)),
    "RMSNorm": (lambda: nn.RMSNorm(10), (3, 4, 10)),
}


@pytest.mark.stack("shapes: Conv1d, Conv2d, Conv3d")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(device, name):
    make, shape, *memory_format = CONVOLUTIONS[name]
    layer, x = grown(make(), device), draw(shape, device, *memory_format)
    check_layer(layer, x, feature_dim=0 if "unbatched" in name else 1)


@pytest.mark.stack("shapes: norms")
@pytest.mark.parametrize("name", NORMS)
def test_norms(device, name):
    make, shape, *memory_format = NORMS[name]
    check_layer(grown(make(), device), draw(shape, device, *memory_format))


class Fixed(nn.Module):
    """A base layer that costs nothing, so that all memory is the layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return x


LAYOUTS = {
    "NCL": lambda n: torch.randn(n, 64, 1500),
    "NLC": lambda n: torch.randn(n, 1500, 64).transpose(1, 2),
    "NCHW": lambda n: torch.randn(n, 64, 40, 40),
    "NHWC": lambda n: torch.randn(n, 64, 40, 40).contiguous(memory_format=LAST_2D),
    "NCDHW": lambda n: torch.randn(n, 64, 12, 12, 10),
    "NDHWC": lambda n: torch.randn(n, 64, 12, 12, 10).contiguous(memory_format=LAST_3D),
}


@pytest.mark.stack("shapes: NCHW and channels_last without copies")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_copied(device, layout):
    """One block for the output, one for the input's gradient, and workspaces that are small beside them."""
    if not checks.compiled("ops", device):
        pytest.skip(f"needs a compiled kernel for {device}: {checks.kernel_for(device)[1]}")
    layer = scatter(KasminaLayer(Fixed(), hidden_dim=64, feature_dim=1, num_seeds=8, num_blueprints=3, device=device))
    x = LAYOUTS[layout](64 if device.type == "cuda" else 4).to(device).requires_grad_()
    gradient = torch.empty_like(x).normal_()
    wanted = [x, layer.blueprint_weights]
    y = layer(x)
    assert y.stride() == x.stride() == torch.autograd.grad(y, wanted, gradient)[0].stride()

    forward = taken(device, lambda: layer(x))
    assert x.nbytes <= forward.total < 1.5 * x.nbytes and forward.blocks <= 2, forward
    y = layer(x)
    backward = taken(device, lambda: torch.autograd.grad(y, wanted, gradient))
    assert x.nbytes <= backward.total < 1.5 * x.nbytes and backward.blocks <= 4, backward


# ---- other modules -----------------------------------------------------------------------------------


@pytest.mark.stack("shapes: Embedding")
@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_embeddings(device, kind):
    base = nn.Embedding(11, 10, padding_idx=0) if kind == "Embedding" else nn.EmbeddingBag(11, 10, mode="sum")
    check_layer(grown(base, device), torch.tensor([[1, 2, 0], [2, 10, 7]], device=device))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(10, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def first(out: tuple) -> Tensor:
    return out[0]


BLOCKS = {
    "Sequential": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 10), nn.Tanh()), (2, 5, 3), {}),
    "Sequential-conv": (lambda: nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU()), (2, 3, 6, 5), {}),
    "Residual": (Residual, (2, 10, 6, 5), {}),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(10, 2, 16, dropout=0.0), (5, 2, 10), {}),
    "LSTM": (lambda: nn.LSTM(3, 10, batch_first=True), (2, 5, 3), {"hidden_dim": 10}),
}


@pytest.mark.stack("shapes: nn.Sequential and whole blocks as base layer")
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(device, name):
    make, shape, arguments = BLOCKS[name]
    pick = first if name == "LSTM" else lambda out: out
    check_layer(grown(make(), device, **arguments), draw(shape, device), pick=pick)


@pytest.mark.stack("shapes: base layers with extra and keyword arguments")
@pytest.mark.stack("shapes: base layers that return tuples")
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention(device, need_weights):
    """Three tensors in, keywords, and a pair out whose second element may be None."""
    layer = grown(nn.MultiheadAttention(10, 2, batch_first=True), device)
    query, memory, value = (draw((2, length, 10), device) for length in (5, 7, 7))
    hidden = torch.zeros(2, 7, dtype=torch.bool, device=device)
    hidden[1, 4:] = True
    arguments = {"key_padding_mask": hidden, "need_weights": need_weights}
    check_layer(layer, query, memory, value, pick=first, **arguments)
    attention = layer(query, memory, value, **arguments)[1]
    assert attention.shape == (2, 5, 7) if need_weights else attention is None


Pair = namedtuple("Pair", "hidden cache")


class Named(nn.Linear):
    def forward(self, x: Tensor, form: Callable = Pair) -> tuple:
        y = super().forward(x)
        return form(y, 1) if form is Pair else form(y)


@pytest.mark.stack("shapes: base layers that return tuples")
def test_named_tuples_keep_their_kind(device):
    layer, x = grown(Named(3, 10), device), draw((4, 3), device)
    check_layer(layer, x, pick=first)
    out = layer(x)
    assert type(out) is Pair and out.cache == 1
    sorted_ = layer(x, form=lambda y: torch.sort(y, -1))
    assert type(sorted_) is torch.return_types.sort
    want, order = torch.sort(layer.base_layer(x)[0], -1)
    torch.testing.assert_close(sorted_.values, blended(layer, want, -1))
    assert torch.equal(sorted_.indices, order)


# ---- the same layer twice ----------------------------------------------------------------------------


@pytest.mark.stack("shapes: shared layers used twice in a forward")
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_layer_in_two_places(device, kind):
    """Telemetry counts both uses, gradients add."""
    base, shape = (nn.Linear(10, 10), (6, 10)) if kind == "linear" else (nn.Conv2d(10, 10, 1), (2, 10, 3, 3))
    layer = grown(base, device)
    dim, model = layer.feature_dim, nn.Sequential(layer, nn.Tanh(), layer)
    x, parameters = draw(shape, device), list(model.parameters())
    inner = base(x)
    outer = base(blended(layer, inner, dim).tanh())
    want = blended(layer, outer, dim)
    y = model(x)
    torch.testing.assert_close(y, want)
    check_telemetry(layer, [inner, outer], dim)
    got = torch.autograd.grad(y.square().sum(), [x, *parameters])
    right = torch.autograd.grad(want.square().sum(), [x, *parameters])
    for gradient, truth in zip(got, right, strict=True):
        torch.testing.assert_close(gradient, truth)
    assert layer.grad_telemetry[:, 2].eq(2).all()


@pytest.mark.stack("shapes: shared layers used twice in a forward")
@pytest.mark.stack("devices and threads: weight sharing")
def test_a_tied_embedding(device):
    """An embedding and a head with one weight, both grown: its gradient is the sum of both uses."""
    embedding, head = grown(nn.Embedding(11, 6), device), grown(nn.Linear(6, 11, bias=False), device)
    head.weight = embedding.weight
    tokens = torch.tensor([[1, 2, 2], [7, 0, 10]], device=device)
    wanted = [embedding.weight, embedding.blueprint_weights, head.blueprint_weights]
    assert len(list(nn.ModuleList([embedding, head]).parameters())) == 3

    def loss(hidden: Tensor, out: Callable) -> Tensor:
        return out(hidden.tanh()).logsumexp(-1).sum()

    got = torch.autograd.grad(loss(embedding(tokens), head), wanted)
    plain = blended(embedding, nn.functional.embedding(tokens, embedding.weight), -1)
    right = torch.autograd.grad(loss(plain, lambda h: blended(head, h @ embedding.weight.T, -1)), wanted)
    for gradient, truth in zip(got, right, strict=True):
        torch.testing.assert_close(gradient, truth)


# ---- where modules are not called --------------------------------------------------------------------


def encoder_layer(device: torch.device) -> nn.TransformerEncoderLayer:
    torch.manual_seed(3)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, device=device)


@pytest.mark.stack("shapes: nn.TransformerEncoder in evaluation (its fused kernels)")
@pytest.mark.parametrize("part", ["linear1", "linear2", "norm1", "norm2", "self_attn"])
def test_an_encoder_layer_evaluates_what_it_trained(device, part):
    """In evaluation torch would hand the weights of these modules to one kernel: seeds would vanish."""
    block, x = encoder_layer(device), torch.randn(2, 5, 8, device=device)
    layer = scatter(KasminaLayer(block.get_submodule(part), num_seeds=4, num_blueprints=3))
    setattr(block, part, layer)
    trained = block(x)
    layer.reset_telemetry()
    block.eval()
    with torch.no_grad():
        evaluated = block(x)
    with torch.inference_mode():
        assert torch.equal(block(x), evaluated)
    torch.testing.assert_close(evaluated, trained, rtol=1e-4, atol=1e-5)
    assert layer.telemetry[:, 3].eq(2).all()
    with torch.no_grad():
        assert (encoder_layer(device).eval()(x) - evaluated).abs().max() > 0.01


@pytest.mark.stack("shapes: nn.TransformerEncoder in evaluation (its fused kernels)")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("part", ["linear2", "self_attn", "norm1", ""])
def test_an_encoder_with_a_padding_mask(device, part):
    """In evaluation torch makes a nested tensor of the batch, without the padding."""
    model = nn.TransformerEncoder(encoder_layer(device), 2)
    block = model.layers[0]
    layer = scatter(KasminaLayer(block.get_submodule(part), num_seeds=4, num_blueprints=3))
    if part:
        setattr(block, part, layer)
    else:
        model.layers[0] = layer
    x = torch.randn(2, 5, 8, device=device)
    padding = torch.zeros(2, 5, dtype=torch.bool, device=device)
    padding[1, 3:] = True
    trained = model(x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        evaluated = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding], rtol=1e-4, atol=1e-5)
    assert not evaluated[padding].any()


@pytest.mark.stack(
    "shapes: out_proj of nn.MultiheadAttention",
    refused="ValueError: out_proj is never called, only its weights are used; wrap the MultiheadAttention itself",
)
def test_what_is_never_called_is_refused(device):
    attention = nn.MultiheadAttention(8, 2, device=device)
    with pytest.raises(ValueError, match="never called.*wrap the MultiheadAttention itself"):
        KasminaLayer(attention.out_proj)


@pytest.mark.stack("shapes: nested tensors, jagged and strided")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors(device, layout):
    layer = grown(nn.Linear(3, 10), device)
    parts = [draw((length, 3), device) for length in (4, 1, 7)]
    y = layer(torch.nested.as_nested_tensor(parts, layout=layout))
    assert y.is_nested and y.layout == layout
    plain = [layer.base_layer(part) for part in parts]
    want = [blended(layer, part, -1) for part in plain]
    for got, right in zip(y.unbind(), want, strict=True):
        torch.testing.assert_close(got, right)
    rows = torch.cat(plain)
    check_telemetry(layer, [rows], -1)
    wanted = [*parts, layer.blueprint_weights, layer.weight]
    got = torch.autograd.grad(torch.cat(y.unbind()).square().sum(), wanted)
    right = torch.autograd.grad(torch.cat(want).square().sum(), wanted)
    for gradient, truth in zip(got, right, strict=True):
        torch.testing.assert_close(gradient, truth)


def test_a_nested_tensor_for_a_convolution_is_refused():
    layer = KasminaLayer(Fixed(), hidden_dim=3, feature_dim=1)
    with pytest.raises(TypeError, match="features must be last, feature_dim is 1"):
        layer(torch.nested.as_nested_tensor([torch.randn(4, 3)], layout=torch.jagged))
