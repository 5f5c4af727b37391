"""predict_on_mac.py --bits: the codes rewritten on a Mac without edgekit, with a fake Core ML."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit_coreml.predict_on_mac as script
from edgekit import evidence, rounding
from edgekit.artifact import Artifact
from edgekit.evidence import sqnr_db
from edgekit.program import Reference
from edgekit.recipe import PRECISIONS
from edgekit.rounding import in_container
from edgekit.spec import TensorSpec
from edgekit.widths import places_to_json

FAKES = Path(__file__).parent / "fake_widths"
WEIGHTS = "model.mlpackage/weight.bin"
CODES = np.array([127, -3, 77, 20, -90, 5], np.int8)
MAC = """
import platform
platform.system = lambda: "Darwin"
platform.mac_ver = lambda *_: ("15.1", ("", "", ""), "arm64")
"""
PLACES = [
    {"layer": "body.first", "file": WEIGHTS, "offset": 2, "count": 3},
    {"layer": "head", "file": WEIGHTS, "offset": 5, "count": 3},
]


@pytest.fixture
def mac(ship: Callable[..., Any]) -> Callable[..., Any]:
    """A device with a bundle of one switchable artifact, or of a plain one."""

    def make(precision: str = "any", **environment: str) -> Any:
        samples = [{"x": np.full((1, 4), value, np.float32)} for value in (1.0, 2.0)]
        expected = [
            {"scores": (sample["x"].mean() * CODES[None]).astype(np.float32)} for sample in samples
        ]
        files = {
            WEIGHTS: b"ab" + CODES.tobytes() + b"c",
            "predict_on_mac.py": Path(script.__file__).read_bytes(),
            "evidence.py": Path(evidence.__file__).read_bytes(),
            "rounding.py": Path(rounding.__file__).read_bytes(),
        }
        artifact = Artifact(
            "coreml",
            PRECISIONS[precision],
            WEIGHTS,
            files,
            (TensorSpec("x", (1, 4), "float32"),),
            (TensorSpec("scores", (1, 6), "float32"),),
            {"codes": places_to_json(PLACES)} if precision == "any" else {},
        )
        held = Reference(tuple(samples), tuple(expected), "made up")
        labels = tuple(f"label {index}" for index in range(6))
        return ship(artifact, held, fakes=FAKES, labels=labels, environment=environment)

    return make


def predict(device: Any, *arguments: str) -> Any:
    return device.run("predict_on_mac.py", "--runs", "2", *arguments, before=MAC)


def at(first: int, head: int) -> float:
    """The SQNR of the codes at these widths."""
    codes = np.concatenate([in_container(CODES[:3], first), in_container(CODES[3:], head)])
    return sqnr_db(CODES.astype(np.float64), codes.astype(np.float64))


@pytest.mark.parametrize(
    ("text", "widths"), [("4", (4, 4)), ("2", (2, 2)), ("4,head=8", (4, 8)), ("body=6", (6, 8))]
)
def test_another_width_is_run_and_reported_and_nothing_is_written(
    mac: Callable[..., Any], text: str, widths: tuple[int, int]
) -> None:
    device = mac()
    before = {path: path.read_bytes() for path in device.bundle.rglob("*") if path.is_file()}
    done = predict(device, "--bits", text)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"^(\w+) at --bits \S+: scores: SQNR in dB ([\d.]+), top-1", done.stdout, re.M
    )
    assert [unit for unit, _ in found] == list(script.UNITS)
    for _, value in found:
        assert float(value) == pytest.approx(at(*widths), abs=0.06)
    after = {path: path.read_bytes() for path in device.bundle.rglob("*") if path.is_file()}
    assert after == before


def test_at_eight_bits_the_proof_is_as_ever(mac: Callable[..., Any]) -> None:
    device = mac()
    assert predict(device).returncode == 0
    assert all(proof.passed for proof in device.open().device_proofs("coreml-any"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("5", "--bits '5': there are 8, 6, 4 and 2, or LAYER=WIDTH."),
        ("4,", "--bits '': there are 8, 6, 4 and 2, or LAYER=WIDTH."),
        ("tail=4", "there is no layer 'tail'; there is: body.first, head."),
    ],
)
def test_what_is_not_understood_is_a_sentence(
    mac: Callable[..., Any], text: str, sentence: str
) -> None:
    done = predict(mac(), "--bits", text)
    assert (done.returncode, done.stderr) == (3, f"{sentence}\n")


def test_a_package_of_one_width_has_no_other(mac: Callable[..., Any]) -> None:
    done = predict(mac("int8"), "--bits", "4")
    assert (done.returncode, done.stderr) == (
        3,
        "coreml-int8 has one bit-width; leave --bits out.\n",
    )


def test_a_package_that_no_unit_loads_is_told(mac: Callable[..., Any]) -> None:
    done = predict(mac(FAKE_FAULT="load"), "--bits", "4")
    assert done.returncode == 3
    assert "ALL at --bits 4: Core ML could not load the package" in done.stdout
