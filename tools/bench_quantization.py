"""int8 against float on each runtime, beside the runtime's own recipe followed by hand.

    python tools/bench_quantization.py                    three nets, both runtimes, 1 and 2 threads
    python tools/bench_quantization.py --models resnet18 --targets onnxruntime --threads 1

Random weights and random calibration data: this is about speed alone, and no accuracy is meant.
Float, edgekit's int8 and the recipe by hand run in turn, a burst each, round after round; ratios
are taken within a round. Every thread count has its own process, since the thread pools of torch
and ExecuTorch are one for a process. ``gate`` is what ``edgekit export`` would say of the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import edgekit
from edgekit import host
from edgekit.artifact import Artifact
from edgekit.calibration import Calibration, checked_calibration
from edgekit.contract import Backend
from edgekit.errors import EdgekitError
from edgekit.graph import quiet
from edgekit.making import Captures, lowered
from edgekit.model import Model
from edgekit.planning import plan
from edgekit.recipe import FP32, INT8
from edgekit.render import table
from edgekit.source import resolve
from edgekit.spec import TensorSpec
from edgekit.speed import AGREEING, LEAST_GAIN, burst

MODELS = ("partialnet-t0", "fasternet-t0", "resnet18")
TARGETS = ("onnxruntime", "executorch")
BURST_SECONDS = 0.3
SAMPLES = 16


class _Block(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        same = inside == outside and stride == 1
        self.around = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.around(x))


class ResNet18(nn.Module):
    """The plan of a ResNet-18: 11.7 M parameters, 1.8 G MACs at 224x224."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        widths = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))
        blocks, inside = [], 64
        for outside, stride in widths:
            blocks.append(_Block(inside, outside, stride))
            inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.pool(torch.relu(self.norm(self.stem(images)))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def model_called(name: str) -> Model:
    """A net of the table, with batch norms that have seen data."""
    if name != "resnet18":
        return resolve(name)
    torch.manual_seed(0)
    network = ResNet18().train()
    with torch.no_grad():
        for _ in range(4):
            network(torch.randn(4, 3, 224, 224))
    spec = TensorSpec("images", (1, 3, 224, 224), "float32")
    return resolve(Model(network.eval(), (spec,), name=name))


def random_data(model: Model) -> Calibration:
    """Seeded normal inputs: their ranges are no one's, and serve to time kernels."""
    generator = np.random.default_rng(0)
    (spec,) = model.inputs
    samples = [
        {spec.name: generator.standard_normal(spec.sizes()).astype(np.float32)}
        for _ in range(SAMPLES)
    ]
    return checked_calibration(samples, "random, seed 0")


def onnxruntime_by_hand(model: Model, data: Calibration, activations: str) -> bytes:
    """As onnxruntime.ai's page on static quantization says, per channel for convolutions.

    Its first choice is int8 for activations too, the default; uint8 is faster on x86.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            self._samples = iter(data.samples)

        def get_next(self) -> Any:
            return next(self._samples, None)

    (spec,) = model.inputs
    with tempfile.TemporaryDirectory() as folder, quiet():
        plain, prepared, done = (str(Path(folder) / f"{name}.onnx") for name in "abc")
        example = (torch.from_numpy(np.asarray(data.samples[0][spec.name])),)
        torch.onnx.export(
            model.module, example, plain, dynamo=True, input_names=[spec.name], external_data=False
        )
        quant_pre_process(plain, prepared)
        quantize_static(
            prepared,
            done,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if activations == "uint8" else QuantType.QInt8,
        )
        return Path(done).read_bytes()


def executorch_by_hand(model: Model, data: Calibration, activations: str) -> bytes:
    """As ExecuTorch's page on the XNNPACK backend says, whose activations are int8."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    (spec,) = model.inputs
    inputs = [(torch.from_numpy(np.asarray(sample[spec.name])),) for sample in data.samples]
    with quiet():
        quantizer = XNNPACKQuantizer().set_global(
            get_symmetric_quantization_config(is_per_channel=True)
        )
        prepared = prepare_pt2e(torch.export.export(model.module, inputs[0]).module(), quantizer)
        for each in inputs:
            prepared(*each)
        exported = torch.export.export(convert_pt2e(prepared), inputs[0])
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        return bytes(edge.to_executorch().buffer)


BY_HAND = {"onnxruntime": onnxruntime_by_hand, "executorch": executorch_by_hand}


def artifacts(model: Model, adapter: Backend, activations: str) -> dict[str, Artifact | str]:
    """Float, edgekit's int8, and the recipe by hand; a text says why one is not there."""
    data = random_data(model)
    captures = Captures(model, calibration=data)
    (int8,) = plan([adapter.name], "int8")
    found: dict[str, Artifact | str] = {}
    for recipe in (FP32, int8.recipe):
        program = captures.program(adapter, recipe)
        found["int8" if recipe.quantized else "float"] = lowered(adapter, recipe, program)
    plain = found["float"]
    assert isinstance(plain, Artifact)
    try:
        content = BY_HAND[adapter.name](model, data, activations)
        files = {plain.main: content}
        found["by hand"] = Artifact(
            adapter.name, INT8, plain.main, files, plain.inputs, plain.outputs
        )
    except Exception as cause:  # a recipe followed by hand may fail in any way
        found["by hand"] = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
    return found


def measure(asked: argparse.Namespace, threads: int) -> dict[str, dict[str, list[float] | str]]:
    """Medians of each variant, round by round, under ``model | target``; or why there are none."""
    torch.set_num_threads(threads)
    found: dict[str, dict[str, list[float] | str]] = {}
    for name in asked.models.split(","):
        model = model_called(name)
        for target in asked.targets.split(","):
            print(f"{threads} threads: {name} on {target}", file=sys.stderr)
            adapter = edgekit.backend(target)
            made = artifacts(model, adapter, asked.activations)
            found[f"{name} | {target}"] = _race(model, adapter, made, threads, asked.rounds)
    return found


def _race(
    model: Model, adapter: Backend, made: Mapping[str, Artifact | str], threads: int, rounds: int
) -> dict[str, list[float] | str]:
    with ExitStack() as stack:
        runs: dict[str, Callable[[], object]] = {}
        times: dict[str, list[float] | str] = {}
        for label, artifact in made.items():
            try:
                if isinstance(artifact, str):
                    raise edgekit.UsageError(artifact)
                session = stack.enter_context(adapter.open(artifact, threads=threads))
                run: Callable[[], object] = partial(session.run, model.samples[0])
                run()
                runs[label], times[label] = run, []
            except EdgekitError as cause:
                times[label] = str(cause)
        for _ in range(rounds):
            for label, run in runs.items():
                listed = times[label]
                assert isinstance(listed, list)
                listed.append(burst(run, BURST_SECONDS))
    return times


def _ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, str, float]:
    """How often faster ``second`` is: median, text with the spread, share of rounds it won."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    middle = statistics.median(ratios)
    won = sum(ratio > 1 for ratio in ratios) / len(ratios)
    return middle, f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", won


def row(title: str, threads: int, times: Mapping[str, Any]) -> tuple[object, ...]:
    """One line of the table."""
    plain, ours, hand = times["float"], times["int8"], times["by hand"]
    ratio, text, won = _ratio(plain, ours)
    pays = "pays" if ratio > LEAST_GAIN and won >= AGREEING else "refuses"
    shown = (f"{statistics.median(each):.2f} ms" for each in (plain, ours))
    if isinstance(hand, str):
        return (*title.split(" | "), threads, *shown, text, pays, hand[:60], "-")
    _, by_hand, _ = _ratio(plain, hand)
    _, against, _ = _ratio(hand, ours)
    return (*title.split(" | "), threads, *shown, text, pays, by_hand, against)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each thread count in its own process, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--activations", choices=("int8", "uint8"), default="int8", help="of the recipe by hand"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        print(json.dumps(measure(asked, int(asked.threads))))
        return 0
    rows = []
    for threads in asked.threads.split(","):
        words = ["--child", "--models", asked.models, "--targets", asked.targets]
        words += ["--threads", threads, "--rounds", str(asked.rounds)]
        words += ["--activations", asked.activations]
        done = subprocess.run(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True
        )
        measured = json.loads(done.stdout.splitlines()[-1])
        rows += [row(title, int(threads), times) for title, times in measured.items()]
    machine = host.describe()
    print(f"{machine['processor']}, {machine['cores']} cores: {' '.join(machine['features'])}\n")  # type: ignore[arg-type]
    header = ("model", "runtime", "threads", "float", "int8", "int8 against float", "gate")
    print(table((*header, "by hand against float", "int8 against by hand"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
