"""predict_on_mac.py as a Mac runs it: a child process in a real bundle, with a fake Core ML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit_coreml.predict_on_mac as script
from edgekit import evidence
from edgekit.artifact import Artifact
from edgekit.image import ImageInput
from edgekit.program import Reference
from edgekit.recipe import FP16
from edgekit.render import bundle_table
from edgekit.report import html_report
from edgekit.spec import Array, TensorSpec

FAKES = Path(__file__).parent / "fake"
NAME = "coreml-fp16"
UNITS = ["CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL"]
LABELS = ("cat", "dog", "bird")
RGB = ImageInput("x", 3, 6, 4, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), pad=1)
GREY = ImageInput("x", 1, 6, 4, (0.286,), (0.353,))
MAC = """
import platform
platform.system = lambda: "Darwin"
platform.machine = lambda: "arm64"
platform.mac_ver = lambda *_: ("15.1", ("", "", ""), "arm64")
"""
Ship = Callable[..., Any]


def reference(image: ImageInput | None, *arrays: Array) -> Reference:
    """Prepared pictures, ``arrays`` as they are, and what the fake's model should answer."""
    generator = np.random.default_rng(0)
    if image is None:
        samples = [generator.random((1, 4), dtype=np.float32) + 1 for _ in range(3)]
    else:
        shape = (9, 9, image.channels)
        pictures = generator.integers(0, 256, (3, *shape), dtype=np.uint8)
        exact = ImageInput(image.name, image.channels, 9, 9, image.mean, image.std, image.pad)
        samples = [exact.prepare(picture) for picture in pictures]
    samples += [*arrays]
    expected = []
    for x in samples:
        scores = (x.reshape(len(x), -1).mean(axis=1, keepdims=True) * [[1, 3, 2]]).astype("float32")
        count = np.array(x.size, np.int64)
        expected.append({"scores": scores, "count": count, "high": scores > 1.5})
    return Reference(tuple({"x": x} for x in samples), tuple(expected), "random, seed 0")


@pytest.fixture
def mac(ship: Ship) -> Callable[..., Any]:
    """A device with the bundle on it."""

    def make(
        image: ImageInput | None = None,
        held: Reference | None = None,
        labels: tuple[str, ...] = LABELS,
        **environment: str,
    ) -> Any:
        held = held or reference(image)
        inputs = (TensorSpec("x", held.samples[0]["x"].shape, "float32"),)
        outputs = (
            TensorSpec("scores", (1, 3), "float32"),
            TensorSpec("count", (), "int64"),
            TensorSpec("high", (1, 3), "bool"),
        )
        picture = image.to_json() if image else None
        files = {
            "model.mlpackage/Manifest.json": json.dumps({"image": picture}).encode(),
            "predict_on_mac.py": Path(script.__file__).read_bytes(),
            "evidence.py": Path(evidence.__file__).read_bytes(),
        }
        provenance = {
            "image": picture,
            "features": {"input.x": "x_feature", "output.scores": "scores_feature"},
        }
        main = "model.mlpackage/Manifest.json"
        artifact = Artifact("coreml", FP16, main, files, inputs, outputs, provenance)
        return ship(artifact, held, fakes=FAKES, labels=labels, environment=environment)

    return make


def predict(device: Any, *arguments: str, absent: tuple[str, ...] = ()) -> Any:
    return device.run("predict_on_mac.py", "--runs", "5", *arguments, before=MAC, absent=absent)


@pytest.mark.parametrize("image", [None, RGB, GREY])
def test_each_unit_is_proven_and_the_fastest_is_timed(mac: Ship, image: ImageInput | None) -> None:
    device = mac(image)
    done = predict(device)
    assert (done.returncode, done.stderr) == (0, "")
    bundle = device.open()
    proofs = bundle.device_proofs(NAME)
    assert [proof.host["compute_unit"] for proof in proofs] == UNITS
    assert all(proof.passed and proof.samples == 3 and not proof.notes for proof in proofs)
    assert [output.output for output in proofs[0].outputs] == ["scores", "count", "high"]
    assert proofs[0].host["macos"] == "15.1"
    assert 0 < proofs[0].max_abs_error < 1e-2
    measured = bundle.measurement(NAME)
    assert measured is not None
    assert measured["compute_unit"] == "CPU_AND_GPU"
    assert len(measured["times_ms"]) == 5
    assert device.added() == {f"{NAME}/on-device.json", f"{NAME}/perf.json"}


def test_what_was_found_is_shown_there_and_here(mac: Ship) -> None:
    device = mac()
    assert device.open().standing(NAME) == "executed"
    done = predict(device)
    for unit in UNITS:
        assert re.search(rf"^{unit} +on-device +\S+ +\S+ +\d+\.\d{{3}} ms", done.stdout, re.M)
    assert "Fastest of the proven: CPU_AND_GPU; perf.json holds its times." in done.stdout
    bundle = device.open()
    assert re.search(r"coreml +fp16 +on-device .* \d+\.\d\d ms", bundle_table(bundle))
    assert "<td>on-device</td>" in html_report([bundle])


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("one element", r"Output 'scores': maximum relative error is \S+, the limit is 0\.1\."),
        ("label", r"The label is 'cat', the best score is that of 'dog'\."),
        ("fraction", r"Output 'high' on sample 0 is float32 \(1, 3\), eager gives bool \(1, 3\)\."),
        ("load", r"Core ML could not load the package: Error compiling model"),
        ("predict", r"Core ML could not run the package: Error computing NN outputs"),
    ],
)
def test_one_unit_that_fails_is_written_as_failing(mac: Ship, fault: str, sentence: str) -> None:
    device = mac(FAKE_FAULT=f"CPU_AND_GPU: {fault}")
    done = predict(device)
    assert done.returncode == 1
    assert re.search(rf"^CPU_AND_GPU is not proven: {sentence}", done.stderr)
    assert re.search(r"^CPU_AND_GPU +not proven .* -  ", done.stdout, re.M)
    bundle = device.open()
    assert [proof.passed for proof in bundle.device_proofs(NAME)] == [True, False, True, True]
    assert bundle.standing(NAME) == "fails on device"
    measured = bundle.measurement(NAME)
    assert measured is not None
    assert measured["compute_unit"] != "CPU_AND_GPU"  # the fastest, if it were proven


def test_a_sample_that_is_no_picture_is_left_out_and_said(mac: Ship) -> None:
    noise = np.random.default_rng(1).standard_normal((1, 3, 11, 11), dtype=np.float32)
    device = mac(RGB, reference(RGB, noise))
    done = predict(device)
    assert done.returncode == 0, done.stderr
    note = (
        "1 of 4 samples were left out, since Core ML takes pictures and these hold no whole "
        "pixels from 0 to 255: 3."
    )
    assert done.stdout.count(f"Note: {note}") == 1
    for proof in device.open().device_proofs(NAME):
        assert (proof.samples, proof.notes) == (3, (note,))


def test_with_no_sample_left_there_is_no_proof(mac: Ship) -> None:
    noise = np.random.default_rng(1).standard_normal((1, 3, 11, 11), dtype=np.float32)
    held = reference(RGB, noise)
    only = Reference(held.samples[3:], held.expected[3:], held.source)
    device = mac(RGB, only)
    done = predict(device)
    assert done.returncode == 1
    assert "ALL is not proven: There is no sample to compare on." in done.stderr
    assert device.open().standing(NAME) == "fails on device"
    assert device.open().measurement(NAME) is None


def test_away_from_a_mac_it_says_where_to_go(mac: Ship) -> None:
    done = mac().run("predict_on_mac.py", before="import platform; platform.system = lambda: 'Ux'")
    assert done.returncode == 3
    assert done.stderr.startswith("Core ML runs on macOS and this is Ux; copy the whole bundle")


@pytest.mark.parametrize(
    ("absent", "image", "sentence"),
    [
        ("coremltools", None, r"coremltools does not load .*; run: pip install coremltools\n"),
        ("PIL", RGB, r"the model takes an image and Pillow does not load .*pip install pillow\n"),
        ("numpy", None, r"predict_on_mac\.py needs numpy, .*pip install numpy coremltools\n"),
    ],
)
def test_what_is_not_installed_is_a_sentence(
    mac: Ship, absent: str, image: ImageInput | None, sentence: str
) -> None:
    device = mac(image)
    done = predict(device, absent=(absent,))
    assert done.returncode == 3
    assert re.fullmatch(sentence, done.stderr)
    assert device.added() == set()


def test_an_old_python_is_told(mac: Ship) -> None:
    done = mac().run("predict_on_mac.py", before="sys.version_info = (3, 9, 6, 'final', 0)")
    assert done.returncode == 3
    assert done.stderr == "predict_on_mac.py needs Python 3.10 or newer.\n"


@pytest.mark.parametrize("name", [f"{NAME}/model.mlpackage/Manifest.json", "samples/0000.npz"])
def test_an_altered_file_is_refused(mac: Ship, name: str) -> None:
    device = mac()
    path = device.bundle / name
    path.write_bytes(path.read_bytes() + b"\n")
    done = predict(device)
    assert done.returncode == 4
    assert f"{name} was altered or cut short; copy the bundle again, whole." in done.stderr


def test_labels_are_not_asked_for_where_the_model_has_none(mac: Ship) -> None:
    device = mac(labels=(), FAKE_FAULT="ALL: label")
    assert predict(device).returncode == 0


@pytest.mark.parametrize("image", [RGB, GREY])
def test_a_picture_comes_back_as_it_was_drawn(image: ImageInput) -> None:
    pytest.importorskip("PIL.Image")
    drawn = np.random.default_rng(2).integers(0, 256, (6, 4, image.channels), dtype=np.uint8)
    drawn[0, 0], drawn[5, 3] = 0, 255
    picture = np.asarray(script.picture(image.prepare(drawn), image.to_json()))
    padded = np.pad(drawn, ((image.pad, image.pad), (image.pad, image.pad), (0, 0)))
    np.testing.assert_array_equal(picture.reshape(padded.shape), padded)


def test_what_no_camera_could_see_is_no_picture() -> None:
    whole = RGB.prepare(np.full((6, 4, 3), 255, np.uint8))
    for off in (0.02 / 255 / 0.229, 2 / 255 / 0.229, np.nan):  # a fraction, above 255, nothing
        changed = whole.copy()
        changed[0, 0, 2, 2] += np.float32(off)
        assert script.picture(changed, RGB.to_json()) is None
    assert script.picture(np.concatenate([whole, whole]), RGB.to_json()) is None


def test_integers_go_in_as_core_mls_or_not_at_all(mac: Ship) -> None:
    shipped = evidence.open_shipped(mac().folder)
    edges = script.Edges(shipped)
    feed = edges.feed({"x": np.array([1, 2]), "flag": np.array(True)})
    assert feed is not None
    assert {name: (a.dtype.name, a.shape) for name, a in feed.items()} == {
        "x_feature": ("int32", (2,)),
        "flag": ("float32", (1,)),
    }
    with pytest.raises(evidence.NotPossible, match="'x' does not fit Core ML's int32"):
        edges.feed({"x": np.array([1 << 40])})
