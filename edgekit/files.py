"""Folders and files that appear whole or not at all.

A folder is written beside its final place and renamed. The temporary name ends in
``.partial`` and carries the process id, so that what a killed process left is known for
debris, never opened as a bundle, and cleared by the next export to the same place.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.errors import StorageError

PARTIAL = ".partial"


@contextmanager
def staged_folder(final: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``final`` on a clean exit.

    With ``replace`` an existing folder is exchanged in one step where the system can, and then
    removed. On any error or interrupt the temporary folder goes and ``final`` stays as it was.
    """
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _clear_debris(final)
        temporary = final.parent / f".{final.name}.{os.getpid()}{PARTIAL}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        with storage_errors(final):
            yield temporary
            _sync(temporary)
            _move(temporary, final, replace=replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write ``path`` beside its place and rename: the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _move(temporary: Path, final: Path, *, replace: bool) -> None:
    if replace and final.exists():
        if not _exchange(temporary, final):
            old = final.parent / f".{final.name}.{os.getpid()}.old{PARTIAL}"
            final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(final)  # onto nothing, or onto an empty folder


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step (Linux renameat2); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    return bool(
        library.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
    )


def _sync(folder: Path) -> None:
    """Force the files to the disk, so that a power cut after the rename finds them whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _clear_debris(final: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(\d+)(\.old)?{re.escape(PARTIAL)}")
    for path in final.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the system's refusals to write into sentences."""
    try:
        yield
    except StorageError:
        raise
    except OSError as cause:
        advice = {
            errno.ENOSPC: "the disk is full; free some space or choose another folder",
            errno.EDQUOT: "your quota is used up; free some space or choose another folder",
            errno.EFBIG: "the file is larger than this system allows; choose another disk",
            errno.EACCES: "it is not writable; change its rights or choose another folder",
            errno.EPERM: "it is not writable; change its rights or choose another folder",
            errno.EROFS: "it lies on a read-only disk; choose another folder",
            errno.ENOTDIR: "a part of the path is a file; choose another folder",
            errno.EEXIST: "a file is in the way; choose another folder",
            errno.ENOTEMPTY: "it appeared meanwhile and is not empty; choose another folder",
            errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
        }.get(cause.errno or 0, cause.strerror or "unknown reason")
        raise StorageError(f"{path} cannot be written: {advice}.") from cause


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
