"""Files that are there whole or not at all, and folders that one process holds."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that it is there whole or not at all.

    Yields a temporary path in the same folder; what is written there takes the place of `path`
    when the block ends well. When it raises, `path` is as it was and nothing else stays behind.

    Args:
        path: The file to write; its folder is made if it is missing.

    Returns:
        A context manager that gives the temporary `Path`.

    Example:
        >>> import pathlib, tempfile
        >>> from keras_norm.experiments import replace_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.txt")
        ...     with replace_file(path) as temporary:
        ...         _ = temporary.write_text("all of it")
        ...     path.read_text()
        'all of it'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_remains(path: Path) -> None:
    """Remove what `replace_file` left beside `path` in processes that were killed.

    To be called under a lock: another process may be writing such a file.
    """
    remains = re.compile(rf"\.{re.escape(path.stem)}\.[0-9a-f]{{8}}{re.escape(path.suffix)}")
    for other in path.parent.glob(".*"):
        if remains.fullmatch(other.name):
            other.unlink(missing_ok=True)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # on the disk, or for this user


def no_room(error: BaseException) -> str:
    """What the system says of a disk that is full; "" of any other error."""
    code = error.errno if isinstance(error, OSError) else None
    return os.strerror(code) if code in NO_ROOM else ""


def require_writable(folder: Path) -> None:
    """Make a folder, and raise an OSError unless files can be written into it."""
    with replace_file(folder / ".writable") as probe:
        probe.touch()
    (folder / ".writable").unlink()


class FolderInUseError(RuntimeError):
    """Another process holds the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops by itself when the process dies.

    Raises:
        FolderInUseError: if another process holds it.
    """
    path = folder / ".results.lock"
    file = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _acquire(path: Path) -> IO[str]:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 -- held while the lock is
        if not _try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise FolderInUseError(
                "Only one process at a time may write its results into a folder. Received: "
                f"out={str(path.parent)!r}, in use by process {holder}. Wait for it, or give "
                "another folder (results of experiments can be merged)."
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                print(os.getpid(), file=file, flush=True)
                return file
        file.close()  # the last holder took the file away in between


def _try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
