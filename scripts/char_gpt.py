"""A character-level GPT, and what it reads: the sources of Python's standard library, as they lie on this machine."""

from __future__ import annotations

import hashlib
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SYMBOLS = 128
"""ASCII; NUL ends a file, and every other character is read as a question mark."""
END_OF_FILE = b"\0"
SHARES = {"val": 0.05, "test": 0.05}
"""Of the files; the rest is trained on."""


# ---- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """uint8 symbols of three sets of files that share none: ``train``, ``val`` and ``test``."""

    train: Tensor
    val: Tensor
    test: Tensor
    facts: dict[str, Any]


def read_stdlib(device: torch.device, limit: int | None = None) -> Corpus:
    """All sources, or so many of them that there are ``limit`` bytes. The hash of a file's content says which set it is in."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    count = total = 0
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            continue
        if limit is not None and total >= limit:
            break
        content = path.read_bytes()
        count, total = count + 1, total + len(content)
        text = content.decode("utf-8", errors="replace").encode("ascii", errors="replace")
        parts[_set_of(content)].append(text + END_OF_FILE)
    tensors = {
        name: torch.frombuffer(bytearray(b"".join(of_set)), dtype=torch.uint8).to(device)
        for name, of_set in parts.items()
    }
    sizes = {f"{name}_characters": tensor.numel() for name, tensor in tensors.items()}
    return Corpus(**tensors, facts={"python": platform.python_version(), "files": count, "bytes": total, **sizes})


def _set_of(content: bytes) -> str:
    share = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    for name, size in SHARES.items():
        if share < size:
            return name
        share -= size
    return "train"


def random_windows(text: Tensor, steps: int, batch: int, length: int, seed: int) -> Iterator[tuple[Tensor]]:
    """``steps`` batches int64 ``[batch, length + 1]``, drawn on the CPU, so every device sees the same."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(text.numel() - length, (steps, batch), generator=generator).to(text.device)
    along = torch.arange(length + 1, device=text.device)
    for of_batch in starts:
        yield (text[of_batch[:, None] + along].long(),)


def even_windows(text: Tensor, count: int, batch: int, length: int) -> list[tuple[Tensor]]:
    """``count`` windows evenly spread over all of the text, in batches; fewer where it is too short for so many."""
    count = min(count, (text.numel() - 1) // length)
    starts = torch.linspace(0, text.numel() - length - 1, count, dtype=torch.float64).long().to(text.device)
    windows = text[starts[:, None] + torch.arange(length + 1, device=text.device)].long()
    return [(part,) for part in windows.split(batch)]


# ---- network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm and added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """int64 ``[B, T]`` to logits ``[B, T, 128]``; pre-norm, learnt positions, nothing tied."""

    LINEAR = ("qkv", "proj", "up", "down")

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SYMBOLS, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, SYMBOLS)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_stream = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, symbols: Tensor) -> Tensor:
        # A product instead of a look-up, whose gradient takes a sort on a GPU.
        is_symbol = symbols[..., None] == torch.arange(SYMBOLS, device=symbols.device)
        x = is_symbol.to(self.tokens.weight.dtype) @ self.tokens.weight + self.positions.weight[: symbols.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def linear_names(network: GPT) -> tuple[str, ...]:
    """Of the matrices in the blocks."""
    return tuple(f"blocks.{i}.{name}" for i in range(len(network.blocks)) for name in GPT.LINEAR)


def in_bfloat16(device: torch.device) -> torch.autocast:
    """Casts are not kept: a CUDA graph would find last step's."""
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def losses(network: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """float32 ``[B]``: mean cross-entropy of each window, in nats per character."""
    (windows,) = batch
    with in_bfloat16(windows.device):
        logits = network(windows[:, :-1])
    found = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return found.unflatten(0, (len(windows), -1)).mean(1)


@torch.no_grad()
def losses_over(network: nn.Module, batches: list[tuple[Tensor]]) -> Tensor:
    """float32: of every window, without gradients; on the CPU."""
    return torch.cat([losses(network, batch) for batch in batches]).cpu()


# ---- training it -----------------------------------------------------------------------------------------------------

PEAK_RATE, WEIGHT_DECAY, CLIP = 2e-3, 0.1, 1.0
WARM_UP = 200
"""Steps in which the rate rises."""
AT_A_TIME = 20


def train(
    corpus: Corpus, shape: Shape, batch: int, *, seconds: float, steps: int, seed: int, say: Callable[[str], None]
) -> tuple[GPT, dict[str, Any]]:
    """A GPT trained from scratch until the time or the steps are over; facts for the record. AdamW; the rate falls to 0."""
    from repair_methods import Trainer

    torch.manual_seed(seed)
    network = GPT(shape).to(corpus.train.device)
    on_gpu = corpus.train.is_cuda
    example = next(random_windows(corpus.train, 1, batch, shape.context, seed))
    trainer = Trainer(
        network, dict.fromkeys(network.parameters()), losses, example, weight_decay=WEIGHT_DECAY, clip=CLIP
    )
    held = even_windows(corpus.val, 4 * batch, batch, shape.context)
    begun = said = time.perf_counter()
    done, share = 0, 0.0
    while share < 1:
        for windows in random_windows(corpus.train, AT_A_TIME, batch, shape.context, seed + 1 + done):
            done += 1
            loss = trainer.step(windows, PEAK_RATE * min(1.0, done / WARM_UP) * math.cos(math.pi / 2 * share) ** 2)
        if on_gpu:
            torch.cuda.synchronize()  # the clock below is to tell what has been done, not what was queued
        now = time.perf_counter()
        share = max((now - begun) / seconds, done / steps)
        if now - said > 10:
            said = now
            say(f"  {now - begun:4.0f} s, step {done}: training loss {loss.item():.3f}")
    spent = time.perf_counter() - begun
    network.requires_grad_(False)
    return network, {
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": done,
        "characters": done * batch * shape.context,
        "seconds": round(spent, 1),
        "train_loss": loss.item(),
        "val_loss": losses_over(network, held).mean().item(),
    }
