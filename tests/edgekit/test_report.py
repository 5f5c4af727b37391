"""The page shows proofs and latencies, and trusts nothing that a bundle says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgekit.accuracy import Accuracy
from edgekit.bundle import Bundle, open_bundle
from edgekit.cli import main
from edgekit.evidence import digest_of, open_shipped, write_evidence, write_measurement
from edgekit.files import sha256
from edgekit.gate import Attempt
from edgekit.manifest import NAME
from edgekit.recipe import INT8
from edgekit.report import html_report
from edgekit.speed import Speed
from edgekit.testing import example_bundle

MEASURED = {
    "p50_ms": 1.1,
    "p99_ms": 2.0,
    "noise": "",
    "threads": 2,
    "times_ms": [1.0, 1.1, 1.1, 2.0, 9.0],
}


class Tags(HTMLParser):
    """Collects what is opened and what is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)


def tags(page: str) -> list[str]:
    parser = Tags()
    parser.feed(page)
    return parser.opened


def test_a_bundle_is_a_table_with_its_proof(tmp_path: Path) -> None:
    page = html_report([example_bundle(tmp_path / "b")])
    assert "<td>replay</td><td>fp32</td><td>executed</td>" in page
    assert "not measured" in page
    assert "svg" not in tags(page)


def test_measured_times_are_drawn_up_to_the_99th_percentile(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "b")
    bundle.write_measurement("replay-fp32", MEASURED)
    page = html_report([bundle])
    assert tags(page).count("rect") == 3
    heights = [float(text) for text in re.findall(r'height="([\d.]+)" fill', page)]
    assert heights == [30.0, 60.0, 30.0]
    assert "1.000 to 2.000 ms (p99), 5 runs, 2 threads" in page


def test_equal_times_are_one_bar(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "b")
    same = {**MEASURED, "times_ms": [1.0, 1.0], "p99_ms": 1.0}
    bundle.write_measurement("replay-fp32", same)
    assert tags(html_report([bundle])).count("rect") == 1


def test_a_hostile_bundle_puts_no_tag_on_the_page(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "<script>b")
    bundle.write_measurement("replay-fp32", {**MEASURED, "noise": "<script>alert(1)</script>"})
    assert "script" not in tags(html_report([bundle]))
    for change in ({"threads": "<script>"}, {"threads": 0, "device": "<script>"}):
        bundle.write_measurement("replay-fp32", {**MEASURED, **change})
        assert "script" not in tags(html_report([bundle]))


def test_the_command_writes_the_page_and_still_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example_bundle(tmp_path / "b")
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "b"), "-o", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert "replay" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "b"), "-o", str(tmp_path / "no/where.html")]) == 3
    assert "where.html cannot be written" in capsys.readouterr().err


def test_times_of_a_device_name_it_in_place_of_threads(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "b")
    shipped = open_shipped(tmp_path / "b/replay-fp32")
    write_measurement(shipped, [1.0, 1.1, 1.2], {"processor": "Orin & Nano"}, load_ms=5.0)
    page = html_report([bundle])
    assert "3 runs, Orin &amp; Nano</small>" in page
    assert "threads" not in page


@pytest.mark.parametrize(
    ("passed", "standing"),
    [
        (True, "<td>on-device</td>"),
        (False, "<td><span class=no>fails on device</span></td>"),
    ],
)
def test_what_a_device_proved_is_shown_and_what_it_refuted_in_red(
    tmp_path: Path, passed: bool, standing: str
) -> None:
    bundle = example_bundle(tmp_path / "b")
    shipped = open_shipped(tmp_path / "b/replay-fp32")
    reasons = [] if passed else ["It differs."]
    proof = shipped.prove(shipped.expected, {"processor": "Orin"}, failures=reasons)
    write_evidence(shipped.folder, [proof])
    assert standing in html_report([bundle])


def test_a_proof_without_numbers_shows_none(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "b")
    path = tmp_path / "b/replay-fp32/proof.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "level": "static", "outputs": []}))
    assert "<td>static</td><td class=n>-</td><td class=n>-</td>" in html_report([bundle])


TRIED = Attempt(
    artifact="replay-int8",
    recipe=replace(INT8, keep_float=("head", "softmax")),
    sqnr_db=31.25,
    accuracy=Accuracy("top1", 97.0, 98.25, 400, "val.npz"),
    speed=Speed(4.0, 2.0, 2.0, 1.5, 2.5, 1.0, 2),
    size_bytes=1000,
    float_bytes=4000,
).judged("chosen", "the fastest within the budget")


def with_tried(folder: Path, *attempts: Attempt) -> Bundle:
    """A whole bundle that holds the table of ``attempts``."""
    example_bundle(folder)
    (folder / "tried.json").write_text(json.dumps([each.to_json() for each in attempts]))
    body = json.loads((folder / NAME).read_bytes())
    del body["digest"]
    body["files"]["tried.json"] = sha256(folder / "tried.json")
    (folder / NAME).write_text(json.dumps({**body, "digest": digest_of(body)}))
    return open_bundle(folder)


def test_all_that_was_tried_is_a_table_with_the_speed_drawn(tmp_path: Path) -> None:
    unmeasured = Attempt("replay-int4", INT8).judged("not tried", "there is no kernel")
    page = html_report([with_tried(tmp_path / "b", TRIED, unmeasured)])
    assert "<td>replay-int8 (2 float)</td><td class=n>97.00 %</td><td class=n>31.2 dB</td>" in page
    assert "<td class=n>1.0 kB</td><td>chosen</td><td>the fastest within the budget</td>" in page
    assert "<td>replay-int4</td>" + "<td class=n>-</td>" * 4 in page
    # Sixty pixels are float's speed, marked; the bar is the ratio and the line its spread.
    assert '<rect y="3" width="120.0" height="8" fill="#369"/>' in page
    assert '<path d="M90.0 7H150.0" stroke="#000"/><path d="M60 0V14" stroke="#b00"/>' in page
    assert "<small>2.00x (1.50 to 2.50)</small>" in page


def test_a_bundle_for_which_nothing_was_tried_has_no_such_table(tmp_path: Path) -> None:
    assert "Tried" not in html_report([example_bundle(tmp_path / "b")])


def test_a_hostile_table_puts_no_tag_on_the_page(tmp_path: Path) -> None:
    evil = replace(TRIED, artifact="<script>", verdict="<script>", reason="<script>alert(1)")
    page = html_report([with_tried(tmp_path / "b", evil)])
    assert "script" not in tags(page)
    assert page.count("&lt;script&gt;") == 3
