"""Programs to packages: versions, shapes, names, dtypes, refusals, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit import evidence
from edgekit.artifact import Artifact
from edgekit.capture import capture, reference_from
from edgekit.errors import LoweringFailed, UnsupportedModel, UsageError
from edgekit.graph import quiet
from edgekit.program import Program
from edgekit.recipe import FP16, FP32
from edgekit.source import resolve
from edgekit.verify import Proof
from edgekit_coreml import BACKEND, predict_on_mac
from edgekit_coreml.lower import MAIN, WEIGHTS
from edgekit_coreml.package import Package
from edgekit_coreml.session import PREFIX

with quiet():
    import coremltools


@pytest.fixture(autouse=True, scope="module")
def _seeded() -> None:
    torch.manual_seed(0)


def program(module: nn.Module, *inputs: str, **described: Any) -> Program:
    torch.manual_seed(0)
    model = replace(resolve(module, list(inputs)), **described)
    return capture(model, reference_from(model))


def proven(module: nn.Module, *inputs: str, **described: Any) -> tuple[Artifact, Proof]:
    captured = program(module, *inputs, **described)
    artifact = BACKEND.lower(captured, FP32)
    return artifact, edgekit.verify(BACKEND, artifact, captured.reference).require()


def package_of(artifact: Artifact) -> Package:
    return Package.read(
        {
            name.removeprefix(PREFIX): content
            for name, content in artifact.files.items()
            if name.startswith(PREFIX)
        }
    )


class Small(nn.Module):
    """Large enough that its weights lie in their own file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(F.relu(self.conv(x)).mean((2, 3)))
        return scores


def small_program() -> Program:
    torch.manual_seed(0)
    return program(Small(), "x=1x3x6x6", name="small", licence="CC-BY-4.0")


@pytest.fixture(scope="module")
def small() -> Program:
    return small_program()


@pytest.fixture(scope="module")
def lowered(small: Program) -> Artifact:
    return BACKEND.lower(small, FP32)


@pytest.mark.parametrize(("minimum", "version"), [("iOS16", 7), ("iOS17", 8), ("iOS18", 9)])
def test_the_oldest_system_sets_the_specification(
    small: Program, minimum: str, version: int
) -> None:
    backend = BACKEND.with_options({"minimum": minimum})
    artifact = backend.lower(small, FP16)
    assert package_of(artifact).specification_version == version
    assert artifact.provenance["minimum"] == minimum
    assert artifact.provenance["specification"] == version
    edgekit.verify(backend, artifact, small.reference).require()


def test_a_system_that_is_not_known_is_named() -> None:
    with pytest.raises(UsageError, match=r"--coreml-minimum 'iOS12' is not one of iOS16, iOS17"):
        BACKEND.with_options({"minimum": "iOS12"})


def test_the_vendors_own_reader_takes_the_package(lowered: Artifact, tmp_path: Path) -> None:
    for name, content in lowered.files.items():
        assert isinstance(content, bytes)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with quiet():
        model = coremltools.models.MLModel(str(tmp_path / "model.mlpackage"))
    assert model.short_description == "small, exported by edgekit"
    assert model.license == "CC-BY-4.0"
    assert [output.name for output in model.get_spec().description.output] == ["output"]


def test_the_package_says_what_it_is_and_nothing_of_when_or_where(lowered: Artifact) -> None:
    metadata = package_of(lowered).metadata
    assert (metadata.description, metadata.license) == ("small, exported by edgekit", "CC-BY-4.0")
    assert not [key for key in metadata.user_defined if "date" in key]
    manifest = json.loads(_bytes(lowered, f"{PREFIX}Manifest.json"))
    items = {item["name"]: item["path"] for item in manifest["itemInfoEntries"].values()}
    assert items == {
        "model.mlmodel": "com.apple.CoreML/model.mlmodel",
        "weights": "com.apple.CoreML/weights",
    }
    unlicensed = BACKEND.lower(program(nn.ReLU(), "input=1x4"), FP32)
    assert package_of(unlicensed).metadata.license == "not stated"


def _bytes(artifact: Artifact, name: str) -> bytes:
    content = artifact.files[name]
    assert isinstance(content, bytes)
    return content


def test_a_package_without_weights_has_no_file_for_them() -> None:
    artifact, _ = proven(nn.ReLU(), "input=1x4")
    assert MAIN in artifact.files
    assert WEIGHTS not in artifact.files


def test_the_scripts_for_the_mac_go_with_it(lowered: Artifact) -> None:
    for name, source in (("predict_on_mac.py", predict_on_mac), ("evidence.py", evidence)):
        assert _bytes(lowered, name) == Path(str(source.__file__)).read_bytes()


PRINT_HASHES = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from test_lower import BACKEND, FP32, small_program
made = BACKEND.lower(small_program(), FP32)
for name, content in made.files.items():
    print(name, hashlib.sha256(content).hexdigest())
"""


def test_another_process_makes_the_same_bytes(lowered: Artifact) -> None:
    assert os.environ.get("PYTHONHASHSEED") != "12345"
    ours = {
        name: hashlib.sha256(_bytes(lowered, name)).hexdigest() for name in sorted(lowered.files)
    }
    done = subprocess.run(
        [sys.executable, "-c", PRINT_HASHES, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert theirs == ours


def test_two_dims_of_a_picture_may_vary() -> None:
    class Blur(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 3, 1, 1)

    captured = program(Blur(), "x=1x3xheight:4..12xwidth:5..9")
    artifact = BACKEND.lower(captured, FP32)
    assert package_of(artifact).inputs[0].ranges == ((1, 1), (3, 3), (4, 12), (5, 9))
    sizes = {sample["x"].shape[2:] for sample in captured.reference.samples}
    assert sizes == {(4, 5), (12, 9), (8, 7)}
    edgekit.verify(BACKEND, artifact, captured.reference).require()
    with BACKEND.open(artifact) as session:
        assert session.run({"x": np.ones((1, 3, 5, 8), np.float32)})["output"].shape[2:] == (5, 8)


def test_one_dim_of_two_inputs_varies_in_both() -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"mixed": self.head(x) * y, "flat": x.reshape(x.shape[0], -1) + 1}

    artifact, proof = proven(Mix(), "x=batch:1..5x4", "y=batch:1..5x1")
    assert [feature.ranges[0] for feature in package_of(artifact).inputs] == [(1, 5), (1, 5)]
    assert proof.max_rel_error < 1e-5


class Outputs(nn.Module):
    """Four results under the names given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.head = names, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        y = F.relu(self.head(x))
        return dict(zip(self.names, (y + 1, y * 2, y - 3, torch.tanh(y)), strict=True))


@pytest.mark.parametrize(
    ("names", "features"),
    [
        (("a.b", "a_b", "a b", "é"), ["a_b", "a_b_output", "a_b_output_output", "_"]),
        (("x", "x_output", "main", "1st"), ["x_output", "x_output_output", "main", "output_1st"]),
        # A graph node of that name makes another value, which is shown under it.
        (("relu", "add", "y", "z"), ["relu_output", "add_output", "y", "z"]),
        (("add", "mul", "sub", "tanh"), ["add", "mul", "sub", "tanh"]),
    ],
)
def test_any_name_of_an_output_has_a_feature_of_its_own(
    names: tuple[str, ...], features: list[str]
) -> None:
    artifact, proof = proven(Outputs(*names), "x=1x4")
    given = [name if not name[0].isdigit() else f"output_{name}" for name in names]
    assert [output.output for output in proof.outputs] == given
    assert [feature.name for feature in package_of(artifact).outputs] == features
    assert artifact.provenance["features"] == {
        "input.x": "x",
        **{f"output.{name}": feature for name, feature in zip(given, features, strict=True)},
    }


def test_an_input_named_like_a_graph_node_has_a_feature_of_its_own() -> None:
    class Named(nn.Module):
        def forward(self, relu: Tensor, é: Tensor) -> Tensor:
            return F.relu(relu) + é

    artifact, _ = proven(Named(), "relu=1x4", "é=1x4")
    assert artifact.provenance["features"] == {
        "input.relu": "relu",
        "input.é": "_",
        "output.output": "output",
    }


def test_every_dtype_goes_in_and_comes_out() -> None:
    class Dtypes(nn.Module):
        def forward(
            self, f: Tensor, i: Tensor, j: Tensor, u: Tensor, s: Tensor, b: Tensor
        ) -> dict[str, Tensor]:
            return {
                "float": f * 2,
                "int64": i + 3,
                "int32": j * 2,
                "uint8": (u.float() * 3).to(torch.uint8),
                "int8": (s.float() - 5).to(torch.int8),
                "bool": b & (f > 0),
                "best": f.argmax(1),
                "floor": (i - 4) // 3,
                "rest": (i - 4) % 3,
                "cut": torch.div(i - 4, 3, rounding_mode="trunc"),
                "quotient": i / 3,
                "clamped": torch.minimum(i, torch.tensor(2**40)),
            }

    inputs = ["f=2x4", "i=2x4:int64", "j=2x4:int32", "u=2x4:uint8", "s=2x4:int8", "b=2x4:bool"]
    artifact, proof = proven(Dtypes(), *inputs)
    assert {feature.dtype for feature in package_of(artifact).inputs} == {"float32", "int32"}
    assert {deviation.equal for deviation in proof.outputs if deviation.equal is not None} == {1.0}
    assert [spec.dtype for spec in artifact.outputs][3:6] == ["uint8", "int8", "bool"]


def test_an_input_that_is_returned_and_a_tensor_returned_twice_are_outputs_of_their_own() -> None:
    class Again(nn.Module):
        def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
            y = x * 2
            return {
                **{"x": x, "copy": x.clone(), "seen": x.view(2, 4), "ids": ids},
                **{"one": y, "two": y, "three": y.reshape(2, 4), "mask": mask, "again": mask},
            }

    artifact, proof = proven(Again(), "x=2x4", "ids=2x4:int64", "mask=2x4:bool")
    assert len(package_of(artifact).outputs) == 9
    assert proof.max_abs_error == 0
    again, _ = proven(nn.Identity(), "input=1x4")
    assert [feature.name for feature in package_of(again).outputs] == ["output"]


class Twice(nn.Module):
    """Two ops that coremltools lacks."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.special.bessel_j0(x)
        z: Tensor = y.index_fill(1, torch.tensor([0]), 2.0)
        return z


class Smoothed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x[None, None], (1, 2), mode="bilinear", antialias=True)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x[None, None], scale_factor=1.3, mode="bilinear")


def test_every_op_without_a_conversion_is_named_with_its_line() -> None:
    captured = program(Twice(), "x=2x4")
    findings = BACKEND.check(captured, FP32)
    assert [finding.op for finding in findings] == [
        "aten.special_bessel_j0.default",
        "aten.index_copy.default",
    ]
    for finding, line in zip(findings, ("bessel_j0(x)", "y.index_fill(1"), strict=True):
        assert "test_lower.py:" in finding.source
        assert line in finding.source
        assert finding.remedy == "coremltools has no conversion for it; write it with simpler ops"
    with pytest.raises(UnsupportedModel, match=r"(?s)bessel_j0.*index_copy"):
        BACKEND.lower(captured, FP32)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Smoothed(), "drops antialias=True without saying so"),
        (Half(), "coremltools fails on it (recompute_scale_factor"),
    ],
)
def test_what_would_come_out_wrong_is_refused_with_its_line(module: nn.Module, reason: str) -> None:
    captured = program(module, "x=2x4")
    (finding,) = BACKEND.check(captured, FP32)
    assert "F.interpolate(x[None, None]" in finding.source
    assert reason in finding.remedy
    with pytest.raises(UnsupportedModel, match="upsample_bilinear2d"):
        BACKEND.lower(captured, FP32)


@pytest.fixture
def giving_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def fail(reason: str) -> None:
        def convert(*_: object, **__: object) -> None:
            raise RuntimeError(reason)

        monkeypatch.setattr("edgekit_coreml.lower.coremltools.convert", convert)

    return fail


def test_a_converter_that_fails_without_a_node_is_one_finding(
    small: Program, giving_up: Callable[[str], None]
) -> None:
    giving_up("a pass failed\nat length")
    (finding,) = BACKEND.check(small, FP32)
    assert (finding.op, finding.source) == ("the graph", "")
    assert "coremltools fails on it (a pass failed)" in finding.remedy


def test_a_converter_that_fails_where_check_finds_nothing_says_its_reason(
    small: Program, giving_up: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    giving_up("a pass failed")
    monkeypatch.setattr("edgekit_coreml.lower.findings_from_program", lambda *_: [])
    with pytest.raises(LoweringFailed, match=r"the model: a pass failed Try --precision fp32\.$"):
        BACKEND.lower(small, FP16)
    with pytest.raises(LoweringFailed, match=r"the model: a pass failed$"):
        BACKEND.lower(small, FP32)


def test_only_the_inputs_whose_values_matter_count_as_used() -> None:
    class Partly(nn.Module):
        def forward(self, x: Tensor, like: Tensor, sized: Tensor, unused: Tensor) -> Tensor:
            return x.expand(sized.shape[0], 4) + torch.zeros_like(like)

    inputs = ("x=1x4", "like=1x4", "sized=batch:2..3x4", "unused=1x4")
    artifact, _ = proven(Partly(), *inputs)
    assert artifact.provenance["used"] == ["x"]


def test_a_pass_that_fails_after_all_ops_were_taken_is_traced_to_the_users_line() -> None:
    class Resized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(x, 2)
            return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=True)

    flexible = program(Resized(), "x=1x3xh:16..64xw:16..64")
    (finding,) = BACKEND.check(flexible, FP32)
    assert finding.op == "aten.upsample_bilinear2d.vec"
    assert "F.interpolate(y, size=x.shape[2:]" in finding.source
    assert "coremltools fails on it" in finding.remedy
