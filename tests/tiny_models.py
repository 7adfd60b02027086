"""Models as people have them, of transformers, tiny and with random weights; and what they are shown."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

TEXT = {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **TEXT)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **SMALL, num_key_value_heads=1))


def gemma() -> nn.Module:
    config = transformers.GemmaConfig(**TEXT, **SMALL, num_key_value_heads=1, head_dim=8)
    return transformers.GemmaForCausalLM(config)


def nemotron() -> nn.Module:
    return transformers.NemotronForCausalLM(transformers.NemotronConfig(**TEXT, **SMALL, num_key_value_heads=2))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **SMALL, num_labels=3))


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    config.num_labels = 3
    return transformers.ResNetForImageClassification(config)


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """The same three samples each time, where the model is."""
    generator = torch.Generator().manual_seed(7)
    parameter = next(model.parameters())
    if model.config.model_type in ("vit", "resnet"):
        size = 8 if model.config.model_type == "vit" else 32
        return {"pixel_values": torch.randn(3, 3, size, size, generator=generator).to(parameter)}
    return {"input_ids": torch.randint(3, 40, (3, 12), generator=generator).to(parameter.device)}


def logits(model: nn.Module) -> Tensor:
    """float64."""
    return model(**inputs(model)).logits.double()
