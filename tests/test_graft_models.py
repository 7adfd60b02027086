"""Models of transformers and a ResNet as people grow them: grafted, trained, used, saved, loaded, folded, given back."""

from __future__ import annotations

import copy
import math
from fnmatch import fnmatchcase

import pytest
import torch
from folding import bits, same
from tiny_models import bert, gpt2, inputs, llama, logits, resnet, vit
from torch import nn
from torch.nn import functional as F

from kasmina_ext import (
    KasminaLayer,
    Seeds,
    fold_,
    fold_report,
    graft_,
    load_seeds,
    param_groups,
    potential,
    save_seeds,
    unfold_,
    ungraft_,
)

# name: (model, patterns, layers that they find, strategy). Where a bias would have to be added, from_pretrained would
# not know it, and what only scales needs none.
MODELS = {
    "gpt2": (gpt2, ["*.mlp.*", "*.c_attn", "*.ln_?", "*.wpe"], 2 * 5 + 2, "affine"),
    "llama": (llama, ["*.mlp.*", "*_proj", "*norm*", "*.embed_tokens"], 2 * 9 + 2, "multiplicative"),
    "bert": (bert, ["*.dense", "*.query", "*.LayerNorm", "*.word_embeddings", "classifier"], 2 * 6 + 4, "affine"),
    "vit": (vit, ["*.projection", "*layernorm*", "*.fc?", "classifier"], 2 * 4 + 3, "affine"),
    "resnet": (resnet, ["*.convolution", "*.normalization", "classifier.1"], 13, "multiplicative"),
}
PATTERNS_OF_LANGUAGE = ("gpt2", "llama")


def made(kind, device):
    """A model with weights that have drifted, where seeds are to be and what they are like; and what it said before."""
    torch.manual_seed(0)
    make, patterns, _, strategy = MODELS[kind]
    model = make().eval().to(device)
    with torch.no_grad():
        if kind == "resnet":  # statistics of a new one are those of nothing
            model.train()
            for _ in range(20):
                logits(model)
            model.eval()
        else:  # and these say next to nothing
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25)
        healthy = logits(model)
        for name, module in model.named_modules():
            if any(fnmatchcase(name, pattern) for pattern in patterns) and hasattr(module, "weight"):
                module.weight *= 0.5 + torch.rand(()).item()
    return model, patterns, strategy, healthy


def grafted(kind, device):
    model, patterns, strategy, healthy = made(kind, device)
    return model, graft_(model, patterns, chunk_size=5, strategy=strategy, table=False), healthy


def train(model, seeds, target, steps=20):
    """Back to what the model said; the first loss and the last, as shares of what is to be said."""
    optimizer = torch.optim.Adam(param_groups(seeds, lr=0.02))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append((logits(model) - target).square().sum() / target.square().sum())
        losses[-1].backward()
        optimizer.step()
    return losses[0].item(), losses[-1].item()


@pytest.mark.parametrize("kind", MODELS)
def test_graft_train_use_save_load_fold(kind, device, tmp_path):
    model, patterns, strategy, healthy = made(kind, device)
    pristine, y = bits(model), logits(model)
    class_names, modules = list(model.state_dict()), list(model.modules())
    plain = copy.deepcopy(model)
    seeds = graft_(model, patterns, chunk_size=5, strategy=strategy, table=False)
    assert len(seeds.layers) == MODELS[kind][2] and not seeds.skipped
    assert torch.equal(logits(model), y)

    # Trained: only the seeds.
    assert seeds[:].graft() and torch.equal(logits(model), y)
    first, last = train(model, seeds, healthy)
    assert last < 0.3 * first and potential(seeds).isfinite().all()
    own = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.replace("base_layer.", "") for name in own} == set(dict(plain.named_parameters()))
    grown = logits(model)
    assert not torch.allclose(grown, y)
    assert all(row["note"] == "" for row in seeds.report().values())  # every layer has been called

    # Saved and loaded: the seeds alone, into the model that they were grown in, and all of it as a state_dict.
    size = save_seeds(seeds, tmp_path / "seeds.safetensors").stat().st_size
    assert size < 60_000
    other = copy.deepcopy(plain)
    graft_(other, patterns, chunk_size=5, strategy=strategy, table=False)
    assert torch.equal(logits(other), y)
    load_seeds(other, tmp_path / "seeds.safetensors")
    assert torch.equal(logits(other), grown)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    third = copy.deepcopy(plain)
    graft_(third, patterns, chunk_size=5, strategy=strategy, table=False)
    third.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(logits(third), grown)

    # Folded, and loaded by its own class, which knows nothing of seeds.
    with torch.no_grad():
        before = bits(model)
        assert fold_(seeds) is model and list(model.state_dict()) == class_names
        assert not any(row["added"] for row in fold_report(model).values())
        folded = logits(model)
        torch.testing.assert_close(folded, grown, rtol=1e-3, atol=1e-4 * grown.abs().max().item())
        model.save_pretrained(tmp_path / "folded")
        loaded = type(model).from_pretrained(tmp_path / "folded").eval().to(device)
        assert torch.equal(logits(loaded), folded)
        assert not any(isinstance(module, KasminaLayer) for module in loaded.modules())
        unfold_(model)
        assert same(bits(model), before) and torch.equal(logits(model), grown)
    ungraft_(model)
    assert same(bits(model), pristine) and list(model.modules()) == modules and torch.equal(logits(model), y)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", PATTERNS_OF_LANGUAGE)
def test_generation_with_a_cache(kind, device):
    model, seeds, healthy = grafted(kind, device)
    prompt = inputs(model)["input_ids"][:, :5]
    how = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(prompt), "eos_token_id": None}
    before = model.generate(prompt, **how)
    seeds[:].graft()
    assert torch.equal(model.generate(prompt, **how), before)
    train(model, seeds, -healthy)
    cached, plain = (model.generate(prompt, use_cache=cache, **how) for cache in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (3, 15) and not torch.equal(cached, before)
    beams = model.generate(prompt, num_beams=2, **how)
    fold_(model)
    assert torch.equal(model.generate(prompt, **how), cached) and torch.equal(
        model.generate(prompt, num_beams=2, **how), beams
    )


def test_what_transformers_asks_of_its_modules(device):
    """What it does with the class of a module, and with weights that are tied, on a model in which everything has seeds."""
    model = gpt2().eval().to(device)
    y = logits(model)
    seeds = graft_(model, "*", table=False)
    assert list(seeds.layers)[0] == "transformer.wte" and list(seeds.layers)[-1] == "lm_head"
    assert model.get_input_embeddings() is seeds.layers["transformer.wte"]
    assert model.get_output_embeddings() is seeds.layers["lm_head"]
    model.tie_weights()
    model.set_input_embeddings(model.get_input_embeddings())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(logits(model), y) and model.num_parameters() > 0 and model.dtype == torch.float32

    # Layers have their own class's names nowhere: weights of what they wrap are initialized as before.
    model.apply(model._init_weights)
    assert not torch.equal(logits(model), y) and seeds.states().eq(0).all()
    assert model.transformer.h[0].ln_1.weight.eq(1).all()

    # Named, with the way out: in graft_'s documentation.
    with pytest.raises(TypeError, match="Old embeddings are of type .*KasminaLayer"):
        model.resize_token_embeddings(50)
    ungraft_(model)
    model.resize_token_embeddings(50)
    graft_(model, "*", exclude="lm_head", table=False)
    assert logits(model).shape[-1] == 50 and model.lm_head.weight is model.transformer.wte.weight


def test_save_pretrained_of_a_model_with_seeds(device, tmp_path):
    """A tied head without seeds is saved as ever; with seeds transformers refuses, and save_seeds does not."""
    model = gpt2().eval().to(device)
    seeds = graft_(model, ["*.wte", "*.mlp.*"], chunk_size=4, table=False)
    seeds[:].graft()
    train(model, seeds, -logits(model).detach())
    model.save_pretrained(tmp_path / "grown")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "grown" / "model.safetensors")
    again = gpt2().eval().to(device)
    graft_(again, ["*.wte", "*.mlp.*"], chunk_size=4, table=False)
    missing, unexpected = again.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected and torch.equal(logits(again), logits(model))

    graft_(model, "lm_head", table=False)
    with pytest.raises(RuntimeError, match="shared tensors"):
        model.save_pretrained(tmp_path / "refused")
    assert save_seeds(model, tmp_path / "seeds").stat().st_size > 0


def test_a_class_that_grafts_itself_comes_from_a_file(device, tmp_path):
    """from_pretrained makes the model on the meta device, seeds and all, and fills it."""
    from transformers import GPT2LMHeadModel

    class Grown(GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            graft_(self, "*.mlp.*", chunk_size=4, table=False)
            self.post_init()

    torch.manual_seed(1)
    model = Grown(gpt2().config).eval().to(device)
    seeds = Seeds(model)
    assert seeds[:].graft()
    train(model, seeds, -logits(model).detach())
    model.save_pretrained(tmp_path)
    again, info = Grown.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again.eval().to(device)
    assert torch.equal(logits(again), logits(model))
    train(again, Seeds(again), -logits(again).detach())
    assert not torch.equal(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_training_with_gradient_checkpointing_is_the_same(device):
    losses = []
    for checkpoints in (False, True):
        model, seeds, healthy = grafted("llama", device)
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        seeds[:].graft()
        losses.append(train(model, seeds, healthy, steps=4))
        assert all(layer.telemetry[:, 3].eq(4).all() for layer in seeds)  # each forward once
    assert math.isclose(losses[0][1], losses[1][1], rel_tol=1e-5) and losses[0][1] < losses[0][0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_beside_adapters_of_peft(device):
    """Seeds for what an adapter wraps: the adapter finds its weight as before, and is frozen as all the rest is."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(llama().eval(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.to(device)
    y = logits(model)
    was = {name: p.requires_grad for name, p in model.named_parameters()}
    seeds = graft_(model, "*.q_proj", chunk_size=4, table=False)
    assert list(seeds.layers) == [f"base_model.model.model.layers.{i}.self_attn.q_proj.base_layer" for i in (0, 1)]
    assert seeds["*.1.self_attn.q_proj"].ids.tolist() == [4, 5, 6, 7]
    assert seeds[:].graft() and torch.equal(logits(model), y)
    first, last = train(model, seeds, 2 * y.detach(), steps=5)
    assert last < first
    ungraft_(model)
    assert torch.equal(logits(model), y) and {n: p.requires_grad for n, p in model.named_parameters()} == was


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def test_a_pruned_resnet_is_repaired_by_its_norms(device):
    """What it is for: half of the weights gone, and a few scales and shifts bring most of the answers back."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), Residual(12), Residual(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    ).to(device)
    x = torch.randn(96, 3, 8, 8, device=device)
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(x)
    model.eval()
    target = model(x).detach()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[module.weight.abs() < module.weight.abs().median()] = 0
    seeds = graft_(model, "*norm?", chunk_size=4, table=False)
    seeds[:].graft()
    damage = F.mse_loss(model(x), target).item()
    optimizer = torch.optim.Adam(param_groups(model, lr=0.03))
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
    assert loss < 0.25 * damage
    assert sum(row["parameters"] for row in seeds.table().values()) == 4 * 2 * 12
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(fold_(model)(x), y, rtol=1e-4, atol=1e-4)
