"""Tables line up, sizes read well, and progress is drawn on a terminal only."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekit import render
from edgekit.accuracy import Accuracy
from edgekit.bundle import open_bundle
from edgekit.evidence import open_shipped, write_evidence
from edgekit.gate import Attempt
from edgekit.layers import LayerDeviation
from edgekit.profile import Measurement
from edgekit.recipe import INT8
from edgekit.render import (
    Progress,
    bundle_rows,
    bundle_table,
    layer_table,
    measurement_table,
    op_table,
    size_text,
    table,
    tried_table,
)
from edgekit.speed import Speed
from edgekit.testing import example_bundle

QUIET = Measurement(
    artifact="replay-fp32",
    device="this host",
    threads=2,
    import_ms=1.0,
    cold_load_ms=12.34,
    warm_load_ms=2.0,
    first_run_ms=3.0,
    times_ms=(1.0, 1.1, 1.2),
    peak_memory_bytes=50_000_000,
    model_memory_bytes=1_000_000,
    size_bytes=1234,
    others_busy_cores=0.0,
    ops=(),
    host={"cores": 2},
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_words_stand_to_the_left_and_numbers_to_the_right() -> None:
    assert table(("name", "size"), [("a", 5), ("long name", 1234)]).splitlines() == [
        "name       size",
        "---------  ----",
        "a             5",
        "long name  1234",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table(("name", "size"), []) == "name  size\n----  ----"


def test_no_line_ends_in_blanks() -> None:
    lines = table(("a", "b"), [("x", "long word"), ("y", "z")]).splitlines()
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 kB"), (1234, "1.2 kB"), (100_000, "0.10 MB"), (1_280_000, "1.28 MB")],
)
def test_sizes_are_in_powers_of_ten(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_bundle_is_shown_before_and_after_it_was_measured(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    (row,) = bundle_rows(bundle)
    assert (row["artifact"], row["precision"], row["measurement"]) == ("replay-fp32", "fp32", None)
    assert "not measured" in bundle_table(bundle)
    bundle.write_measurement("replay-fp32", QUIET.to_json())
    measured = open_bundle(bundle.folder)
    assert "1.10 ms" in bundle_table(measured)
    assert "executed" in bundle_table(measured)


def test_an_artifact_kept_unproven_is_shown_as_such(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    failed = {**bundle.proof("replay-fp32").to_json(), "failures": ["It differs."]}
    (bundle.folder / "replay-fp32/proof.json").write_text(json.dumps(failed))
    assert "not proven" in bundle_table(bundle)
    assert bundle_rows(bundle)[0]["standing"] == "not proven"


def test_a_measurement_is_one_row() -> None:
    header, _, row = measurement_table([QUIET]).splitlines()
    assert header.split()[:3] == ["artifact", "threads", "p50"]
    for text in ("1.100 ms", "1.200 ms", "12.3 ms", "50.00 MB", "1.2 kB", "quiet"):
        assert text in row


def test_the_slowest_ops_are_shown_with_their_share_of_all() -> None:
    ops = [{"op": "Conv", "node": f"n{i}", "microseconds": us} for i, us in enumerate((30, 10))]
    lines = op_table(ops, count=1).splitlines()
    assert len(lines) == 3
    assert lines[2].split() == ["Conv", "n0", "30.0", "75.0", "%"]
    assert len(op_table([]).splitlines()) == 2


def test_progress_is_silent_where_no_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with Progress().shown() as progress:
        progress("working")
    assert stream.getvalue() == ""


def test_progress_names_the_step_and_leaves_a_clean_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    seconds = itertools.count()
    monkeypatch.setattr(render, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with Progress().shown() as progress:
        progress("lowering")
        deadline = time.monotonic() + 10
        while "lowering" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert re.fullmatch(r"(\r\x1b\[Klowering … \d+ s)+\r\x1b\[K", stream.getvalue())


def test_short_work_draws_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with Progress().shown() as progress:
        progress("working")
        time.sleep(0.3)  # long enough to be asked whether to draw
    assert stream.getvalue() == "\r\x1b[K"


@pytest.mark.parametrize(("reasons", "word"), [([], "on-device"), (["No."], "fails on device")])
def test_what_a_device_found_is_the_word_for_the_artifact(
    tmp_path: Path, reasons: list[str], word: str
) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    assert bundle_rows(bundle)[0]["standing"] == "executed"
    shipped = open_shipped(bundle.folder / "replay-fp32")
    proof = shipped.prove(shipped.expected, {"processor": "Orin"}, failures=reasons)
    write_evidence(shipped.folder, [proof])
    assert word in bundle_table(bundle)
    assert bundle_rows(bundle)[0]["standing"] == word


def test_a_proof_without_numbers_shows_none(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    path = bundle.folder / "replay-fp32/proof.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "level": "static", "outputs": []}))
    assert bundle_table(bundle).splitlines()[2].split()[2:5] == ["static", "-", "-"]


def deviation(node: str, module: str, sqnr_db: float, diverges: bool = False) -> LayerDeviation:
    return LayerDeviation(node, "aten.relu.default", module, sqnr_db, True, diverges)


def test_layers_are_shown_by_module_with_the_sentence_below() -> None:
    found = [
        deviation("relu", "stem", 70.0),
        deviation("relu_1", "stem", 9.87, diverges=True),
        deviation("relu_2", "", math.inf),
    ]
    lines = layer_table("coreml-fp16", found, "It first differs at ...").splitlines()
    assert lines[0] == "coreml-fp16, by module:"
    assert [line.split() for line in lines[3:5]] == [
        ["stem", "aten.relu.default", "relu_1", "9.9", "dB", "diverges"],
        ["(the", "model)", "aten.relu.default", "relu_2", "equal", "ok"],
    ]
    assert lines[5:] == ["It first differs at ..."]


def test_without_layers_the_reason_stands_alone() -> None:
    assert layer_table("replay-fp32", [], "It hides them.").splitlines() == [
        "replay-fp32, by module:",
        "It hides them.",
    ]


def test_all_that_was_tried_is_a_row_with_its_reason() -> None:
    chosen = Attempt(
        artifact="replay-int8",
        recipe=replace(INT8, keep_float=("head",)),
        sqnr_db=31.25,
        accuracy=Accuracy("top1", 97.0, 98.25, 400, "val.npz"),
        speed=Speed(4.0, 2.0, 2.0, 1.5, 2.5, 1.0, 2),
        size_bytes=1000,
    ).judged("chosen", "the fastest within the budget")
    unmeasured = Attempt("replay-int4", INT8).judged("not tried", "there is no kernel")
    header, _, *rows = tried_table([chosen, unmeasured]).splitlines()
    assert header.split() == ["tried", "mixed", "top-1", "SQNR", "speed", "model", "verdict", "why"]
    assert [re.split(r"  +", row) for row in rows] == [
        [
            *("replay-int8", "1 float", "97.00%", "31.2 dB", "2.00x (1.50 to 2.50)"),
            *("1.0 kB", "chosen", "the fastest within the budget"),
        ],
        ["replay-int4", "-", "-", "-", "-", "not tried", "there is no kernel"],
    ]


def test_where_nothing_was_tried_there_is_no_table() -> None:
    assert tried_table([]) == ""


def test_a_step_over_many_inputs_is_one_step_with_one_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = Progress()
    progress("calibrating fake int8: 1 of 9 [##..]")
    started = progress._started
    progress("calibrating fake int8: 2 of 9 [####]")
    assert progress._started == started
    progress("proving fake int8 on 4 samples")
    assert progress._started > started
