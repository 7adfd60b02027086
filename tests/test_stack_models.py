"""Whole models, grown while they are trained by the frameworks that people train with; compiled too, saved, and generating."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from models import TASKS, Size, check_lives, gpt2, grow_, live, needs, sentences
from pytest import mark, param
from threads import one_thread
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kasmina_ext import ExtendedLifecycle, KasminaLayer, TritonChunkedKasminaLayer, param_groups

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning's own
STEPS = 200
SIZE = Size()
# On the CPU inductor would only add the minutes of its compiler; with it the operators run as they are on a GPU.
BACKENDS = {"cpu": "aot_eager", "cuda": "inductor"}


@pytest.fixture(autouse=True)
def _environment(request, monkeypatch) -> Iterator[None]:
    """Trainer and accelerate hand settings to each other in environment variables: none must outlive a test."""
    for row in request.node.iter_markers("stack"):
        needs(*row.kwargs["uses"])
    with one_thread(), mock.patch.dict(os.environ):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        yield


class Run:
    """A model that was trained, and how it went."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.task, self.device = TASKS[kind], device
        torch.manual_seed(0)
        self.model = self.task.make(SIZE)
        self.layers = grow_(self.model, *self.task.names)
        self.samples = self.task.samples(SIZE, STEPS * SIZE.batch)
        self.losses: list[Tensor] = []
        self.graphs: list[int] = []
        """Compiled so far, after each step."""

    @property
    def curve(self) -> Tensor:
        return torch.stack(self.losses).float().cpu()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(param_groups(self.model, lr=self.task.rate))

    def after_step(self, step: int) -> None:
        assert {layer.device.type for layer in self.layers} == {self.device.type}
        live(self.layers, step)
        self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    def check(self) -> None:
        assert len(self.losses) == STEPS
        first, last = self.curve[:5].mean(), self.curve[-5:].mean()
        assert last < 0.3 * first, (first, last)
        check_lives(self.layers, STEPS)


def with_trainer(run: Run, folder: Path, compiled: bool = False, **arguments) -> None:
    """transformers.Trainer; bfloat16 autocast on a GPU."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Lives(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            run.after_step(state.global_step)

    class Recording(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            run.losses.append(loss.detach())
            return loss

    on_gpu = run.device.type == "cuda"
    settings = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": SIZE.batch,
            "use_cpu": not on_gpu,
            "bf16": on_gpu,
            "torch_compile": compiled,
            "torch_compile_backend": BACKENDS[run.device.type] if compiled else None,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | arguments
    )
    settings._n_gpu = min(settings.n_gpu, 1)  # not nn.DataParallel, where there are two
    optimizers = (run.optimizer(), None)
    trainer = Recording(run.model, settings, train_dataset=run.samples, optimizers=optimizers, callbacks=[Lives()])
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))


def with_lightning(run: Run, folder: Path, compiled: bool = False) -> None:
    """lightning.pytorch; bfloat16 autocast on a GPU."""
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.model
            self.called = torch.compile(run.model, backend=BACKENDS[run.device.type]) if compiled else run.model

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            loss = self.called(**batch)["loss"]
            run.losses.append(loss.detach())
            return loss

        def on_train_batch_end(self, outputs, batch, number: int) -> None:
            run.after_step(number + 1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return run.optimizer()

    on_gpu = run.device.type == "cuda"
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if on_gpu else "32-true",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(run.samples, SIZE.batch))
    run.model.to(run.device)  # Lightning has moved it to the CPU


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[..., Run]:
    """Trains once whatever several tests look at."""
    runs: dict[tuple, Run] = {}

    def get(kind: str, framework: str, device: torch.device, compiled: bool = False) -> Run:
        key = (kind, framework, device.type, compiled)
        if key not in runs:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            run = Run(kind, device)
            train = with_trainer if framework == "Trainer" else with_lightning
            train(run, tmp_path_factory.mktemp("run"), compiled)
            runs[key] = run
        return runs[key]

    return get


# ---- training ----------------------------------------------------------------------------------------


HUGGING_FACE, LIGHTNING = ("transformers", "accelerate"), ("transformers", "lightning")
RUNS = [
    param("GPT-2", "Trainer", marks=mark.stack("models: GPT-2 under transformers.Trainer", uses=HUGGING_FACE)),
    param("Llama", "Trainer", marks=mark.stack("models: Llama under transformers.Trainer", uses=HUGGING_FACE)),
    param(
        "ResNet",
        "Trainer",
        marks=mark.stack("models: ResNet-like network under transformers.Trainer", uses=HUGGING_FACE),
    ),
    param("GPT-2", "Lightning", marks=mark.stack("models: GPT-2 under Lightning", uses=LIGHTNING)),
    param("Llama", "Lightning", marks=mark.stack("models: Llama under Lightning", uses=LIGHTNING)),
    param("ResNet", "Lightning", marks=mark.stack("models: ResNet-like network under Lightning", uses=LIGHTNING[1:])),
]


@pytest.mark.parametrize("kind, framework", RUNS)
def test_training(trained, device, kind, framework):
    trained(kind, framework, device).check()


WITH = "backend aot_eager on the CPU, inductor on CUDA, there in bfloat16"
COMPILED = [
    param(
        "GPT-2",
        "Trainer",
        marks=mark.stack("models: compiled and eager loss curves agree, GPT-2", uses=HUGGING_FACE, note=WITH),
    ),
    param(
        "Llama",
        "Lightning",
        marks=mark.stack("models: compiled and eager loss curves agree, Llama", uses=LIGHTNING, note=WITH),
    ),
    param(
        "ResNet",
        "Lightning",
        marks=mark.stack(
            "models: compiled and eager loss curves agree, ResNet-like network", uses=LIGHTNING[1:], note=WITH
        ),
    ),
]


@pytest.mark.parametrize("kind, framework", COMPILED)
def test_compiled(trained, device, kind, framework):
    eager, compiled = trained(kind, framework, device), trained(kind, framework, device, compiled=True)
    compiled.check()
    assert compiled.graphs[0] > 0 and set(compiled.graphs) == {compiled.graphs[0]}, "one graph for all states"
    apart = (eager.curve - compiled.curve).abs()
    # bfloat16 rounds at 2^-9, and what is rounded differently is trained on.
    start, all_along = (1e-2, 3e-2) if device.type == "cuda" else (1e-5, 1e-3)
    scale = eager.curve[0]
    assert apart[:10].max() < start * scale and apart.mean() < all_along * scale, (apart[:10], apart.mean())


# ---- afterwards --------------------------------------------------------------------------------------


@pytest.mark.stack("models: generation with a KV cache after training", uses=("transformers", "lightning"))
@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_generation(trained, device, kind):
    """The cache changes no token, and the model says what it was taught."""
    run = trained(kind, "Lightning", device)
    model = run.model.eval()
    lesson = sentences(8, SIZE.length).to(device)
    prompt = lesson[:, :4]
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": SIZE.length - 4}
    cached, plain = (model.generate(prompt, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, plain)
    assert (cached == lesson).float().mean() > 0.95
    with torch.no_grad():
        wanted = model(lesson).logits
        step = model(lesson[:, :9], use_cache=True)
        for position in range(9, SIZE.length):
            token = lesson[:, position : position + 1]
            step = model(token, past_key_values=step.past_key_values, use_cache=True)
            torch.testing.assert_close(step.logits[:, 0], wanted[:, position], rtol=1e-4, atol=1e-4)
        for layer in run.layers:
            layer.set_alpha(None, 0.0)
        assert (model(lesson).logits - wanted).abs().max() > 0.01, "seeds had no part in it"
        for layer in run.layers:
            layer.set_alpha(None, 1.0)


# ---- saved and loaded --------------------------------------------------------------------------------


def grown_gpt2() -> type[nn.Module]:
    """What a user writes so that from_pretrained makes the layers before it fills them.

    Weights that are tied and wrapped have to be named anew; for others the first three lines do.
    """
    from transformers import GPT2LMHeadModel

    class GrownGPT2(GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            grow_(self, "mlp.c_fc", "ln_f", "wte", "lm_head")
            self._tied_weights_keys = {"lm_head.base_layer.weight": "transformer.wte.base_layer.weight"}
            self.post_init()

    return GrownGPT2


@pytest.mark.stack("models: save_pretrained and from_pretrained", uses=("transformers", "safetensors"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_pretrained_and_from_pretrained(device, tmp_path, dtype):
    """Everything comes back with its bits; a model that is loaded in bfloat16 has its bank and buffers unrounded."""
    kind = grown_gpt2()
    model = kind(gpt2(SIZE).config).to(device)
    layers = [module for module in model.modules() if isinstance(module, KasminaLayer)]
    tokens = sentences(4, SIZE.length).to(device)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    for step in range(15, 45):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens)).loss.backward()
        optimizer.step()
        live(layers, step)
    assert layers[0].lifecycle_states.eq(int(ExtendedLifecycle.GRAFTING)).all()
    layers[0].telemetry[:, 0] += 2**40 + 1
    model.eval().save_pretrained(tmp_path)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again, info = kind.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert again.lm_head.base_layer.weight is again.transformer.wte.base_layer.weight
    again.to(device)
    buffers = {name for name, _ in again.named_buffers()}
    for name, tensor in again.state_dict().items():
        kept = name in buffers or name.endswith("blueprint_weights")
        assert tensor.dtype == (saved[name].dtype if kept else dtype), name
        assert torch.equal(tensor, saved[name].to(tensor.dtype)), name
    if dtype == torch.float32:
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again(tokens).logits.dtype == dtype
    again.transformer.wte.step_lifecycle()
    assert again.transformer.wte.request_state_transition(0, "stabilization")


@pytest.mark.stack("models: save_pretrained and from_pretrained", uses=("transformers", "safetensors"))
def test_a_wrapped_embedding_with_a_plain_head(device, tmp_path):
    """transformers finds the embedding's weight through the layer: nothing has to be named anew."""
    from transformers import GPT2LMHeadModel

    class Grown(GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            grow_(self, "wte")
            self.post_init()

    model = Grown(gpt2(SIZE).config).eval().to(device)
    model.save_pretrained(tmp_path)
    again = Grown.from_pretrained(tmp_path).to(device)
    assert again.lm_head.weight is again.transformer.wte.weight
    tokens = sentences(4, SIZE.length).to(device)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.stack("models: save_pretrained and from_pretrained", uses=("transformers",))
def test_wrapping_what_was_loaded(device, tmp_path):
    """The other way: a plain checkpoint is loaded, then wrapped; the grown weights come from a state_dict."""
    needs("transformers", "safetensors")
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    plain = gpt2(SIZE).eval()
    plain.save_pretrained(tmp_path / "plain")
    tokens = sentences(4, SIZE.length).to(device)

    def load() -> tuple[nn.Module, list[TritonChunkedKasminaLayer]]:
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "plain").eval().to(device)
        return model, grow_(model, "mlp.c_fc", "ln_f")

    model, layers = load()
    assert torch.equal(model(tokens).logits, plain.to(device)(tokens).logits)
    for layer in layers:
        layer.request_state_transition(3, "germinated", {"keep_blueprint": True})
        layer.request_state_transition(3, "training")
        layer.request_state_transition(3, "grafting")
        layer.set_alpha(3, 0.5)
    model.save_pretrained(tmp_path / "grown")
    again, _ = load()
    missing, unexpected = again.load_state_dict(load_file(tmp_path / "grown/model.safetensors"), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # which is tied
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert not torch.equal(again(tokens).logits, plain(tokens).logits)


@pytest.mark.stack("models: GPT-2 under transformers.Trainer", uses=("transformers", "accelerate"))
def test_resuming_from_a_checkpoint_of_trainer(device, tmp_path):
    """In the middle of the seeds' grafting: the second half goes on as if there had been no stop."""
    half = {"max_steps": 60, "save_strategy": "steps", "save_steps": 45}
    whole, second = Run("GPT-2", device), Run("GPT-2", device)
    with_trainer(whole, tmp_path, **half)
    with_trainer(second, tmp_path, **half, resume_from_checkpoint=str(tmp_path / "checkpoint-45"))
    assert len(second.curve) == 15
    # Attention's backward on a GPU adds in any order, and bfloat16 shows it.
    tolerance = {"rtol": 0, "atol": 0} if device.type == "cpu" else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(second.curve, whole.curve[45:], **tolerance)
    for one, two in zip(whole.layers, second.layers, strict=True):
        for name in ("state", "history", "history_count", "alpha"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
        assert torch.equal(one.telemetry[:, 3], two.telemetry[:, 3])


@pytest.mark.stack("models: GPT-2 under transformers.Trainer", uses=("transformers", "accelerate"))
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # renamed by later versions
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_of_trainer(device, tmp_path, reentrant):
    """The same losses, and every batch is counted once."""
    steps = {"max_steps": 4, "gradient_accumulation_steps": 2}
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, checkpointed = Run("GPT-2", device), Run("GPT-2", device)
    with_trainer(plain, tmp_path, **steps)
    with_trainer(checkpointed, tmp_path, **steps, **settings)
    torch.testing.assert_close(checkpointed.curve, plain.curve, rtol=1e-2, atol=1e-3)
    for layer in checkpointed.layers:
        assert layer.telemetry[:, 3].eq(8).all() and layer.grad_telemetry[:, 2].eq(8).all()


def test_what_the_document_shows(tmp_path, monkeypatch):
    """Its code runs, in its order; a plain checkpoint in the class that wraps is put right as it says."""
    needs("transformers", "accelerate")
    text = (Path(__file__).resolve().parent.parent / "docs/models.md").read_text()
    monkeypatch.chdir(tmp_path)
    plain = gpt2(SIZE).eval()
    plain.save_pretrained("plain")
    tokens = sentences(4, SIZE.length)
    names = {"dataset": [{"input_ids": row, "labels": row} for row in tokens]}
    loading, training, again = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(loading, names)
    assert torch.equal(names["model"](tokens).logits, plain(tokens).logits)
    exec(training, names)
    exec(again, names)
    assert torch.equal(names["again"](tokens).logits, names["model"].eval()(tokens).logits)
    assert not torch.equal(names["again"](tokens).logits, plain(tokens).logits)

    mapping = {r"mlp\.c_fc\.(?=weight|bias)": "mlp.c_fc.base_layer."}
    model = names["GrownGPT2"].from_pretrained("plain", key_mapping=mapping)
    for layer in model.modules():
        if isinstance(layer, KasminaLayer):
            layer.reset_parameters()
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
