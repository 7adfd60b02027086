"""Models as people have them: tiny ones of transformers, folded, saved, and loaded by their own classes."""

from __future__ import annotations

import copy

import pytest
import torch
from folding import bits, grow, same
from tiny_models import bert, gemma, gpt2, llama, logits, nemotron, resnet, vit
from torch import nn

from kasmina_ext.fold import FoldError, fold_, fold_report, unfold_
from kasmina_ext.layer import KasminaLayer

SCALES, ALL = (0,), (0, 1, 2, 3)
# name: (model, names of modules that get seeds, strategies). What only scales fits the classes as they are: a bias
# that was added would be lost on the way through from_pretrained.
MODELS = {
    "gpt2": (gpt2, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp", "ln_2", "wpe"), ALL),
    "llama": (llama, ("q_proj", "gate_proj", "mlp", "input_layernorm", "model.norm", "embed_tokens"), SCALES),
    "gemma": (gemma, ("q_proj", "down_proj", "input_layernorm", "model.norm"), SCALES),
    "nemotron": (nemotron, ("up_proj", "input_layernorm"), SCALES),
    "bert": (bert, ("query", "intermediate.dense", "attention.output.LayerNorm", "word_embeddings"), ALL),
    "vit": (vit, ("projection", "layernorm_after", "classifier"), ALL),
    "resnet": (resnet, ("convolution", "normalization"), SCALES),
}


def graft(model, names, strategies, chunk_size=3):
    """Seeds for all modules whose names end so; returns the names."""
    found = [name for name, _ in model.named_modules() if any(name == n or name.endswith(f".{n}") for n in names)]
    assert found
    for name in sorted(found, key=len, reverse=True):  # what is inside of another comes first
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(name)
        # transformers' norms do not say how many features they have.
        width = (
            module.weight.numel() if "norm" in type(module).__name__.lower() and not hasattr(module, "bias") else None
        )
        layer = KasminaLayer(module, chunk_size=chunk_size, num_blueprints=4, hidden_dim=width)
        setattr(model.get_submodule(owner), leaf, grow(layer, len(name), strategies))
    return found


def prepared(kind, dtype=torch.float32):
    torch.manual_seed(0)
    make, names, strategies = MODELS[kind]
    model = make().to(dtype).eval()
    plain_names = list(model.state_dict())
    found = graft(model, names, strategies)
    return model, plain_names, found


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_folding_costs_no_more_than_rounding_does_anyway(kind):
    model, plain_names, found = prepared(kind)
    truth = logits(copy.deepcopy(model).double())  # alphas are float32, so a and b are what they were but for rounding
    unfolded = logits(model)
    before = bits(model)
    fold_(model)
    assert not any(isinstance(m, KasminaLayer) for m in model.modules())
    assert list(fold_report(model)) and len(fold_report(model)) == len(found)
    folded = logits(model)
    own_error = (unfolded - truth).abs().max()
    assert (folded - truth).abs().max() <= 4 * own_error + 1e-6 * truth.abs().max()
    assert list(model.state_dict()) == plain_names
    unfold_(model)
    assert same(bits(model), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_folding_is_exact_where_there_is_nothing_to_round(kind):
    model, *_ = prepared(kind, torch.float64)
    if kind in ("llama", "gemma"):  # their norms compute in float32, whatever the model's dtype
        tolerance = 1e-5
    else:
        tolerance = 1e-11
    truth = logits(model)
    fold_(model)
    torch.testing.assert_close(logits(model), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded_by_its_own_class(kind, tmp_path):
    model, *_ = prepared(kind)
    fold_(model)
    assert not any(row["added"] for row in fold_report(model).values())
    y = logits(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), y)


@torch.no_grad()
def test_generation_goes_on_as_before():
    model, *_ = prepared("gpt2", torch.float64)
    prompt = torch.randint(3, 40, (2, 5))
    settings = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **settings)
    fold_(model)
    assert torch.equal(model.generate(prompt, **settings), expected)


def test_the_head_that_is_the_embedding():
    """GPT-2's lm_head is wte."""
    for name, other in (("transformer.wte", r"lm_head\.weight"), ("lm_head", r"transformer\.wte\.weight")):
        model = gpt2()
        graft(model, [name], (3,))
        with pytest.raises(FoldError, match=f"{name}: .* tied: {other}"):
            fold_(model)
        fold_(model, strict=False)
        assert list(fold_report(model).skipped) == [name]


def test_llamas_norm_has_no_place_for_a_shift():
    model = llama()
    graft(model, ["input_layernorm"], (3,))
    with pytest.raises(FoldError, match=r"model\.layers\.0\.input_layernorm: LlamaRMSNorm: it has no bias"):
        fold_(model)


@torch.no_grad()
def test_gemmas_norm_multiplies_by_one_plus_its_weight():
    """Folded as LlamaRMSNorm is, a fresh one, whose weights are 0, would not change at all."""
    norm = gemma().model.norm
    assert not norm.weight.any()
    layer = KasminaLayer(norm, hidden_dim=16, num_seeds=4, num_blueprints=1, strategy="multiplicative")
    layer.extended_state.update_state(None, {"lifecycle": "grafting", "blueprint": 0})
    layer.blueprint_weights.copy_(torch.linspace(0.25, 4, 16)[None])
    x = torch.randn(5, 16)
    y = layer(x)
    fold_(layer)
    assert torch.equal(norm.weight, torch.linspace(0.25, 4, 16) - 1)
    torch.testing.assert_close(norm(x), y)


@torch.no_grad()
def test_a_scaled_embedding_takes_a_factor_and_no_shift():
    """Some models multiply what their embedding looks up."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    for strategies, folds in (((0,), True), ((3,), False)):
        embedding = Gemma3TextScaledWordEmbedding(20, 16, 0, embed_scale=4.0)
        layer = grow(KasminaLayer(embedding, num_seeds=4, num_blueprints=4), 1, strategies)
        ids = torch.arange(20)
        y = layer(ids)
        if folds:
            torch.testing.assert_close(fold_(layer)(ids), y)
        else:
            with pytest.raises(FoldError, match="would not be added to its output"):
                fold_(layer)


@torch.no_grad()
def test_attention_of_transformers_is_a_block_that_is_refused_and_its_last_module_is_not():
    model = gpt2().eval()
    block = model.transformer.h[0]
    block.attn = grow(KasminaLayer(block.attn, num_seeds=4, num_blueprints=4))
    y = logits(model)
    with pytest.raises(FoldError, match=r"transformer\.h\.0\.attn: GPT2Attention: "):
        fold_(model)
    # The same seeds one module further in, where it is known what they change.
    seeds, block.attn = block.attn, block.attn.base_layer
    block.attn.c_proj, seeds.base_layer = seeds, block.attn.c_proj
    torch.testing.assert_close(logits(model), y)
    fold_(model)
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-5)
    assert isinstance(block.attn.c_proj, nn.Module) and type(block.attn.c_proj).__name__ == "Conv1D"
