"""Text files that appear whole or not at all, and paths in messages."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path_for_message(path: str | os.PathLike[str]) -> str:
    """A path for a message that it does not exist: a relative one with the folder that it is relative to."""
    return str(path) if os.path.isabs(path) else f"{path} (relative to {os.getcwd()})"


def no_folder(path: str | os.PathLike[str]) -> str:
    """What is wrong with a path that is no folder, for a message."""
    return f"{path} is a file" if os.path.exists(path) else f"{path_for_message(path)} does not exist"


def check_run_folder(run_dir: str | os.PathLike[str]) -> None:
    """Refuse the folder of a run that does not exist.

    Raises:
        FileNotFoundError: it does not, or is a file.
    """
    if not os.path.isdir(run_dir):
        raise FileNotFoundError(f"{no_folder(run_dir)}; give the folder of a run")


def error_text(error: Exception, written: str | os.PathLike[str] | None = None) -> str:
    """What went wrong, without Python's number of it.

    Args:
        error: what was raised.
        written: what the command writes, where it knows: of a full disk the system tells no name.

    Raises:
        BrokenPipeError: given one, which is for `command_line.ending_with_reader`: a command whose reader has gone says nothing.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, OSError) and error.strerror:
        where = error.filename
        if error.errno in _NO_ROOM:
            # where an error names two files, as for a copy, the second is the one written
            where = error.filename2 or where or written
        return f"{error.strerror}: {where}" if where else error.strerror
    return str(error)


@contextmanager
def telling_errors_of_the_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise errors of the disk, which libraries in Rust report in words only, as the OSError that they are, with `path`."""
    try:
        yield
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def write_whole(path: Path, text: str, make_folder: bool = False) -> None:
    """Write UTF-8 text, newlines as they are, so that the file is replaced as a whole or stays as it was, even if the machine dies.

    Without `make_folder` a missing folder is an error: the file system of a run's folder may be unmounted, and what is
    written under its mount point would be lost.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    sync(temporary)  # a name may reach the disk before what it names
    os.replace(temporary, path)


def lock(descriptor: int, held: ValueError) -> None:
    """Hold an open file, or a folder, against other processes until it is closed here and in the processes that inherited it.

    File systems without locks hold nothing, of which there are few: Lustre mounted without `flock` is one.

    Raises:
        ValueError: `held`, where another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise held from None
    except OSError:
        pass


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give the file that the block writes the mode that `open` gives one, by the umask; some libraries write privately."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)
