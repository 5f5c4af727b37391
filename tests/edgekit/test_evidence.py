"""The half of evidence.py that runs on a device: it reads a bundle, and writes what was found."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import evidence
from edgekit.bundle import Bundle, open_bundle
from edgekit.evidence import NotPossible, Refused, Shipped, Trial, digest_of, open_shipped
from edgekit.recipe import INT8
from edgekit.testing import example_bundle
from edgekit.verify import quantized_limits

ROOT = Path(__file__).parents[2]
NAME = "replay-fp32"
HOST = {**evidence.this_machine(), "processor": "Orin"}
ON_DEVICES = (
    "edgekit/evidence.py",
    "backends/edgekit_coreml/predict_on_mac.py",
    "backends/edgekit_tensorrt/build_engine.py",
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return example_bundle(tmp_path / "bundle")


@pytest.fixture
def shipped(bundle: Bundle) -> Shipped:
    return open_shipped(bundle.folder / NAME)


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make its digest fit, as an attacker would."""
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["digest"]
    change(body)
    path.write_text(json.dumps({**body, "digest": digest_of(body)}))


def test_a_device_finds_what_was_exported(bundle: Bundle, shipped: Shipped) -> None:
    reference = bundle.reference()
    assert shipped.outputs == ["scores"]
    assert shipped.limits == bundle.proof(NAME).limits
    for mine, theirs in zip(shipped.samples, reference.samples, strict=True):
        np.testing.assert_array_equal(mine["x"], theirs["x"])
    for mine, theirs in zip(shipped.expected, reference.expected, strict=True):
        np.testing.assert_array_equal(mine["scores"], theirs["scores"])


@pytest.mark.parametrize(
    "name", [f"{NAME}/replay.npz", f"{NAME}/proof.json", "samples/0000.npz", "samples/0002.npz"]
)
def test_a_file_that_changed_or_went_is_refused(bundle: Bundle, name: str) -> None:
    path = bundle.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Refused, match=rf"{name} was altered or cut short; copy the bundle") as stop:
        open_shipped(bundle.folder / NAME)
    assert stop.value.exit_code == 4
    path.unlink()
    with pytest.raises(Refused, match=r"is no whole bundle .*No such file.*; copy it again, whole"):
        open_shipped(bundle.folder / NAME)


def test_a_manifest_that_changed_is_refused(bundle: Bundle) -> None:
    path = bundle.folder / "manifest.json"
    path.write_text(path.read_text().replace('"double"', '"triple"'))
    with pytest.raises(Refused, match=r"manifest\.json was altered; copy the bundle again, whole"):
        open_shipped(bundle.folder / NAME)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '"x"', "\x00", "{}", '{"digest": 1}'])
def test_a_manifest_that_is_none_is_refused(bundle: Bundle, text: str) -> None:
    (bundle.folder / "manifest.json").write_text(text)
    with pytest.raises(Refused, match="copy"):
        open_shipped(bundle.folder / NAME)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda body: body["samples"]["files"].append("../x.npz"),
            "'../x.npz', which lies outside",
        ),
        (lambda body: body["samples"]["files"].append("/x.npz"), "'/x.npz', which lies outside"),
        (
            lambda body: body["artifacts"][0]["files"].append("../../x"),
            "'replay-fp32/../../x', which lies outside",
        ),
        (lambda body: body["files"].pop("samples/0001.npz"), "no whole bundle .*samples/0001"),
        (lambda body: body.pop("samples"), "no whole bundle .KeyError.'samples'"),
        (lambda body: body.update(artifacts=[]), "replay-fp32 is no artifact of this bundle"),
        (lambda body: body.update(artifacts=7), "no whole bundle"),
        (lambda body: body["inputs"][0].update(name="y"), "a sample does not hold y, scores"),
        (lambda body: body["outputs"][0].update(name="y"), "a sample does not hold x, y"),
    ],
)
def test_a_forged_manifest_is_refused(
    bundle: Bundle, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    forge(bundle.folder, change)
    with pytest.raises(Refused, match=sentence):
        open_shipped(bundle.folder / NAME)


@pytest.mark.parametrize("content", [b"PK\x03\x04 no more", b"", b"\x93NUMPY", b"text"])
def test_a_sample_that_is_none_is_refused_though_its_hash_fits(
    bundle: Bundle, content: bytes
) -> None:
    name = "samples/0000.npz"
    (bundle.folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    forge(bundle.folder, lambda body: body["files"].update({name: digest}))
    with pytest.raises(Refused, match="is no whole bundle"):
        open_shipped(bundle.folder / NAME)


def test_of_two_precisions_the_folders_own_entry_is_read(bundle: Bundle) -> None:
    def add(body: dict[str, Any]) -> None:
        (entry,) = body["artifacts"]
        half = {"weights": "float16", "activations": "float16"}
        body["artifacts"].append({**entry, "recipe": half, "provenance": {"mine": True}})
        for name in ("replay.npz", "proof.json"):
            body["files"][f"replay-fp16/{name}"] = body["files"][f"{NAME}/{name}"]

    forge(bundle.folder, add)
    (bundle.folder / "replay-fp16").mkdir()
    for name in ("replay.npz", "proof.json"):
        content = (bundle.folder / NAME / name).read_bytes()
        (bundle.folder / "replay-fp16" / name).write_bytes(content)
    assert open_shipped(bundle.folder / "replay-fp16").entry["provenance"] == {"mine": True}
    assert open_shipped(bundle.folder / NAME).entry["provenance"] == {}


def test_a_bundle_of_the_first_schema_is_found_by_its_precisions(bundle: Bundle) -> None:
    def older(body: dict[str, Any]) -> None:
        recipe = body["artifacts"][0]["recipe"]
        body["artifacts"][0]["recipe"] = {key: recipe[key] for key in ("weights", "activations")}

    forge(bundle.folder, older)
    assert open_shipped(bundle.folder / NAME).entry["recipe"] == FP32_ALONE


FP32_ALONE = {"weights": "float32", "activations": "float32"}


def test_a_bundle_of_integers_is_held_to_its_own_limits_on_the_device(bundle: Bundle) -> None:
    def integers(body: dict[str, Any]) -> None:
        (entry,) = body["artifacts"]
        entry["recipe"] = INT8.to_json()
        for name in ("replay.npz", "proof.json"):
            body["files"][f"replay-int8/{name}"] = body["files"].pop(f"{NAME}/{name}")

    folder = bundle.folder / NAME
    proof = json.loads((folder / "proof.json").read_bytes())
    proof["limits"] = asdict(quantized_limits(15.0))
    (folder / "proof.json").write_text(json.dumps(proof))
    digest = hashlib.sha256((folder / "proof.json").read_bytes()).hexdigest()
    forge(bundle.folder, lambda body: body["files"].update({f"{NAME}/proof.json": digest}))
    forge(bundle.folder, integers)
    shipped = open_shipped(folder.rename(bundle.folder / "replay-int8"))
    assert shipped.limits == quantized_limits(15.0)
    for decibels, passes in ((16, True), (14, False)):
        share = np.float32(10 ** (-decibels / 20))
        got = [{name: a * (1 + share) for name, a in each.items()} for each in shipped.expected]
        proved = shipped.prove(got, {"processor": "Orin"})
        assert proved["passed"] is passes
        assert proved["outputs"][0]["sqnr_db"] == pytest.approx(decibels, abs=0.01)


def test_a_right_answer_comes_back_as_a_proof(bundle: Bundle, shipped: Shipped) -> None:
    proof = shipped.prove(shipped.expected, HOST, ["a note"])
    assert proof["outputs"][0]["sqnr_db"] is None  # infinite: equal to the bit
    evidence.write_evidence(shipped.folder, [proof])
    again = open_bundle(bundle.folder)
    (read,) = again.device_proofs(NAME)
    assert (read.level, read.passed, read.samples, read.notes) == (
        "on-device",
        True,
        3,
        ("a note",),
    )
    assert read.host == HOST
    assert again.standing(NAME) == "on-device"


def test_one_wrong_element_comes_back_as_failing(bundle: Bundle, shipped: Shipped) -> None:
    got = [{"scores": answer["scores"].copy()} for answer in shipped.expected]
    got[1]["scores"][0, 3] += 0.1
    evidence.write_evidence(
        shipped.folder, [shipped.prove(shipped.expected, HOST), shipped.prove(got, HOST)]
    )
    again = open_bundle(bundle.folder)
    assert [proof.passed for proof in again.device_proofs(NAME)] == [True, False]
    assert again.standing(NAME) == "fails on device"


def test_a_sample_left_out_is_not_counted_and_none_is_no_proof(shipped: Shipped) -> None:
    first = shipped.prove([shipped.expected[0], None, None], HOST)
    assert (first["samples"], first["passed"]) == (1, True)
    none = shipped.prove([None, None, None], HOST)
    assert (none["samples"], none["failures"]) == (0, ["There is no sample to compare on."])


def test_a_reason_that_is_no_number_fails_a_proof_too(shipped: Shipped) -> None:
    proof = shipped.prove(shipped.expected, HOST, failures=["The label is wrong."])
    assert (proof["passed"], proof["failures"]) == (False, ["The label is wrong."])


@pytest.mark.parametrize(
    ("given", "declared", "shape", "becomes"),
    [
        (np.array([[1.5]], np.float16), "float32", (1, 1), np.array([[1.5]], np.float32)),
        (np.array([1, 2], np.int32), "int64", (2,), np.array([1, 2], np.int64)),
        (np.array([1.0, 0.0], np.float32), "bool", (2,), np.array([True, False])),
        (np.array([7], np.int32), "int64", (), np.array(7, np.int64)),
        (np.array([0.5], np.float32), "bool", (1,), np.array([0.5], np.float32)),
        (np.array([2.9], np.float32), "int64", (1,), np.array([2.9], np.float32)),
        (np.array([np.nan], np.float32), "int64", (1,), np.array([np.nan], np.float32)),
    ],
)
def test_dtypes_become_the_manifests_where_no_value_changes(
    bundle: Bundle, given: Any, declared: str, shape: tuple[int, ...], becomes: Any
) -> None:
    spec = {"name": "y", "shape": list(shape), "dtype": declared}
    whole = open_shipped(bundle.folder / NAME)
    odd = Shipped(whole.folder, {"outputs": [spec]}, {}, {}, (), ())
    answer = odd.as_declared({"y": given, "more": given})
    assert list(answer) == ["y"]
    assert answer["y"].dtype == becomes.dtype
    np.testing.assert_array_equal(answer["y"], becomes)


def test_latencies_come_back_as_a_measurement(bundle: Bundle, shipped: Shipped) -> None:
    times = [float(number) for number in range(100, 0, -1)]
    evidence.write_measurement(shipped, times, HOST, 12.5, {"gpu_times_ms": [0.5]})
    measured = open_bundle(bundle.folder).measurement(NAME)
    assert measured is not None
    assert (measured["p50_ms"], measured["p90_ms"], measured["p99_ms"]) == (50.0, 90.0, 99.0)
    assert (measured["device"], measured["warm_load_ms"]) == ("Orin", 12.5)
    assert measured["noise"] == "the slowest tenth of the runs took 1.8 times the median"
    assert measured["gpu_times_ms"] == [0.5]
    evidence.write_measurement(shipped, [1.0] * 10, HOST, 1.0)
    measured = open_bundle(bundle.folder).measurement(NAME)
    assert measured is not None
    assert measured["noise"] == ""


def test_the_conclusion_is_the_worst_and_the_time_the_best_proven(
    bundle: Bundle, shipped: Shipped, capsys: pytest.CaptureFixture[str]
) -> None:
    right = shipped.prove(shipped.expected, HOST, ["a note"])
    wrong = shipped.prove([{}, {}, {}], {**HOST, "processor": "other"}, ["a note"])
    trials = [Trial("slow", right, [3.0]), Trial("quick", right, [2.0]), Trial("off", wrong, [1.0])]
    assert evidence.conclude(shipped, trials) == 1
    shown = capsys.readouterr()
    assert shown.err == "off is not proven: Output 'scores' is missing.\n"
    assert shown.out.count("Note: a note") == 1
    assert shown.out.splitlines()[3].split()[:4] == ["off", "not", "proven", "-"]
    measured = open_bundle(bundle.folder).measurement(NAME)
    assert measured is not None
    assert measured["p50_ms"] == 2.0
    assert evidence.conclude(shipped, trials[:2]) == 0


def test_a_file_is_replaced_whole_or_not_at_all(shipped: Shipped) -> None:
    path = shipped.folder / "new"
    evidence.write_beside(path, b"1")
    evidence.write_beside(path, b"2")
    assert path.read_bytes() == b"2"
    (shipped.folder / "taken").mkdir()
    with pytest.raises(NotPossible, match="taken could not be written: Is a directory"):
        evidence.write_beside(shipped.folder / "taken", b"3")
    assert not list(shipped.folder.glob(".*"))


@pytest.mark.parametrize(
    ("stop", "code", "sentence"),
    [
        (Refused("Copy it again."), 4, "Copy it again.\n"),
        (NotPossible("No GPU."), 3, "No GPU.\n"),
        (MemoryError(), 3, "There is too little memory; close what else runs and try again.\n"),
        (KeyboardInterrupt(), 130, "Stopped; what was in the bundle before is unchanged.\n"),
    ],
)
def test_what_stops_a_script_is_a_sentence_and_a_code(
    capsys: pytest.CaptureFixture[str], stop: BaseException, code: int, sentence: str
) -> None:
    def work() -> int:
        raise stop

    assert evidence.run_script(work) == code
    assert capsys.readouterr().err == sentence
    assert evidence.run_script(lambda: 7) == 7


@pytest.mark.parametrize("path", ON_DEVICES)
def test_what_runs_on_a_device_is_python_3_10_and_needs_little(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(), feature_version=(3, 10))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    runtimes = {
        "edgekit",
        "evidence",
        "coreml" in path and "coremltools",
        "coreml" in path and "PIL",
    }
    if path == ON_DEVICES[0]:
        runtimes = set()
    assert names - runtimes <= {"numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", ON_DEVICES[1:])
def test_an_older_python_can_read_the_script_far_enough_to_refuse(path: str) -> None:
    text = (ROOT / path).read_text()
    ast.parse(text, feature_version=(3, 8))
    assert text.index("sys.version_info <") < text.index("import evidence")


def test_equal_to_the_bit_is_no_number_in_json(shipped: Shipped) -> None:
    deviations, _ = evidence.compare(["scores"], shipped.expected, shipped.expected, shipped.limits)
    assert deviations[0].sqnr_db == math.inf
    assert "Infinity" not in json.dumps(shipped.prove(shipped.expected, HOST), allow_nan=False)
