"""A staged folder appears whole or not at all, and refusals of the system become sentences."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekit import files
from edgekit.bundle import open_bundle
from edgekit.errors import DamagedFile, StorageError
from edgekit.files import PARTIAL, sha256, staged_folder, storage_errors
from edgekit.testing import example_bundle

KILLED = """
import sys, time
from pathlib import Path
from edgekit.files import staged_folder
with staged_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "manifest.json").write_text("{}")
    print("written", flush=True)
    time.sleep(60)
"""
LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from edgekit.errors import StorageError
from edgekit.testing import example_bundle, example_reference
import edgekit.testing
reference = example_reference(1)
big = {"x": np.zeros((1, 300_000), np.float32)}
edgekit.testing.example_reference = lambda: type(reference)((big,), ({"scores": big["x"]},), "")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    example_bundle(Path(sys.argv[1]))
except StorageError as error:
    print(error)
"""


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def ended_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_folder_appears_with_all_its_files_when_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with staged_folder(final, replace=False) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    assert listing(tmp_path) == ["deep", "deep/out", "deep/out/a"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_block_leaves_the_old_folder_and_no_debris(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")

    def write() -> None:
        with staged_folder(final, replace=True) as folder:
            (folder / "new").write_text("new")
            raise kind

    with pytest.raises(kind):
        write()
    assert listing(tmp_path) == ["out", "out/old"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_leaves_the_new_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")
    with staged_folder(final, replace=True) as folder:
        (folder / "new").write_text("new")
    assert listing(tmp_path) == ["out", "out/new"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
def test_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert listing(tmp_path) == ["a", "a/b", "b", "b/a"]
    assert not files._exchange(tmp_path / "a", tmp_path / "none")


def test_without_the_right_to_replace_a_full_folder_stays(tmp_path: Path) -> None:
    final = tmp_path / "out"

    def write() -> None:
        with staged_folder(final, replace=False):
            final.mkdir()
            (final / "old").write_text("old")

    with pytest.raises(StorageError, match="out cannot be written: it appeared meanwhile and is"):
        write()
    assert listing(tmp_path) == ["out", "out/old"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    with staged_folder(final, replace=False) as folder:
        (folder / "a").touch()
    assert listing(tmp_path) == ["out", "out/a"]


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="a part of the path is a file; choose another folder"),
        staged_folder(tmp_path / "file" / "deep" / "out", replace=False),
    ):
        pass
    with (
        pytest.raises(StorageError, match="a file is in the way; choose another folder"),
        staged_folder(tmp_path / "file" / "out", replace=False),
    ):
        pass


def test_a_name_that_is_too_long_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="the name is too long; choose a shorter one"),
        staged_folder(tmp_path / ("a" * 250), replace=False),
    ):
        pass


def test_what_a_killed_process_left_is_cleared_by_the_next_write(tmp_path: Path) -> None:
    dead = ended_process()
    for name in (f".out.{dead}{PARTIAL}", f".out.{dead}.old{PARTIAL}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    kept = [f".out.{os.getppid()}{PARTIAL}", f".outer.{dead}{PARTIAL}", ".out.partial"]
    for name in kept:
        (tmp_path / name).mkdir()
    with staged_folder(tmp_path / "out", replace=False):
        pass
    assert listing(tmp_path) == sorted([*kept, "out"])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_write_leaves_the_old_bundle_and_debris_that_is_never_opened(
    tmp_path: Path,
) -> None:
    final = tmp_path / "out"
    example_bundle(final)
    before = {name: sha256(final / name) for name in listing(final) if (final / name).is_file()}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(final)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "written\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    debris = tmp_path / f".out.{child.pid}{PARTIAL}"
    assert debris.is_dir()
    with pytest.raises(DamagedFile, match="what a stopped export left, not a bundle; delete it"):
        open_bundle(debris)
    open_bundle(final)
    assert before == {name: sha256(final / name) for name in before}
    with staged_folder(final.with_name("out"), replace=True) as temporary:
        shutil.copytree(final, temporary, dirs_exist_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    open_bundle(final)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is set as on Linux")
def test_a_disk_that_takes_no_more_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert "cannot be written: the file is larger than this system allows" in done.stdout
    assert done.stderr == ""
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "the disk is full; free some space or choose another folder."),
        (errno.EDQUOT, "your quota is used up; free some space or choose another folder."),
        (errno.EACCES, "it is not writable; change its rights or choose another folder."),
        (errno.EPERM, "it is not writable; change its rights or choose another folder."),
        (errno.EROFS, "it lies on a read-only disk; choose another folder."),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_the_system_says_no_and_the_sentence_says_why(number: int, sentence: str) -> None:
    with (
        pytest.raises(StorageError, match=f"^out cannot be written: {sentence}"),
        storage_errors(Path("out")),
    ):
        raise OSError(number, os.strerror(number), "out")


def test_an_error_that_is_a_sentence_already_passes_unchanged() -> None:
    first = StorageError("a sentence")
    with pytest.raises(StorageError) as caught, storage_errors(Path("out")):
        raise first
    assert caught.value is first


def test_a_full_disk_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = example_bundle(tmp_path / "out")

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageError, match=r"out cannot be written: the disk is full; free"):
            example_bundle(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert open_bundle(tmp_path / "out") == bundle


def test_a_place_that_takes_no_folder_is_said() -> None:
    with (
        pytest.raises(StorageError, match=r"^/proc/out cannot be written: "),
        staged_folder(Path("/proc/out"), replace=False),
    ):
        pass


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_running_process_is_alive_and_an_ended_one_is_not() -> None:
    assert files._alive(os.getpid())
    assert files._alive(1)
    dead = ended_process()
    deadline = time.monotonic() + 5
    while files._alive(dead) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not files._alive(dead)
