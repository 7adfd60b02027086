"""What a training step needs at most: of the base alone, of the base trained, with seeds, and with PEFT's IA3 and LoRA."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from memory import taken
from models import TASKS, Size, grow_, needs
from threads import one_thread
from torch import Tensor, nn

from kasmina_ext import ExtendedLifecycle

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks for it
MIB = 2.0**20
SIZES = {
    ("GPT-2", "cpu"): Size(width=64, layers=2, length=64, batch=8),
    ("Llama", "cpu"): Size(width=64, layers=2, length=64, batch=8),
    ("ResNet", "cpu"): Size(width=32, layers=2, length=16, batch=8),
    ("GPT-2", "cuda"): Size(width=768, layers=4, length=512, batch=8),
    ("Llama", "cuda"): Size(width=768, layers=4, length=512, batch=8),
    ("ResNet", "cuda"): Size(width=256, layers=4, length=64, batch=32),
}
TARGETS = {
    "GPT-2": ["mlp.c_fc", "attn.c_proj"],
    "Llama": ["mlp.down_proj", "self_attn.q_proj"],
    "ResNet": ["conv1", "conv2"],
}
METHODS = {
    "base alone": lambda model, kind: frozen(model, kind),
    "base trained": lambda model, kind: model,
    "seeds": lambda model, kind: with_seeds(model, kind),
    "IA3": lambda model, kind: with_peft(model, kind, "IA3Config", feedforward_modules=[]),
    "LoRA": lambda model, kind: with_peft(model, kind, "LoraConfig", r=8),
}
NOTE = (
    "MiB at the peak of a step (forward, backward, AdamW), of weights, gradients, moments and activations; the same "
    "sublayers are wrapped by seeds, IA3 (on outputs) and LoRA (rank 8); base alone: frozen, with a gradient as far as the "
    "first of them; bfloat16 autocast on CUDA"
)


def frozen(model: nn.Module, kind: str) -> nn.Module:
    """Nothing is trained, but the gradient flows as far as it would with any of the others."""
    model.requires_grad_(False)
    first = next(module for name, module in model.named_modules() if name.endswith(tuple(TARGETS[kind])))
    first.register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def with_seeds(model: nn.Module, kind: str) -> nn.Module:
    """One multiplicative weight a feature, all of them grafted: what IA3 trains, too."""
    model.requires_grad_(False)
    for layer in grow_(model, *TARGETS[kind], num_blueprints=1):
        layer.extended_state.update_state(None, {"lifecycle": ExtendedLifecycle.GRAFTING, "blueprint": 0})
    return model


def with_peft(model: nn.Module, kind: str, config: str, **arguments: Any) -> nn.Module:
    import peft

    fan_in = {"fan_in_fan_out": True} if kind == "GPT-2" else {}
    return peft.get_peft_model(model, getattr(peft, config)(target_modules=TARGETS[kind], **fan_in, **arguments))


def held(tensors: list[Tensor]) -> int:
    """Bytes of all storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_of_a_step(kind: str, method: str, device: torch.device) -> float:
    """MiB in the second step, when the optimizer has its moments."""
    size, task = SIZES[kind, device.type], TASKS[kind]
    torch.manual_seed(0)
    model = METHODS[method](task.make(size), kind).to(device)
    samples = task.samples(size, size.batch)
    batch = {name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch)["loss"]
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    step()
    moments = [t for state in optimizer.state.values() for t in state.values()] if optimizer else []
    always = held([*model.parameters(), *model.buffers(), *batch.values(), *moments])
    return (always + taken(device, step).peak) / MIB


def check_memory(kind: str, device: torch.device, record_property) -> None:
    needs("transformers", "peft")
    peaks = {}
    for method in METHODS:
        with one_thread():
            peaks[method] = peak_of_a_step(kind, method, device)
        gc.collect()
        record_property(f"{method}, MiB", round(peaks[method], 1))
    assert peaks["base alone"] < peaks["seeds"] < 1.02 * peaks["IA3"], peaks


@pytest.mark.stack("models: peak memory of a training step, GPT-2", uses=("transformers", "peft"), note=NOTE)
def test_gpt2(device, record_property):
    check_memory("GPT-2", device, record_property)


@pytest.mark.stack("models: peak memory of a training step, Llama", uses=("transformers", "peft"), note=NOTE)
def test_llama(device, record_property):
    check_memory("Llama", device, record_property)


@pytest.mark.stack("models: peak memory of a training step, ResNet-like network", uses=("peft",), note=NOTE)
def test_resnet(device, record_property):
    check_memory("ResNet", device, record_property)
