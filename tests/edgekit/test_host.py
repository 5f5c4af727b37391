"""What this machine is and how busy it is, also where /proc is missing."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgekit import host

linux = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="there is no /proc")


def without_proc(path: Path) -> str:
    raise FileNotFoundError(str(path))


def test_the_description_is_plain_json() -> None:
    found = host.describe()
    assert json.loads(json.dumps(found)) == found
    assert sorted(found) == [
        "cores",
        "features",
        "int8",
        "machine",
        "processor",
        "python",
        "system",
    ]
    assert found["processor"]


def test_the_cores_are_those_this_process_may_use() -> None:
    assert 1 <= host.cores() <= (os.cpu_count() or 1)
    assert host.describe()["cores"] == host.cores()


@pytest.mark.parametrize(
    ("text", "name", "feature"),
    [
        ("processor\t: 0\nmodel name\t: Fast: CPU\nflags\t\t: fpu avx2\n", "Fast: CPU", "avx2"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "", "asimd"),
    ],
)
def test_features_are_read_on_both_kinds_of_processor(
    monkeypatch: pytest.MonkeyPatch, text: str, name: str, feature: str
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    found, flags = host._cpuinfo()
    assert found == name
    assert feature in flags


@pytest.mark.parametrize(
    ("flags", "machine", "kind"),
    [
        ({"avx2", "avx512_vnni"}, "x86_64", "vnni"),
        ({"avx2", "avx_vnni"}, "x86_64", "vnni"),
        ({"avx2", "avx512f"}, "x86_64", "avx2"),
        ({"sse4_2"}, "x86_64", "other"),
        ({"asimd", "asimddp"}, "aarch64", "arm64"),
        (set(), "arm64", "arm64"),  # a Mac, which has no /proc
        (set(), "ARM64", "arm64"),
        (set(), "AMD64", "other"),
    ],
)
def test_kinds_of_processors_are_told_apart_by_how_they_add_up_8_bit_products(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], machine: str, kind: str
) -> None:
    monkeypatch.setattr(host, "_cpuinfo", lambda: ("a processor", frozenset(flags)))
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert host.int8_kernels() == kind


def test_without_proc_there_is_no_figure_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", without_proc)
    assert host.busy_seconds() is None
    assert host._cpuinfo() == ("", frozenset())


def test_busy_time_counts_everything_but_idling_and_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: "cpu  1 2 4 900 800 8 16 32 64 0\ncpu0\n")
    assert host.busy_seconds() == (1 + 2 + 4 + 8 + 16 + 32) / os.sysconf("SC_CLK_TCK")


@linux
def test_own_work_is_seen_in_both_counts() -> None:
    busy, own = host.busy_seconds(), host.own_seconds()
    start = time.process_time()
    while time.process_time() - start < 0.1:
        pass
    after = host.busy_seconds()
    assert busy is not None
    assert after is not None
    assert host.own_seconds() - own >= 0.08
    assert after - busy >= 0.05


def test_versions_are_those_installed() -> None:
    assert host.installed_version("numpy") == np.__version__
    assert host.installed_version("edgekit-no-such-package") is None
    assert sys.version.startswith(str(host.describe()["python"]))
