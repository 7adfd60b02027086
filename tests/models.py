"""Small GPT-2, Llama and ResNet-like networks with random weights, grown, and the tasks that they are trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_ext import ExtendedLifecycle as State
from kasmina_ext import TritonChunkedKasminaLayer

SEEDS = 8
VOCABULARY = 64


def needs(*packages: str) -> None:
    """They are in requirements-dev.txt: only where nothing can be installed do they lack."""
    for name in packages:
        pytest.importorskip(name, reason=f"{name} is not installed")


class Size(NamedTuple):
    """Of a language model and its batches."""

    width: int = 32
    layers: int = 2
    length: int = 16
    batch: int = 16


# ---- networks ----------------------------------------------------------------------------------------


def gpt2(size: Size) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=2 * size.length,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=max(2, size.width // 64),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else a warning that it is not known breaks the first compiled graph
    return model


def llama(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * size.length,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=max(2, size.width // 64),
        num_key_value_heads=max(1, size.width // 128),
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        channels = size.width // 2
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(size.layers)))
        self.head = nn.Linear(channels, 10)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.blocks(self.stem(pixels)).mean((2, 3)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


# ---- seeds in them -----------------------------------------------------------------------------------


def grow_(model: nn.Module, *names: str, num_blueprints: int = 10) -> list[TritonChunkedKasminaLayer]:
    """Layers around all submodules whose names end with one of ``names``."""
    found = [name for name, _ in model.named_modules() if name.endswith(names)]
    layers = []
    for name in found:
        parent, _, own = name.rpartition(".")
        base = model.get_submodule(name)
        hidden_dim = base.weight.numel() if "RMSNorm" in type(base).__name__ else None
        layer = TritonChunkedKasminaLayer(
            base,
            SEEDS,
            hidden_dim=hidden_dim,
            num_blueprints=num_blueprints,
            chunking="balanced",
            alpha_schedule="cosine",
            ramp_epochs=30,
        )
        setattr(model.get_submodule(parent), own, layer)
        layers.append(layer)
    assert len(layers) >= len(names)
    return layers


def live(layers: list[TritonChunkedKasminaLayer], step: int) -> None:
    """What a training loop does after each step: a whole life for every seed within 150 steps, half of them culled."""
    targets = {20: State.GERMINATED, 30: State.TRAINING, 40: State.GRAFTING, 80: State.STABILIZATION}
    targets |= {90: State.EVALUATING, 110: State.FINE_TUNING, 140: State.FOSSILIZED}
    for layer in layers:
        layer.step_lifecycle()
        if step in targets:
            layer.request_state_transitions(None, targets[step])
        if step == 100:
            layer.request_state_transitions(range(0, SEEDS, 2), State.CULLED)
        if step == 150:
            layer.recycle()


def check_lives(layers: list[TritonChunkedKasminaLayer], steps: int) -> None:
    """After 200 steps: culled ones sleep again, the others are fossils; each step was counted once."""
    for layer in layers:
        assert layer.lifecycle_states.tolist() == [int(State.DORMANT), int(State.FOSSILIZED)] * (SEEDS // 2)
        assert layer.telemetry[:, 3].eq(steps).all() and layer.grad_telemetry[:, 2].eq(steps).all()
        assert layer.telemetry[:, 4].eq(0).all()


# ---- tasks -------------------------------------------------------------------------------------------


def sentences(count: int, length: int) -> Tensor:
    """Each token says which is next."""
    draw = torch.Generator().manual_seed(0)
    after = torch.randperm(VOCABULARY, generator=draw)
    tokens = [torch.randint(0, VOCABULARY, (count,), generator=draw)]
    while len(tokens) < length:
        tokens.append(after[tokens[-1]])
    return torch.stack(tokens, 1)


def language(size: Size, count: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in sentences(count, size.length)]


def pictures(size: Size, count: int) -> list[dict[str, Tensor]]:
    """Noise with one of ten patterns in it."""
    draw = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, size.length, size.length, generator=draw)
    labels = torch.randint(0, 10, (count,), generator=draw)
    pixels = patterns[labels] + 0.5 * torch.randn(count, 3, size.length, size.length, generator=draw)
    return [{"pixels": x, "labels": label} for x, label in zip(pixels, labels, strict=True)]


class Task(NamedTuple):
    make: Callable[[Size], nn.Module]
    names: tuple[str, ...]
    """Of the submodules that are wrapped."""
    samples: Callable[[Size, int], list[dict[str, Any]]]
    rate: float


TASKS = {
    "GPT-2": Task(gpt2, ("mlp.c_fc", "attn.c_proj", "ln_f", "wte"), language, 3e-3),
    "Llama": Task(llama, ("mlp.down_proj", "self_attn.q_proj", "input_layernorm", "embed_tokens"), language, 3e-3),
    "ResNet": Task(ResNet, ("stem", "conv2", "norm1"), pictures, 1e-2),
}
