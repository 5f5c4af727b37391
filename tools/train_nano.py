"""Trains partialnet-nano on Fashion-MNIST and writes its weights as safetensors.

Run from the repository root:  python tools/train_nano.py

Two CPU cores need about 20 minutes. The result depends on the seed, the options and the version
of PyTorch only. The test images are read once, after the last step, for the last line.

B batch   N images of a split
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit_zoo.fashion_mnist import FOLDER, MEAN, PADDING, SIDE, STD, prepare, read
from edgekit_zoo.partialnet import VARIANTS, PartialNet

WEIGHTS = Path(__file__).parents[1] / "models/edgekit_zoo/weights/partialnet_nano.safetensors"
WARMUP = 0.1  # of all steps
SHIFT = 2  # pixels, each way
ERASED = (4, 12)  # sides of the erased rectangle in pixels, at least and less than
AVERAGE_DECAY = 0.998  # of the averaged weights, per step


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Trains partialnet-nano on Fashion-MNIST.")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder with the IDX files")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="file to write")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.05, help="weight decay")
    parser.add_argument("--erase", type=float, default=0.25, help="chance that an image is erased")
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--holdout",
        type=int,
        default=0,
        help="judge on the last so many training images, untrained; write nothing, leave the test",
    )
    parser.add_argument("--limit", type=int, help="first so many training images, for a quick try")
    return parser.parse_args(arguments)


def augment(images: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """Return float32 (B, 1, 32, 32) of uint8 (B, 28, 28): shifted, flipped, scaled, erased."""
    count, side = len(images), SIDE + 2 * PADDING
    wide = F.pad(images, [PADDING + SHIFT] * 4)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(side), left + torch.arange(side)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    moved = wide[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    scaled = (moved[:, None].to(torch.float32) / 255 - MEAN) / STD
    return scaled.masked_fill(rectangles(count, side, chance, generator)[:, None], 0.0)


def rectangles(count: int, side: int, chance: float, generator: torch.Generator) -> Tensor:
    """Return bool (B, side, side), True in one rectangle of each chosen image."""
    centre = torch.randint(0, side, (2, count, 1), generator=generator)
    half = torch.randint(*ERASED, (2, count, 1), generator=generator) / 2
    inside = (torch.arange(side) - centre).abs() < half  # (2, B, side): rows, columns
    chosen = torch.rand(count, 1, 1, generator=generator) < chance
    return inside[0][:, :, None] & inside[1][:, None, :] & chosen


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of one epoch's whole batches, shuffled; the last images are left out."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def optimizer_for(model: PartialNet, decay: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and kernels; norms, biases and tables are free."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_free = parameter.ndim < 2 or name.endswith("bias_table")
        (free if is_free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, foreach=True)


class Average:
    """A copy of a model that follows its weights and statistics slowly."""

    def __init__(self, model: PartialNet) -> None:
        self.model = deepcopy(model).eval()
        self.steps = 0
        kept, live = self.model.state_dict().values(), model.state_dict().values()
        pairs = [(old, new) for old, new in zip(kept, live, strict=True) if old.ndim]
        self.kept, self.live = [old for old, _ in pairs], [new for _, new in pairs]

    def follow(self) -> None:
        """Move towards the model as it is now; early steps move more."""
        self.steps += 1
        decay = min(AVERAGE_DECAY, self.steps / (10 + self.steps))
        torch._foreach_lerp_(self.kept, self.live, 1 - decay)


def accuracy(model: PartialNet, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> float:
    """Return the share of uint8 images (N, 28, 28) whose highest score is their label."""
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(labels), 500):
            part = slice(start, start + 500)
            scores = model(torch.from_numpy(prepare(images[part])))
            right += int((scores.argmax(1).numpy() == labels[part]).sum())
    return right / len(labels)


def train(
    settings: argparse.Namespace, images: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> PartialNet:
    """Return the averaged model after all epochs over uint8 images (N, 28, 28) and labels (N,)."""
    generator = torch.Generator().manual_seed(settings.seed)
    pixels, classes = torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))
    config = replace(VARIANTS["partialnet-nano"], drop_path=settings.drop_path)
    model = PartialNet(config)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(model)
    optimizer = optimizer_for(model, settings.decay)
    steps = len(labels) // settings.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.rate,
        total_steps=settings.epochs * steps,
        pct_start=WARMUP,
        cycle_momentum=False,
    )
    begin = time.monotonic()
    for epoch in range(settings.epochs):
        model.train()
        total = torch.zeros(())
        for chosen in batches(len(labels), settings.batch, generator):
            inputs = augment(pixels[chosen], settings.erase, generator)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(inputs), classes[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            average.follow()
            total += loss.detach()
        seconds = time.monotonic() - begin
        print(f"epoch {epoch + 1} loss {total.item() / steps:.4f} at {seconds:.0f} s", flush=True)
    return average.model


def write(model: PartialNet, path: Path) -> None:
    """Write the state dict beside ``path`` and rename, so that no half file is ever there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    # One entry: the library writes several in any order, and equal runs would differ in bytes.
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, beside, metadata={"format": "pt"})
    beside.chmod(0o644)  # the library makes files that only their owner can read
    os.replace(beside, path)


def prepare_torch(settings: argparse.Namespace) -> None:
    """Seed, limit the threads, and refuse operations whose result may vary."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    # On by default with the line above: every new tensor would be filled with NaN first, at a
    # cost. Nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, judge once, write, and print one line that says it all."""
    settings = options(arguments)
    prepare_torch(settings)
    images, labels = read(settings.data, "train")
    images, labels = images[: settings.limit], labels[: settings.limit]
    kept = len(labels) - settings.holdout
    wall, cpu = time.monotonic(), time.process_time()
    model = train(settings, images[:kept], labels[:kept])
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    if settings.holdout:
        name, judged = "hold-out", (images[kept:], labels[kept:])
    else:
        write(model, settings.output)
        name, judged = "test", read(settings.data, "test")
    top1 = 100 * accuracy(model, *judged)
    print(
        f"seed {settings.seed}, {settings.epochs} epochs of {kept} images, wall {wall:.0f} s, "
        f"cpu {cpu:.0f} s, torch {torch.__version__}, "
        f"top-1 {top1:.2f} % on {len(judged[1])} {name} images"
    )


if __name__ == "__main__":
    main()
