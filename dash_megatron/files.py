"""Text files that appear whole or not at all, and paths in messages."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def path_for_message(path: str | os.PathLike[str]) -> str:
    """A path for a message that it does not exist: a relative one with the folder that it is relative to."""
    return str(path) if os.path.isabs(path) else f"{path} (relative to {os.getcwd()})"


def check_run_folder(run_dir: str | os.PathLike[str]) -> None:
    """Refuse the folder of a run that does not exist.

    Raises:
        FileNotFoundError: it does not, or is a file.
    """
    if not os.path.isdir(run_dir):
        raise FileNotFoundError(f"{path_for_message(run_dir)} does not exist; give the folder of a run")


def error_text(error: Exception) -> str:
    """What went wrong, without Python's number of it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def write_whole(path: Path, text: str, make_folder: bool = False) -> None:
    """Write UTF-8 text, newlines as they are, so that the file is replaced as a whole or stays as it was.

    Without `make_folder` a missing folder is an error: the file system of a run's folder may be unmounted, and what is
    written under its mount point would be lost.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give the file that the block writes the mode that `open` gives one, by the umask; some libraries write privately."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)
