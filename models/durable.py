"""A folder, or a file, that is written whole or not at all, whatever is killed, full or cut off from power on the way."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PARTIAL, PREVIOUS = ".partial", ".previous"
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def replace_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder of these files, and nothing else, at `path`; what was there stays until the new one is on disk.

    The files are written to a sibling folder and synced, then the two folders change places in one step.
    """
    path = path.resolve()
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent):
        _clear_leftovers(path)
        aside = parent / f".{path.name}.{secrets.token_hex(4)}{PARTIAL}"
        try:
            aside.mkdir()
            for name, data in files.items():
                _write_synced(aside / name, data)
            _sync(aside)
            if path.exists():
                _swap(aside, path)
            else:
                aside.rename(path)
            _sync(parent)
        finally:
            # what is left of the attempt, or, once it has succeeded, the old folder
            shutil.rmtree(aside, ignore_errors=True)


def replace_file(path: Path, data: bytes, mode: int = 0o666, *, shared: bool = False) -> None:
    """Put a file at `path`, of this mode less the umask; what was there stays until the new one is on disk.

    One writer at a time, unless it is `shared`: then what a killed one leaves stays beside it.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    aside = path.with_name(f"{path.name}{own}{PARTIAL}")
    aside.unlink(missing_ok=True)  # what a killed writer left
    try:
        _write_synced(aside, data, mode)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # a full disk should not stay full of it
        raise
    _sync(path.parent)


def leftover(path: Path) -> Path | None:
    """Where an interrupted replacement left the folder that was at `path`, if it did."""
    return next((entry for entry in _siblings(path) if entry.suffix == PREVIOUS), None)


def _swap(new: Path, old: Path) -> None:
    if _exchange(new, old):
        return
    # this file system cannot: for an instant nothing is at `old`, and a kill then is mended by the next writer
    previous = new.with_suffix(PREVIOUS)
    old.rename(previous)
    try:
        new.rename(old)
    except OSError:
        previous.rename(old)
        raise
    previous.rename(new)  # from where the caller removes it


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step (Linux, renameat2 and RENAME_EXCHANGE); False where unknown."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    if (code := ctypes.get_errno()) in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _clear_leftovers(path: Path) -> None:
    """Under the lock nobody else writes: what a killed writer took away is put back, what it left is removed."""
    if (previous := leftover(path)) and not path.exists():
        previous.rename(path)
    for entry in _siblings(path):
        shutil.rmtree(entry, ignore_errors=True)


def _siblings(path: Path) -> list[Path]:
    path = path.resolve()
    try:
        entries = sorted(path.parent.iterdir())
    except OSError:
        return []
    return [entry for entry in entries if entry.name.startswith(f".{path.name}.") and entry.suffix in (PARTIAL, PREVIOUS)]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time in a folder, where the file system has locks."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (*UNSUPPORTED, errno.EBADF, errno.ENOLCK):  # as some network file systems answer
                raise
        yield
    finally:
        os.close(descriptor)  # which unlocks


def _write_synced(path: Path, data: bytes, mode: int = 0o666) -> None:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if sys.platform == "win32":  # has no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
