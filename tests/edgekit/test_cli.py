"""The command line: exit codes, sentences, one JSON document on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle import open_bundle
from edgekit.cli import main
from edgekit.errors import DISTRIBUTION
from edgekit.image import ImageInput
from edgekit.testing import example_bundle

USER_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        left, right = self.conv(x).chunk(2, 1)
        return {"logits": (left * right).mean((2, 3))}

def make():
    torch.manual_seed(0)
    return Net()

def branch():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branch()

def broken():
    class Broken(nn.Module):
        def forward(self, x):
            return x / 0
    return Broken()
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "net.py"
    path.write_text(USER_FILE)
    return path


@pytest.fixture(scope="module")
def bundle(user_file: Path) -> Path:
    """Made by the command line, from the user's own file."""
    out = user_file.parent / "bundle"
    words = ("export", f"{user_file}:make", "--target", "onnxruntime", "--precision", "fp32,fp16")
    assert main([*words, "--input", "x=batch:1..3x3x8x8", "-o", str(out)]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_export_prints_a_table_and_where_it_wrote(
    user_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", f"{user_file}:make", "--target", "onnxruntime", "--input", "x=1x3x8x8"]
    code, out, err = run(capsys, *words, "-o", tmp_path / "b")
    assert (code, err) == (0, "")
    assert "onnxruntime  fp32       executed" in out
    assert out.endswith(f"written: {tmp_path / 'b'}\n")


def test_verify_proves_again(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", bundle)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [
        ["onnxruntime-fp32", "executed"],
        ["onnxruntime-fp16", "executed"],
    ]


def test_verify_of_a_wrong_artifact_fails_with_the_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.testing import ReplayBackend

    example_bundle(tmp_path / "b")

    class Drifting(ReplayBackend):
        def open(self, artifact: object, *, threads: int | None = None) -> object:  # type: ignore[override]
            session = super().open(artifact)  # type: ignore[arg-type]
            run = session.run
            session.run = lambda arrays: {k: v + 1 for k, v in run(arrays).items()}  # type: ignore[method-assign]
            return session

    monkeypatch.setattr("edgekit.cli.backend", lambda name: Drifting())
    monkeypatch.setattr("edgekit.cli.can_run", lambda name: True)
    code, out, _ = run(capsys, "verify", tmp_path / "b")
    assert code == 1
    assert "replay-fp32: Output 'scores': maximum relative error is" in out


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "{bundle}"),
        ("report", "{bundle}"),
        ("list",),
        ("list", "models"),
        ("doctor",),
        ("run", "{bundle}", "{npz}"),
        ("check", "{file}:make", "--target", "all", "--input", "x=1x3x8x8"),
        ("profile", "{bundle}", "--noisy-ok", "--artifact", "onnxruntime-fp32", "--runs", "5"),
    ],
)
def test_json_is_one_document_on_stdout(
    words: tuple[str, ...],
    bundle: Path,
    user_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    npz = tmp_path / "in.npz"
    np.savez(npz, x=np.zeros((2, 3, 8, 8), np.float32))
    filled = [word.format(bundle=bundle, npz=npz, file=user_file) for word in words]
    code, out, _ = run(capsys, *filled, "--json")
    assert code == 0
    assert json.loads(out)


def test_profile_measures_in_a_fresh_process_and_keeps_raw_times(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys, "profile", bundle, "--noisy-ok", "--artifact", "onnxruntime-fp32", "--threads", 1
    )
    assert code == 0
    assert "cold load" in out
    assert "Conv" in out
    saved = open_bundle(bundle).measurement("onnxruntime-fp32")
    assert saved is not None
    assert saved["threads"] == 1
    assert len(saved["times_ms"]) >= 100  # type: ignore[arg-type]
    assert 0 < saved["p50_ms"] <= saved["p90_ms"] <= saved["p99_ms"]  # type: ignore[operator]


def test_check_lists_what_stays_outside_with_line_and_remedy(
    user_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys, "check", f"{user_file}:make", "--target", "all", "--input", "x=1x3x8x8"
    )
    assert code == 0
    assert "onnxruntime-fp32: no findings" in out
    assert "net.py:11: left, right = self.conv(x).chunk(2, 1)" in out
    assert "take slices, x[:, :a] and x[:, a:], instead of split or chunk" in out


def test_run_writes_the_outputs_of_an_npz(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", x=np.ones((2, 3, 8, 8), np.float32))
    code, out, _ = run(capsys, "run", bundle, tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert code == 0
    assert "logits float32 2x2" in out
    with np.load(tmp_path / "out.npz") as saved:
        assert saved["logits"].shape == (2, 2)


def error(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code, out, err = run(capsys, *words)
    assert out == ""
    assert err.startswith("edgekit: ")
    assert "Traceback" not in err
    return code, err


EXPORT = ("export", "{file}:make", "--input", "x=1x3x8x8", "-o", "{tmp}/b", "--target")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (
            ("export", "partialnet-t9", "--target", "onnxruntime", "-o", "{tmp}/b"),
            2,
            "unknown model 'partialnet-t9'; did you mean 'partialnet-t",
        ),
        ((*EXPORT, "executorhc"), 2, "unknown target 'executorhc'; did you mean 'executorch'?"),
        ((*EXPORT, "onnxruntime", "--precision", "fp23"), 2, "unknown precision 'fp23'"),
        ((*EXPORT, "onnxruntime", "--precision", "int4"), 3, "it can make: fp32, fp16"),
        (
            (
                "export",
                "{file}:branch",
                "--input",
                "x=2",
                "--target",
                "onnxruntime",
                "-o",
                "{tmp}/b",
            ),
            3,
            "net.py:21: return x if x.sum() > 0 else -x",
        ),
        (
            (
                "export",
                "{file}:broken",
                "--input",
                "x=2",
                "--target",
                "onnxruntime",
                "-o",
                "{tmp}/b",
            ),
            1,
            "holds NaN or infinity",
        ),
        (
            ("export", "{file}:make", "--target", "onnxruntime", "-o", "{tmp}/b"),
            2,
            "add a function example_inputs() beside the factory",
        ),
        (
            (
                "export",
                "{file}:make",
                "--input",
                "x=1xq",
                "--target",
                "onnxruntime",
                "-o",
                "{tmp}/b",
            ),
            2,
            "is not NAME=SHAPE; write for example x=1x3x224x224",
        ),
        (("export",), 2, "the following arguments are required"),
        (("exprot",), 2, "invalid choice: 'exprot'"),
        (("verify", "{tmp}/absent"), 2, "there is no bundle folder"),
        (("verify", "{tmp}"), 4, "is no edgekit bundle: it has no manifest.json"),
        (
            ("verify", "{bundle}", "--artifact", "onnxruntime-fp61"),
            2,
            "unknown artifact 'onnxruntime-fp61'; did you mean 'onnxruntime-fp16'?",
        ),
        (("run", "{bundle}", "{tmp}/absent.npz"), 2, "there is no file"),
        (("run", "{bundle}", "{tmp}/text.npz"), 2, "is not an .npz of arrays that can be read"),
        (("run", "{bundle}", "{tmp}/shape.npz"), 2, "the model takes x=batch:1..3x3x8x8"),
        (("run", "{bundle}", "{tmp}/dtype.npz"), 2, "dtype float64; the model takes float32"),
        (("run", "{bundle}", "{tmp}/name.npz"), 2, "there is no input 'y'"),
        (("profile", "{bundle}", "--threads", "none"), 2, "'none' is not a number of 1 or more"),
    ],
)
def test_bad_input_is_a_sentence_with_its_exit_code(
    words: tuple[str, ...],
    code: int,
    sentence: str,
    bundle: Path,
    user_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "shape.npz", x=np.zeros((9, 3, 8, 8), np.float32))
    np.savez(tmp_path / "dtype.npz", x=np.zeros((1, 3, 8, 8)))
    np.savez(tmp_path / "name.npz", y=np.zeros((1, 3, 8, 8), np.float32))
    filled = [word.format(file=user_file, tmp=tmp_path, bundle=bundle) for word in words]
    found, said = error(capsys, *filled)
    assert sentence in said
    assert found == code
    assert not (tmp_path / "b").exists()


def test_an_image_for_a_model_without_preprocessing_is_a_sentence(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 255\n" + bytes(4))
    code, said = error(capsys, "run", bundle, tmp_path / "a.pgm")
    assert code == 2
    assert "does not say how an image becomes its input" in said


def test_a_file_that_is_no_image_is_a_sentence(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_text("not an image")
    code, said = error(capsys, "run", bundle, tmp_path / "a.png")
    assert code == 2
    assert "a.png cannot be read as an image" in said


def test_a_damaged_bundle_has_exit_code_four(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example_bundle(tmp_path / "b")
    artifact = tmp_path / "b/replay-fp32/replay.npz"
    content = bytearray(artifact.read_bytes())
    content[50] ^= 1
    artifact.write_bytes(content)
    for verb in ("verify", "report", "profile"):
        code, said = error(capsys, verb, tmp_path / "b")
        assert code == 4
        assert "replay.npz was altered or cut short" in said


def test_a_bundle_for_a_target_that_is_not_here_names_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example_bundle(tmp_path / "b")
    code, said = error(capsys, "verify", tmp_path / "b")
    assert code == 2
    assert "unknown target 'replay'" in said


def test_doctor_fails_for_a_conflict_and_not_for_what_is_absent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.doctor import Check

    absent = Check("pillow", "images", None, ">=11", "pip install pillow")
    monkeypatch.setattr("edgekit.cli.doctor.examine", lambda: [absent])
    assert run(capsys, "doctor")[0] == 0
    wrong = Check("torch", "export", "2.9", "==2.13.0", "pip install torch==2.13.0")
    monkeypatch.setattr("edgekit.cli.doctor.examine", lambda: [absent, wrong])
    code, out, _ = run(capsys, "doctor")
    assert code == 3
    assert "pip install torch==2.13.0" in out


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "verify", tmp_path, "--debug")
    assert code == 4
    assert "Traceback" in err


def test_the_command_is_installed_and_says_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgekit.cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("edgekit 0.")
    assert DISTRIBUTION == "edgekit-sdk"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m edgekit.cli list | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


def test_labels_and_preprocessing_make_an_image_runnable() -> None:
    image = ImageInput("x", 1, 2, 2, (0.5,), (0.5,))
    assert image.prepare(np.full((2, 2), 255, np.uint8)).tolist() == [[[[1, 1], [1, 1]]]]


def test_a_device_with_one_of_the_runtimes_verifies_what_it_can(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.errors import MissingRuntime
    from edgekit.registry import backend

    def only_half(name: str) -> object:
        half.append(name)
        if len(half) == 2:
            raise MissingRuntime(name, name)
        return backend(name)

    half: list[str] = []
    monkeypatch.setattr("edgekit.cli.backend", only_half)
    code, out, err = run(capsys, "verify", bundle)
    assert code == 0
    assert "executed" in out
    assert "onnxruntime-fp16 was left out: onnxruntime needs the module" in err


def test_what_was_not_foreseen_is_a_sentence_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprise() -> None:
        raise TypeError("surprise")

    monkeypatch.setattr("edgekit.cli.doctor.examine", surprise)
    code, said = error(capsys, "doctor")
    assert code == 1
    assert "internal error, TypeError: surprise. Run the command again with --debug" in said
