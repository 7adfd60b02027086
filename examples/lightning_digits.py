"""Growing under Lightning: a classifier whose sensors have drifted.

A digit classifier is trained; then every pixel gets a gain of its own, as an ageing camera's might, and accuracy falls.
Nothing is retrained: ``graft_`` freezes the network and gives it seeds, and ``GrowthCallback`` grows them while a Lightning
Trainer fits a module that knows nothing of them. Seeds are judged after each validation; what is in the checkpoint goes
on where it stopped; TensorBoard shows what became of the seeds.

    python examples/lightning_digits.py   # half a minute on two cores
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kasmina_ext import graft_, param_groups
from kasmina_ext.integrations.lightning import GrowthCallback
from kasmina_ext.sinks import TensorBoardSink


class Classifier(lightning.LightningModule):
    """What anybody would write, but for ``param_groups``, which keeps weight decay from seeds."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(param_groups(self, lr=self.lr))


def loaders(gains: Tensor | None = None) -> tuple[DataLoader, DataLoader, DataLoader]:
    """To train on, to judge seeds by, and to test with."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    x = x if gains is None else x * gains
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split([900, 400, 497])
    sets = [TensorDataset(x[part], y[part]) for part in order]
    shuffled = torch.Generator().manual_seed(0)
    return DataLoader(sets[0], 60, shuffle=True, generator=shuffled), DataLoader(sets[1], 40), DataLoader(sets[2], 497)


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """By which seeds are judged: one loss for each image."""
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def accuracy(module: nn.Module, loader: DataLoader) -> float:
    [(x, y)] = loader
    with torch.no_grad():
        return 100 * (module.eval()(x).argmax(1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60, help="of growth")
    parser.add_argument("--folder", type=Path, default=None, help="for checkpoints and TensorBoard")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kasmina_lightning_"))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}

    torch.set_num_threads(1)  # for so small a network more would only wait for each other
    torch.manual_seed(0)
    module = Classifier(lr=3e-3)
    train, held_out, test = loaders()
    lightning.Trainer(max_epochs=30, enable_checkpointing=False, **quiet).fit(module, train)
    healthy = accuracy(module, test)

    gains = torch.randn(64).mul(0.8).exp()
    train, held_out, test = loaders(gains)
    damaged = accuracy(module, test)

    seeds = graft_(module, "layers.*", chunk_size=4, exclude="layers.4")
    module.lr = 0.02
    grow = GrowthCallback(
        loss_fn=loss_fn,
        budget=0.75,
        tick_every=max(1, 15 * options.epochs // 60),
        watch=2,
        sinks=[TensorBoardSink(folder / "runs")],
    )
    checkpoints = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        check_val_every_n_epoch=max(1, options.epochs // 3),
        callbacks=[grow, checkpoints],
        **quiet,
    )
    trainer.fit(module, train, held_out)
    print(grow.evaluation)
    repaired = accuracy(module, test)
    saved = torch.load(folder / "last.ckpt", weights_only=True)["callbacks"][grow.state_key]["controller"]

    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    print(f"test images: healthy {healthy:.1f} %, drifted {damaged:.1f} %, repaired {repaired:.1f} %")
    print(f"gained:   {repaired - damaged:+.1f} points, with at most {trained} parameters of {len(seeds)} seeds")
    print(f"saved:    the controller at step {saved['steps']} of {grow.controller.steps}, in {folder / 'last.ckpt'}")
    print(f"look:     tensorboard --logdir {folder / 'runs'}")


if __name__ == "__main__":
    main()
