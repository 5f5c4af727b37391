"""What a user may get wrong, or find broken: a sentence, an exit code, nothing half-made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import edgekit
from edgekit.bundle import Bundle, open_bundle
from edgekit.cli import main
from edgekit.errors import RuntimeFailed
from edgekit.files import PARTIAL, sha256
from edgekit.manifest import read_manifest

MODELS = """
import torch
from torch import nn
import torch.nn.functional as F


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean((2, 3)))
"""
PROTO = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
MANIFEST = "model.mlpackage/Manifest.json"
ALL = ("coreml", "executorch", "onnxruntime", "tensorrt")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def _everything_is_installed() -> None:
    for name in ALL:
        try:
            edgekit.backend(name)
        except edgekit.MissingRuntime as missing:
            pytest.skip(str(missing))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "models.py"
    path.write_text(MODELS)
    return path


@pytest.fixture
def export(models: Path, tmp_path: Path, capsys: Captured) -> Callable[..., tuple[int, str]]:
    """``edgekit export`` as it is typed: its exit code and what it says; it must leave nothing."""

    def run(factory: str, *arguments: str, shape: str = "x=1x3x8x8") -> tuple[int, str]:
        folder = tmp_path / "out"
        folder.mkdir()
        command = ["export", f"{models}:{factory}", "--input", shape, "-o", str(folder / "bundle")]
        code = main([*command, *arguments])
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        assert "internal error" not in said.err
        assert list(folder.iterdir()) == []  # no bundle, and no .partial of one
        return code, said.err

    return run


def test_check_names_an_op_that_no_target_takes_in_all_four_with_its_line(
    models: Path, capsys: Captured
) -> None:
    reference = f"{models}:Bessel"
    code = main(["check", reference, "--input", "x=1x4", "--target", "all", "--precision", "fp32"])
    said = capsys.readouterr().out
    assert code == 3
    for name in ALL:
        heading = f"{name}-fp32: 1 finding\n  - "
        assert heading in said
        finding = said.partition(heading)[2].splitlines()[0]
        assert "bessel_j0" in finding
        assert f"{models}:9: return torch.special.bessel_j0(x)" in finding
        assert "is refused: " in finding


@pytest.mark.parametrize("target", [*ALL, "all"])
def test_an_op_that_a_target_does_not_take_exports_nothing(
    export: Callable[..., tuple[int, str]], target: str
) -> None:
    arguments = ("--target", target, "--precision", "fp32")
    code, said = export("Bessel", *arguments, shape="x=1x4")
    assert code == 3
    assert "cannot take this model:" in said
    assert "models.py:9: return torch.special.bessel_j0(x)" in said


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ("x=batchx3x8x8", "a named dim needs its range"),
        ("x=batch:4..1x3x8x8", "the range must rise and start at 1 or above"),
        ("x=batch:0..2x3x8x8", "the range must rise and start at 1 or above"),
        ("x=1x3xh:1..8x8", "sample inputs (x=1x3xh:1..8x8): Calculated padded input size"),
        ("x=1x4x8x8", "sample inputs (x=1x4x8x8): Given groups=1, weight of size [8, 3, 3, 3]"),
        ("y=1x3x8x8", "the model has no input 'y'; forward takes: x."),
    ],
)
def test_a_shape_that_makes_no_sense_is_a_sentence(
    export: Callable[..., tuple[int, str]], shape: str, sentence: str
) -> None:
    code, said = export("Small", "--target", "coreml,tensorrt", shape=shape)
    assert (code, sentence in said) == (2, True), said


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (
            ("--target", "coreml", "--coreml-minimum", "iOS12"),
            2,
            "--coreml-minimum 'iOS12' is not one of iOS16, iOS17, iOS18",
        ),
        (
            ("--target", "tensorrt", "--tensorrt-version", "9"),
            2,
            "--tensorrt-version '9' is not one of 10.3, 10.13, 11, rtx",
        ),
        (
            ("--target", "tensorrt", "--tensorrt-compute-capability", "sm87"),
            2,
            "TensorRT-RTX has no target sm87 (Jetson Orin); the engine must be built on that "
            "machine itself: copy the bundle there and, in the artifact's folder, run: python3 "
            "build_engine.py.",
        ),
        (
            ("--target", "tensorrt", "--tensorrt-build-seconds", "0"),
            2,
            "--tensorrt-build-seconds '0' is not a number above 0.",
        ),
        (
            ("--target", "tensorrt", "--tensorrt-build-seconds", "0.01"),
            3,
            "tensorrt could not build the engine: it was stopped after 0.01 seconds, its limit; "
            "raise --tensorrt-build-seconds.",
        ),
        (
            ("--target", "tensorrt", "--tensorrt-build-memory", "0.001"),
            3,
            "tensorrt could not build the engine: it needs more than 0.001 GB of memory, its "
            "limit; raise --tensorrt-build-memory.",
        ),
        (
            ("--target", "tensorrt", "--tensorrt-compute-capability", "sm75"),
            3,
            "FP32 GEMM is not supported",
        ),
        (("--target", "coreml,tensorrt", "--precision", "palette4"), 3, "cannot make palette4"),
    ],
)
def test_an_option_or_a_limit_is_a_sentence(
    export: Callable[..., tuple[int, str]], arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    precision = () if "--precision" in arguments else ("--precision", "fp32")
    found, said = export("Small", *arguments, *precision)
    assert (found, sentence in said) == (code, True), said


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    return edgekit.export(
        f"{models}:Small",
        ["x=1x3x8x8"],
        targets=["coreml", "tensorrt"],
        precision="fp32",
        out=folder,
    )


@pytest.fixture
def damaged(whole: Bundle, tmp_path: Path) -> Callable[[str, str, bytes | None], Bundle]:
    """A copy of the bundle in which a file has other bytes, or is gone, and every hash fits."""

    def write(artifact: str, name: str, content: bytes | None) -> Bundle:
        folder = tmp_path / "bundle"
        shutil.copytree(whole.folder, folder)
        path = folder / artifact / name
        manifest = read_manifest(folder)
        files = dict(manifest.files)
        entries = manifest.artifacts
        if content is None:
            path.unlink()
            del files[f"{artifact}/{name}"]
            entries = tuple(_without(entry, name) for entry in entries)
        else:
            path.write_bytes(content)
            files[f"{artifact}/{name}"] = sha256(path)
        text = _replaced(manifest, artifacts=entries).with_files(files).to_text()
        (folder / "manifest.json").write_text(text)
        return open_bundle(folder)

    return write


def _replaced(value: Any, **fields: Any) -> Any:
    from dataclasses import replace

    return replace(value, **fields)


def _without(entry: Any, name: str) -> Any:
    return _replaced(entry, files=tuple(file for file in entry.files if file != name))


def read(whole: Bundle, artifact: str, name: str) -> bytes:
    return (whole.folder / artifact / name).read_bytes()


def refusal(bundle: Bundle, target: str) -> str:
    """What ``verify`` says of an artifact that cannot be loaded."""
    backend = edgekit.backend(target)
    with pytest.raises(RuntimeFailed) as refused:
        edgekit.verify(backend, bundle.artifact(target), bundle.reference())
    said = str(refused.value)
    assert said.startswith(f"{target} could not load the model: "), said
    assert "\n" not in said
    return said


def foreign_proto() -> bytes:
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.specificationVersion = 1
    model.identity.SetInParent()
    content: bytes = model.SerializeToString()
    return content


def renamed_weights(content: bytes) -> bytes:
    return content.replace(b"weights/weight.bin", b"../../../../etc/pw")


CUT = (
    ("a missing weight file", WEIGHTS, lambda _: None, "the package has no file"),
    ("an empty weight file", WEIGHTS, lambda _: b"", "weight.bin"),
    ("half a weight file", WEIGHTS, lambda whole: whole[: len(whole) // 2], "weight"),
    ("a weight file of zeros", WEIGHTS, lambda whole: bytes(len(whole)), "version 2"),
    ("half a program", PROTO, lambda whole: whole[: len(whole) // 2], "cut off, or is not"),
    ("no program", PROTO, lambda _: b"", "holds no model"),
    ("a text", PROTO, lambda _: b"hello, this is a text", "is not a Core ML model"),
    ("a model of another kind", PROTO, lambda _: foreign_proto(), "only an ML Program"),
    ("no manifest", MANIFEST, lambda _: None, "no file 'Manifest.json'"),
    ("a manifest of nothing", MANIFEST, lambda _: b"{}", "does not say which item"),
    ("weights elsewhere", PROTO, renamed_weights, "the package has no file"),
)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"), [row[1:] for row in CUT], ids=[row[0] for row in CUT]
)
def test_a_damaged_package_behind_valid_hashes_is_a_sentence(
    whole: Bundle,
    damaged: Callable[..., Bundle],
    name: str,
    damage: Callable[[bytes], bytes | None],
    sentence: str,
) -> None:
    content = damage(read(whole, "coreml-fp32", name))
    assert sentence in refusal(damaged("coreml-fp32", name, content), "coreml")


def empty_graph() -> bytes:
    graph = onnx.helper.make_graph([], "empty", [], [])
    return bytes(onnx.helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"hello", "it has no layers or no outputs"),
        (b"", "it has no layers or no outputs"),
        (bytes(64), "it has no layers or no outputs"),
        (empty_graph(), "it has no layers or no outputs"),
        (None, "DESERIALIZE"),  # half of the file
    ],
    ids=["hello", "nothing", "zeros", "an empty graph", "half a file"],
)
def test_an_onnx_file_that_is_none_is_a_sentence(
    whole: Bundle, damaged: Callable[..., Bundle], content: bytes | None, sentence: str
) -> None:
    if content is None:
        source = read(whole, "tensorrt-fp32", "model.onnx")
        content = source[: len(source) // 2]
    assert sentence in refusal(damaged("tensorrt-fp32", "model.onnx", content), "tensorrt")


@pytest.mark.parametrize("verb", ["verify", "run", "profile"])
@pytest.mark.parametrize(
    ("artifact", "name"), [("coreml-fp32", WEIGHTS), ("tensorrt-fp32", "model.onnx")]
)
def test_no_verb_gives_a_traceback_for_a_damaged_artifact(
    damaged: Callable[..., Bundle],
    whole: Bundle,
    verb: str,
    artifact: str,
    name: str,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    bundle = damaged(artifact, name, b"hello")
    sample = str(whole.folder / "samples" / "0000.npz")
    inputs = [sample] if verb == "run" else []
    code = main([verb, str(bundle.folder), *inputs, "--artifact", artifact])
    said = capsys.readouterr().err
    assert code in (2, 3)
    assert said.startswith("edgekit: ")
    assert "Traceback" not in said
    assert "internal error" not in said


def test_a_bundle_that_stays_after_a_failed_overwrite_is_the_old_one(
    whole: Bundle, models: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(whole.folder, folder)
    before = (folder / "manifest.json").read_bytes()
    arguments = ["--target", "tensorrt", "--tensorrt-build-seconds", "0.01", "--overwrite"]
    command = ["export", f"{models}:Small", "--input", "x=1x3x8x8", "-o", str(folder)]
    assert main([*command, *arguments]) == 3
    assert "raise --tensorrt-build-seconds" in capsys.readouterr().err
    assert (folder / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(PARTIAL)] == []
    open_bundle(folder)
