"""Growing under transformers' Trainer: a pruned language model, repaired while everything that it knew is frozen.

A small GPT-2 learns the Python standard library's sources, character by character, loses 85 % of the weights of its
MLPs, and gets seeds. ``GrowthCallback`` does the rest in a Trainer that knows nothing of seeds: it wakes them, judges them
on the batches that the Trainer evaluates on, writes statistics, and keeps its state in the Trainer's checkpoints. Stopped
in the middle and resumed, the run ends with the same bits.

    python examples/trainer.py            # a minute on two cores
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from kasmina_ext import graft_, param_groups
from kasmina_ext.integrations.transformers import GrowthCallback
from kasmina_ext.sinks import JsonlSink, read_jsonl

LENGTH = 64


class Sources(Dataset):
    """Pieces of LENGTH characters; every tenth is held out."""

    def __init__(self, held_out: bool) -> None:
        folder = Path(sysconfig.get_path("stdlib"))
        text = "".join((folder / name).read_text() for name in ("argparse.py", "inspect.py", "typing.py", "tarfile.py"))
        codes = torch.tensor([min(code, 127) for code in text.encode()])
        pieces = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
        chosen = torch.arange(len(pieces)) % 10 == 0
        self.pieces = pieces[chosen][:64] if held_out else pieces[~chosen]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[number], "labels": self.pieces[number]}


def gpt2() -> GPT2LMHeadModel:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 0, "eos_token_id": None}
    config = GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, **dropout, **tokens)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else transformers says that it takes this one
    return model


def trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, steps: int, callbacks=(), **more
) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=8,
        logging_steps=max(1, steps // 5),
        report_to="none",
        disable_tqdm=True,
        **{"use_cpu": True, "save_strategy": "no", "lr_scheduler_type": "cosine"} | more,
    )
    data = {"train_dataset": Sources(held_out=False), "eval_dataset": Sources(held_out=True)}
    return Trainer(model, arguments, **data, optimizers=(optimizer, None), callbacks=list(callbacks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learn", type=int, default=600, help="steps, before the damage")
    parser.add_argument("--grow", type=int, default=300, help="steps, after it")
    parser.add_argument("--folder", type=Path, default=None, help="for checkpoints and statistics")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kasmina_trainer_"))
    half = options.grow // 2

    torch.set_num_threads(1)  # for so small a model more would only wait for each other
    torch.manual_seed(0)
    model = gpt2()
    learning = trainer(model, torch.optim.AdamW(model.parameters(), lr=3e-3), folder / "learning", options.learn)
    learning.train()
    healthy = learning.evaluate()["eval_loss"]
    with torch.no_grad():
        for block in model.transformer.h:
            for layer in (block.mlp.c_fc, block.mlp.c_proj):
                layer.weight[layer.weight.abs() < layer.weight.abs().flatten().quantile(0.85)] = 0
    damaged = learning.evaluate()["eval_loss"]

    graft_(model, ["*.mlp.c_fc", "*.mlp.c_proj"], chunk_size=8)  # freezes the rest
    again = copy.deepcopy(model)

    def growing(model: nn.Module, statistics: Path) -> tuple[Trainer, GrowthCallback]:
        optimizer = torch.optim.AdamW(param_groups(model, lr=0.02))
        sinks = [JsonlSink(statistics)]
        ticks = {"tick_every": max(1, options.grow // 60), "watch": 2}
        # Culling in larger groups, and by estimates alone, takes a fraction of the time.
        grow = GrowthCallback(budget=0.5, group=0.2, exact=0, **ticks, sinks=sinks, log_every=half)
        often = {"eval_strategy": "steps", "eval_steps": half, "save_strategy": "steps", "save_steps": half}
        often["lr_scheduler_type"] = "constant"
        return trainer(model, optimizer, folder / "growing", 2 * half, [grow], **often), grow

    first, grow = growing(model, folder / "seeds.jsonl")
    first.train()
    one = {name: value.clone() for name, value in model.state_dict().items()}
    print(grow.evaluation)
    repaired = first.evaluate()["eval_loss"]
    second, _ = growing(again, folder / "resumed.jsonl")
    second.train(resume_from_checkpoint=str(folder / "growing" / f"checkpoint-{half}"))
    two = again.state_dict()

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"loss of a held-out character: healthy {healthy:.3f}, damaged {damaged:.3f}, repaired {repaired:.3f}")
    print(f"repaired: {100 * (damaged - repaired) / (damaged - healthy):.0f} % of the damage")
    print(f"trained:  at most {trained:,} of {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    print(f"resumed at step {half}, same bits: {all(torch.equal(one[name], two[name]) for name in one)}")
    print(f"recorded: {sum(1 for _ in read_jsonl(folder / 'seeds.jsonl'))} lines in {folder / 'seeds.jsonl'}")


if __name__ == "__main__":
    main()
