"""Nets built to break under int8: refused by name, repaired by the remedy that the refusal prints.

What breaks, and why: one channel a thousand times louder than the others takes all the codes of
its tensor; a gate near zero is a few codes above nothing; a softmax over large logits hears their
small differences, of which codes for the large sums leave little.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgekit
from edgekit.calibration import checked_calibration
from edgekit.contract import Backend
from edgekit.errors import DoesNotPay
from edgekit.gate import Budget
from edgekit.model import Model
from edgekit.planning import Quantization
from edgekit.spec import TensorSpec

WIDTH = 48
INPUTS = (TensorSpec("images", (1, 3, 16, 16), "float32"),)


def _conv(inside: int, outside: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, padding=kernel // 2)


class LoudChannel(nn.Module):
    """``loud`` makes one channel 1000 times larger, and ``hear`` takes it 1000 times smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loud, self.hear = _conv(3, WIDTH), _conv(WIDTH, WIDTH), _conv(WIDTH, WIDTH)
        self.body, self.head = _conv(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        with torch.no_grad():
            self.loud.weight[7] *= 1000
            self.hear.weight[:, 7] /= 1000

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.loud(torch.relu(self.stem(images))))
        x = torch.relu(self.body(torch.relu(self.hear(x))))
        scores: Tensor = self.head(x.mean((2, 3), keepdim=True).flatten(1))
        return scores


class ClosedGate(nn.Module):
    """Half of the channels pass a sigmoid that is nearly shut, and count as much as the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = _conv(3, WIDTH), _conv(WIDTH, WIDTH)
        self.gate, self.after = _conv(WIDTH, WIDTH, 1), _conv(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)
        with torch.no_grad():
            shut = torch.arange(WIDTH) % 2 == 0
            self.gate.bias = nn.Parameter(torch.where(shut, -8.0, 4.0))
            self.after.weight[:, shut] *= 2000

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(images))))
        x = torch.relu(self.after(x * torch.sigmoid(self.gate(x))))
        scores: Tensor = self.head(x.mean((2, 3), keepdim=True).flatten(1))
        return scores


class SharpSoftmax(nn.Module):
    """Channels weighed by a softmax of logits that are hundreds, alike but for what decides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = _conv(3, WIDTH), _conv(WIDTH, WIDTH)
        self.wide, self.logits = nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH)
        self.head = nn.Linear(WIDTH, 10)
        with torch.no_grad():
            # A common row moves every logit alike, which a softmax does not hear.
            self.logits.weight.copy_(700 * torch.randn(1, 256) + 4 * torch.randn(WIDTH, 256))

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(images))))
        x = x.mean((2, 3), keepdim=True).flatten(1)
        scores: Tensor = self.head(x * torch.softmax(self.logits(torch.relu(self.wide(x))), -1))
        return scores


BROKEN = {"channel": LoudChannel, "gate": ClosedGate, "softmax": SharpSoftmax}


def make(kind: str) -> Model:
    """The net, seeded, with random samples to prove on."""
    torch.manual_seed(0)
    return Model(BROKEN[kind]().eval(), INPUTS, name=kind)


def settings(keep_float: tuple[str, ...] = (), method: str | None = None) -> Quantization:
    """Calibrated on 32 random inputs; size decides, since such small nets have no speed."""
    generator = np.random.default_rng(1)
    samples = [
        {"images": generator.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(32)
    ]
    data = checked_calibration(samples, "random, seed 1")
    return Quantization(
        calibration=data, budget=Budget(prefer="size"), keep_float=keep_float, method=method
    )


GUILTY = {"channel": "loud", "gate": "after", "softmax": "logits"}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_net_built_to_break_is_refused_by_name_with_a_remedy_that_was_tried(
    backend: Backend, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(DoesNotPay) as refusal:
        edgekit.export(
            make(kind),
            targets=[backend],
            precision="int8",
            out=tmp_path / "b",
            quantization=settings(),
        )
    said = str(refusal.value)
    assert re.search(r"the outputs are -?[\d.]+ dB from the float model's, the budget is 20", said)
    assert f"'{GUILTY[kind]}' (" in said.partition("Remedy")[0]
    tried = re.search(r"Remedy: --\S+ \S+.* \(tried: ([\d.]+) dB", said)
    assert tried is not None
    assert float(tried[1]) >= Budget().min_sqnr_db
    assert list(tmp_path.iterdir()) == []


def test_following_the_printed_remedy_gives_a_bundle(tmp_path: Path) -> None:
    model = make("softmax")
    with pytest.raises(DoesNotPay) as refusal:
        edgekit.export(
            model,
            targets=["onnxruntime"],
            precision="int8",
            out=tmp_path / "b",
            quantization=settings(),
        )
    keep = re.search(r"Remedy: --keep-float (\S+)", str(refusal.value))
    assert keep is not None
    bundle = edgekit.export(
        replace(model),
        targets=["onnxruntime"],
        precision="int8",
        out=tmp_path / "b",
        quantization=settings(tuple(keep[1].split(","))),
    )
    assert bundle.proof("onnxruntime-int8").passed
    assert bundle.artifact("onnxruntime-int8").recipe.keep_float == tuple(keep[1].split(","))
    (tried,) = bundle.tried()
    assert tried.verdict == "kept"
