"""The command line: exit codes, sentences, one JSON document on stdout."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edgekit import host
from edgekit.artifact import Artifact
from edgekit.bundle import Bundle, open_bundle
from edgekit.cli import main
from edgekit.contract import Backend, Option
from edgekit.doctor import Conflict
from edgekit.errors import DISTRIBUTION, UsageError
from edgekit.image import ImageInput
from edgekit.recipe import FP32, INT8, PRECISIONS, Recipe
from edgekit.registry import backend_options
from edgekit.spec import Array
from edgekit.testing import (
    Outcome,
    QuantizingBackend,
    QuantizingSession,
    ReplayBackend,
    ReplaySession,
    example_bundle,
)

Install = Callable[[Backend], None]

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
        ("check", "{file}:make", "--target", "onnxruntime", "--input", "x=1x3x8x8"),
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


CHECK = ("check", "--input", "x=1x3x8x8")


def test_check_lists_what_stays_outside_with_line_and_remedy(
    user_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, *CHECK, f"{user_file}:make", "--target", "onnxruntime,executorch")
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
        ((*EXPORT, "onnxruntime", "--precision", "palette4"), 3, "it can make: fp32"),
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
    assert "why: torch ==2.13.0: ExecuTorch's wheel is built for it" in out
    monkeypatch.setattr("edgekit.cli.doctor.examine", lambda: [absent])
    broken = Conflict("torch 2.9", "numpy<2", "numpy", "2.4")
    monkeypatch.setattr("edgekit.cli.doctor.conflicts", lambda: [broken])
    code, out, _ = run(capsys, "doctor")
    assert code == 3
    assert "conflict: torch 2.9 requires numpy<2, and numpy 2.4 is installed" in out


def test_doctor_lists_packages_targets_and_conflicts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Conflict("torch 2.9", "numpy<2", "numpy", "2.4")
    monkeypatch.setattr("edgekit.cli.doctor.conflicts", lambda: [broken])
    _, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert sorted(found) == ["conflicts", "packages", "targets"]
    assert "numpy" in {entry["name"] for entry in found["packages"]}
    assert {"coreml", "onnxruntime"} < {entry["name"] for entry in found["targets"]}
    assert found["conflicts"] == [broken.to_json()]


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


def test_every_setting_of_every_target_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    known = backend_options()
    assert {"coreml-minimum", "tensorrt-version"} <= known.keys()
    for verb in ("check", "export"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for name, option in known.items():
            assert f"--{name} VALUE" in shown
            assert f"(default {option.default})" in shown


@pytest.mark.parametrize(
    ("target", "option", "value", "sentence"),
    [
        ("coreml", "minimum", "iOS9", "'iOS9' is not one of iOS16, iOS17, iOS18"),
        ("tensorrt", "version", "9", "'9' is not one of 10.3, 10.13, 11, rtx"),
        ("tensorrt", "build-seconds", "soon", "'soon' is not a number above 0"),
        ("tensorrt", "build-seconds", "0", "'0' is not a number above 0"),
        ("tensorrt", "build-memory", "nan", "'nan' is not a number above 0"),
        ("tensorrt", "compute-capability", "sm1", "sm1"),
    ],
)
def test_a_wrong_setting_is_a_sentence_before_any_work(
    target: str,
    option: str,
    value: str,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgekit.registry.find_spec", lambda module: module)  # whatever is missing
    setting = f"--{target}-{option}={value}"
    for words in (("check", "no.py:make"), ("export", "no.py:make", "-o", tmp_path / "b")):
        code, said = error(capsys, *words, "--target", target, setting)
        assert code == 2
        assert f"--{target}-{option}" in said or option == "compute-capability"
        assert sentence in said


def test_an_option_of_no_target_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = error(capsys, "check", "no.py:make", "--target", "coreml", "--coreml-maximum=1")
    assert code == 2
    assert "unrecognized arguments: --coreml-maximum=1" in said


@dataclass
class Tuned(ReplayBackend):
    """A backend with a setting; it finds what it was set to."""

    name: str = "tuned"
    minimum: str = "3"
    options: tuple[Option, ...] = (Option("minimum", "3", "the least"),)

    def with_options(self, values: Mapping[str, str]) -> Tuned:
        if not values["minimum"].isdigit():
            raise UsageError(f"--tuned-minimum {values['minimum']!r} is not a number.")
        return Tuned(minimum=values["minimum"])

    def check(self, *_: object) -> list[Any]:
        from edgekit.contract import Finding

        effect: Literal["refused", "outside"] = "refused" if self.minimum == "9" else "outside"
        return [Finding("op", effect, "net.py:3: x.sort()", "", f"at least {self.minimum}")]


def test_a_setting_of_a_target_reaches_it(
    user_file: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(Tuned())
    words = (*CHECK, f"{user_file}:make", "--target", "tuned")
    for more, minimum in (((), 3), (("--tuned-minimum", 5), 5)):
        code, out, _ = run(capsys, *words, *more)
        assert code == 0
        assert f"stays outside the delegate: at least {minimum}" in out
    assert error(capsys, *words, "--tuned-minimum", "lots") == (
        2,
        "edgekit: --tuned-minimum 'lots' is not a number.\n",
    )


@pytest.mark.parametrize(("minimum", "code", "level"), [(3, 0, "warning"), (9, 3, "error")])
def test_check_writes_its_findings_as_sarif_beside_what_it_prints(
    user_file: Path,
    tmp_path: Path,
    install: Install,
    capsys: pytest.CaptureFixture[str],
    minimum: int,
    code: int,
    level: str,
) -> None:
    install(Tuned())
    words = (*CHECK, f"{user_file}:make", "--target", "tuned", "--tuned-minimum", minimum)
    found, out, _ = run(capsys, *words, "--json", "--sarif", tmp_path / "found.sarif")
    assert found == code
    (printed,) = json.loads(out)["tuned-fp32"]
    (result,) = json.loads((tmp_path / "found.sarif").read_text())["runs"][0]["results"]
    assert result["level"] == level
    assert printed["remedy"] in result["message"]["text"]
    assert error(capsys, *words, "--sarif", tmp_path / "no/found.sarif")[0] == 3


@pytest.fixture
def replayed(user_file: Path, tmp_path: Path, install: Install) -> Path:
    """A bundle of the user's file for a target that hides its layers."""
    install(ReplayBackend())
    sample = tmp_path / "mine.npz"  # not what would be drawn
    np.savez(sample, x=np.random.default_rng(9).random((2, 3, 8, 8), dtype=np.float32))
    words = ("export", f"{user_file}:make", "--target", "replay", "--input", "x=batch:1..3x3x8x8")
    assert main([*words, "--samples", str(sample), "-o", str(tmp_path / "b")]) == 0
    return tmp_path / "b"


def test_layers_that_a_runtime_hides_need_the_model(
    replayed: Path, user_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    code, out, _ = run(capsys, "verify", replayed, "--layers")
    assert code == 0
    assert "replay hides its layers; say which model was exported, --model path/to/file.py" in out
    code, out, err = run(capsys, "verify", replayed, "--layers", "--model", f"{user_file}:make")
    assert (code, err) == (0, "")
    table = out.partition("replay-fp32, by module:\n")[2].splitlines()
    assert table[0].split() == ["module", "op", "node", "SQNR"]
    assert [line.split() for line in table[2:]] == [
        ["conv", "aten.conv2d.default", "conv2d", "equal", "ok"],
        ["(the", "model)", "aten.mean.dim", "mean", "equal", "ok"],
    ]


def test_layers_are_in_the_json_of_a_proof(
    replayed: Path, user_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ("verify", replayed, "--json", "--layers")
    (hidden,) = json.loads(run(capsys, *words)[1])
    assert hidden["layers"] == []
    assert "hides its layers" in hidden["first_divergence"]
    (shown,) = json.loads(run(capsys, *words, "--model", f"{user_file}:make")[1])
    assert shown["layers"][0] == {
        "node": "conv2d",
        "op": "aten.conv2d.default",
        "module": "conv",
        "sqnr_db": None,
        "finite": True,
        "diverges": False,
    }
    assert shown["first_divergence"] == ""
    (plain,) = json.loads(run(capsys, "verify", replayed, "--json")[1])
    assert "layers" not in plain


def test_the_first_layer_that_differs_is_a_sentence(
    replayed: Path, user_file: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekit.cli.backend", lambda name: ReplayBackend(drift=0.5))
        code, out, _ = run(capsys, "verify", replayed, "--layers", "--model", f"{user_file}:make")
    assert code == 0  # the artifact itself is right; what is made again is not
    assert "It first differs at module 'conv', aten.conv2d.default, node 'conv2d', which is" in out
    assert "diverges" in out


def test_a_model_that_is_not_there_is_a_reason_and_not_the_end(
    replayed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    code, out, _ = run(
        capsys, "verify", replayed, "--layers", "--model", f"{tmp_path}/absent.py:make"
    )
    assert code == 0
    assert "The layers cannot be shown: there is no file" in out


def test_a_bundle_made_before_there_were_layers_is_verified_all_the_same(
    tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(ReplayBackend())
    example_bundle(tmp_path / "b")
    code, out, _ = run(capsys, "verify", tmp_path / "b", "--layers")
    assert code == 0
    assert "replay-fp32  executed" in out
    assert "made without the values of layers; export it again." in out


class StaticSession(ReplaySession):
    level = "static"
    notes = ("The interpreter lacks conv and relu.", "Try it on the device.")
    faults = ()
    cause = ""


class Static(ReplayBackend):
    def open(self, artifact: Artifact, *, threads: int | None = None) -> ReplaySession:
        return StaticSession(artifact)


def test_a_proof_without_numbers_warns_wherever_it_is_shown(
    user_file: Path, tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(Static("static"))
    words = ("export", f"{user_file}:make", "--target", "static", "--input", "x=1x3x8x8")
    warning = "warning: static-fp32: The interpreter lacks conv and relu. Try it on the device.\n"
    code, out, err = run(capsys, *words, "-o", tmp_path / "b")
    assert (code, err) == (0, warning)
    assert out.splitlines()[2].split()[:5] == ["static", "fp32", "static", "-", "-"]
    code, out, err = run(capsys, "verify", tmp_path / "b")
    assert (code, err) == (0, warning)
    assert out.splitlines()[2].split() == ["static-fp32", "static", "4", "-", "-"]


@dataclass
class Imitation(ReplayBackend):
    name: str = "imitation"
    emulation: str = "copy the bundle to the device"


INTERPRETED = (
    "imitation-fp32 is run by an interpreter here; to measure it, copy the bundle to the device.\n"
)


def test_the_time_of_an_interpreter_is_not_taken(
    user_file: Path,
    tmp_path: Path,
    install: Install,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: dict[str, Any] = dict.fromkeys(
        ("import_ms", "cold_load_ms", "first_run_ms", "warm_load_ms", "others_busy_cores"), 0.0
    )
    measured |= {"peak_memory_bytes": 1, "model_memory_bytes": 1, "times_ms": (1.0,), "ops": ()}
    # Not by its dotted name: the package's function of that name hides the module.
    module = importlib.import_module("edgekit.profile")
    monkeypatch.setattr(module, "in_fresh_process", lambda *words: measured)
    install(ReplayBackend())
    install(Imitation())
    words = ("export", f"{user_file}:make", "--target", "imitation,replay", "--input", "x=1x3x8x8")
    assert run(capsys, *words, "-o", tmp_path / "b")[0] == 0
    code, out, err = run(capsys, "profile", tmp_path / "b")
    assert (code, err) == (0, f"warning: {INTERPRETED}")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["replay-fp32"]
    alone = error(capsys, "profile", tmp_path / "b", "--artifact", "imitation-fp32")
    assert alone == (3, f"edgekit: {INTERPRETED}")


CLASSIFIER = """
import torch
from torch import nn
from edgekit import ImageInput, Model, TensorSpec

INPUTS = (TensorSpec("x", (1, 3, 4, 4), "float32"),)
IMAGE = ImageInput("x", 3, 4, 4, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

class Brightest(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, x):
        return self.mix(x.mean((2, 3)))

def trained():
    net = Brightest()
    net.mix.weight.data[:] = torch.eye(3) * 5
    net.mix.bias.data[:] = 0
    return Model(net.eval(), INPUTS, image=IMAGE, labels=("red", "green", "blue"))

def untrained():
    net = Brightest()
    net.mix.weight.data[:] = 0
    net.mix.bias.data[:] = torch.tensor([1.0, 0.0, 0.0])
    return Model(net.eval(), INPUTS, image=IMAGE)
"""
GOOD = Outcome(drift=0.01, milliseconds=2.0, size=1000)
QUANTIZED = tuple(PRECISIONS[name] for name in ("fp32", "int8", "int4", "any"))


def outcome(recipe: Recipe) -> Outcome:
    return GOOD if recipe.quantized else Outcome()


@pytest.fixture
def data(tmp_path: Path, install: Install) -> Path:
    """Every wrong set of data there is, a right one of each kind, and a target that quantizes."""
    install(QuantizingBackend(outcome, QUANTIZED, ops=frozenset()))
    (tmp_path / "net.py").write_text(CLASSIFIER)
    generator = np.random.default_rng(0)
    truth = np.arange(300) % 3
    inputs = generator.standard_normal((300, 3, 4, 4)).astype(np.float32) * np.float32(0.1)
    inputs[np.arange(300), truth] += 1
    stacks: dict[str, dict[str, Array]] = {
        "right": {"x": inputs, "labels": truth},
        "size": {"x": np.zeros((9, 3, 5, 5), np.float32)},
        "names": {"image": inputs},
        "nan": {"x": np.where(np.arange(300)[:, None, None, None] == 7, np.nan, inputs)},
        "unlabelled": {"x": inputs},
        "range": {"x": inputs, "labels": truth + 1},
        "few": {"x": inputs[:60], "labels": truth[:60]},
        "half": {"x": inputs, "labels": truth[:150]},
    }
    stacks["nan"]["x"] = stacks["nan"]["x"].astype(np.float32)
    for name, arrays in stacks.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    (tmp_path / "text.npz").write_text("no archive")
    folders: dict[str, tuple[str, int, int]] = {
        "empty": ("", 0, 0),
        "single": ("", 1, 90),
        "black": ("", 9, 0),
        "foreign": ("cyan", 9, 90),
        "unsorted": ("", 9, 90),
    }
    for name, (inner, count, brightest) in folders.items():
        folder = tmp_path / name / inner
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, brightest + 1, 27).astype(np.uint8).tobytes()
            (folder / f"{index}.ppm").write_bytes(b"P6\n3 3\n255\n" + pixels)
    (tmp_path / "keys.toml").write_text('precison = "int8"')
    (tmp_path / "both.toml").write_text('precision = "fp32"\nkeep-float = ["mix"]')
    (tmp_path / "int4.toml").write_text('precision = "int4"')
    (tmp_path / "broken.toml").write_text("precision int8")
    return tmp_path


RIGHT = ("--calibration", "right.npz")
LABELS = (*RIGHT, "--labels")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--calibration", "empty"), 2, "the calibration folder {data}/empty holds no image and"),
        (("--calibration", "single"), 2, "single holds 1 input; at least 8 are needed"),
        (("--calibration", "single/0.ppm"), 2, "0.ppm is one file; give a folder of images"),
        (("--calibration", "size.npz"), 2, "size.npz: input 'x' has shape 1x3x5x5; the model ta"),
        (("--calibration", "black"), 2, "is the same within each sample (black images?)"),
        (("--calibration", "nan.npz"), 2, "nan.npz[7] holds NaN or infinity in 'x'"),
        (("--calibration", "text.npz"), 2, "text.npz is not an .npz of arrays that can be read"),
        (("--calibration", "names.npz"), 2, "has no array 'x'; it holds image, the model takes x"),
        (("--calibration", "absent"), 2, "there is no file {data}/absent"),
        ((), 2, "has no real inputs of its own, and int8 needs the ranges"),
        ((*RIGHT, "--metric", "top1"), 2, "--metric top1 needs labelled data; give --labels FOLD"),
        ((*LABELS, "unlabelled.npz"), 2, "unlabelled.npz has no array 'labels', and accuracy nee"),
        ((*LABELS, "range.npz"), 2, "range.npz has the label 3, and the model has classes 0 to 2"),
        ((*LABELS, "few.npz"), 2, "a drop of 0.5 cannot be told. Give at least 200, or a larger"),
        ((*LABELS, "half.npz"), 2, "give one whole number for each of the 300 inputs"),
        ((*LABELS, "foreign"), 2, "cyan is named after no class of the model; there is: red, gre"),
        ((*LABELS, "unsorted"), 2, "unsorted holds no labels: accuracy needs a folder for each"),
        ((*LABELS, "right.npz", "model:untrained"), 1, "the float model gets 33.3% of right.npz"),
        ((*RIGHT, "--recipe", "keys.toml"), 2, "unknown recipe key 'precison'; did you mean 'pre"),
        ((*RIGHT, "--recipe", "both.toml"), 2, "fp32 quantizes nothing, so keep-float means noth"),
        ((*RIGHT, "--recipe", "int4.toml"), 2, "--precision int8 contradicts {data}/int4.toml, w"),
        ((*RIGHT, "--recipe", "broken.toml"), 2, "broken.toml cannot be read as TOML"),
        ((*RIGHT, "--recipe", "absent.toml"), 2, "there is no recipe file {data}/absent.toml"),
        ((*RIGHT, "--calibration-method", "mean"), 2, "unknown calibration method 'mean'"),
        ((*RIGHT, "--cpu", "sse"), 2, "unknown processor 'sse'"),
        ((*RIGHT, "--cpu", "avx2"), 2, "--cpu avx2 changes nothing for quantizing; leave it out"),
        ((*RIGHT, "--keep-float", "a,a"), 2, "keep-float names 'a' twice; once is enough"),
        ((*RIGHT, "--max-drop", "-1"), 2, "'-1' is not a number of 0 or more"),
        (
            ("--precision", "int4", "--calibration-method", "entropy"),
            2,
            "int4 quantizes weights alone and calibrates nothing",
        ),
        (("--precision", "palette4"), 3, "quantizing cannot make palette4"),
        (("--precision", "int9"), 2, "unknown precision 'int9'"),
    ],
)
def test_bad_data_and_recipes_are_sentences_and_nothing_is_written(
    words: tuple[str, ...],
    code: int,
    sentence: str,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = "untrained" if "model:untrained" in words else "trained"
    placed = [
        str(data / word) if words[index - 1] in PATHS and index else word
        for index, word in enumerate(words)
        if word != "model:untrained"
    ]
    precision = () if "--precision" in words else ("--precision", "int8")
    target = ("--target", "quantizing", *precision, "-o", str(data / "made/out"))
    found, said = error(capsys, "export", f"{data}/net.py:{model}", *target, *placed)
    assert sentence.format(data=data) in said
    assert found == code
    assert not (data / "made").exists()


PATHS = ("--calibration", "--labels", "--recipe")


def exported(data: Path, *words: str, model: str = "trained") -> Bundle:
    """The bundle that the command line makes of the right data."""
    told = ("export", f"{data}/net.py:{model}", "--target", "quantizing", *words)
    assert main([*told, "--calibration", str(data / "right.npz"), "-o", str(data / "b")]) == 0
    return open_bundle(data / "b")


def test_auto_prints_the_table_of_all_it_tried(
    data: Path, races: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported(data)
    out, err = capsys.readouterr()
    assert err == ""
    assert bundle.artifacts == ("quantizing-int8",)
    lines = [line.split() for line in out.splitlines()]
    verdicts = [line[0] for line in lines if {"chosen", "beaten", "refused"} & set(line)]
    assert sorted(verdicts) == ["quantizing-fp32", "quantizing-int4", "quantizing-int8"]
    assert "the fastest within the budget" in out
    code, out, _ = run(capsys, "report", data / "b", "--json")
    assert code == 0
    (document,) = json.loads(out)
    assert [each["verdict"] for each in document["tried"]].count("chosen") == 1
    _, out, _ = run(capsys, "report", data / "b")
    assert "the fastest within the budget" in out


def test_what_does_not_pay_has_exit_code_one_and_an_override_warns(
    data: Path, races: list[str], capsys: pytest.CaptureFixture[str], install: Install
) -> None:
    backend = QuantizingBackend(lambda recipe: Outcome(), (FP32, INT8), name="slow")
    install(backend)
    words = (
        *("export", f"{data}/net.py:trained", "--target", "slow", "--precision", "int8"),
        *("--calibration", data / "right.npz", "-o", data / "b"),
    )
    code, said = error(capsys, *map(str, words))
    assert code == 1
    assert "slow-int8 does not pay: it is not faster than float here" in said
    assert not (data / "b").exists()
    code, _, err = run(capsys, *words, "--unproven-ok")
    assert code == 0
    assert err.startswith("warning: slow-int8 was kept although it is not faster")


@pytest.mark.parametrize(
    ("bits", "widths"), [("4", 4), ("4,head=8", {"*": 4, "head": 8}), ("8", 8)]
)
def test_a_bundle_runs_at_the_width_asked_for(
    data: Path,
    races: list[str],
    capsys: pytest.CaptureFixture[str],
    bits: str,
    widths: int | dict[str, int],
) -> None:
    bundle = exported(data, "--precision", "any")
    sample = bundle.reference().samples[0]
    np.savez(data / "in.npz", **sample)  # type: ignore[arg-type]
    capsys.readouterr()
    words = ("run", data / "b", data / "in.npz", "--bits", bits, "-o", data / "out.npz")
    assert run(capsys, *words)[0] == 0
    with QuantizingSession(bundle.artifact(), None) as session:
        full = session.run(sample)["output"]
        session.set_bits(widths)
        expected = session.run(sample)["output"]
    with np.load(data / "out.npz") as found:
        np.testing.assert_array_equal(found["output"], expected)
    assert np.array_equal(expected, full) == (bits == "8")


@pytest.mark.parametrize(
    ("bits", "sentence"),
    [
        ("5", "5 bits were asked for *; there is: 8, 6, 4, 2."),
        ("four", "--bits 'four' is not understood; write a width such as 4"),
        ("4,haed=8", "unknown layer 'haed'; did you mean 'head'?"),
    ],
)
def test_a_width_that_is_none_is_a_sentence(
    data: Path, races: list[str], capsys: pytest.CaptureFixture[str], bits: str, sentence: str
) -> None:
    exported(data, "--precision", "any")
    np.savez(data / "in.npz", x=np.zeros((1, 3, 4, 4), np.float32))
    capsys.readouterr()
    code, said = error(capsys, "run", str(data / "b"), str(data / "in.npz"), "--bits", bits)
    assert code == 2
    assert sentence in said


def test_an_artifact_of_one_width_cannot_switch(
    data: Path, races: list[str], capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    exported(data, "--precision", "int8")
    np.savez(data / "in.npz", x=np.zeros((1, 3, 4, 4), np.float32))
    capsys.readouterr()
    code, said = error(capsys, "run", str(data / "b"), str(data / "in.npz"), "--bits", "4")
    assert (code, "quantizing-int8 has one bit-width; export the model with" in said) == (2, True)


def test_a_runtime_whose_sessions_cannot_switch_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], install: Install
) -> None:
    install(ReplayBackend())
    example_bundle(tmp_path / "b")
    np.savez(tmp_path / "in.npz", x=np.zeros((1, 4), np.float32))
    code, said = error(capsys, "run", str(tmp_path / "b"), str(tmp_path / "in.npz"), "--bits", "4")
    assert (code, said) == (2, "edgekit: replay has no artifacts of several bit-widths.\n")


@pytest.mark.parametrize(("precision", "warns"), [("int8", True), ("fp32", False)])
def test_a_proof_of_integers_does_not_carry_over_to_another_kind_of_processor(
    data: Path,
    races: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    warns: bool,
) -> None:
    real = host.describe()
    monkeypatch.setattr(host, "describe", lambda: {**real, "int8": "vnni"})
    exported(data, "--precision", precision)
    capsys.readouterr()
    assert run(capsys, "verify", data / "b")[2] == ""
    monkeypatch.setattr(host, "describe", lambda: {**real, "int8": "avx2"})
    code, out, err = run(capsys, "verify", data / "b")
    assert code == 0
    assert "executed" in out
    said = (
        f"warning: quantizing-{precision} was proven on a processor of kind 'vnni', and this one "
        "is 'avx2', whose integer kernels are others: that proof does not carry over."
    )
    assert (said in err) is warns


def test_what_labels_judged_is_verified_by_the_bundles_own_limits(
    data: Path, races: list[str], capsys: pytest.CaptureFixture[str], install: Install
) -> None:
    def far(recipe: Recipe) -> Outcome:
        return replace(outcome(recipe), drift=0.25 if recipe.quantized else 0.0)

    install(QuantizingBackend(far, (FP32, INT8), name="far"))
    words = (
        *("export", f"{data}/net.py:trained", "--target", "far", "--precision", "int8"),
        *("--calibration", data / "right.npz", "--max-drop", "90", "-o", data / "b"),
    )
    code, said = error(capsys, *map(str, words))
    assert (code, "the budget is 20 dB" in said) == (1, True)
    install(QuantizingBackend(far, (FP32, INT8), name="judged", eager=brightest))
    told = [str(word) for word in words]
    told[told.index("far")] = "judged"
    assert main([*told, "--labels", str(data / "right.npz")]) == 0
    capsys.readouterr()
    code, out, err = run(capsys, "verify", data / "b")
    assert (code, err) == (0, "")
    assert "judged-int8" in out


def brightest(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {"output": arrays["x"].mean((2, 3)) * np.float32(5)}
