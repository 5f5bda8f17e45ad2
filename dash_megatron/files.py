"""Text files that appear whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, text: str, make_folder: bool = False) -> None:
    """Write UTF-8 text, newlines as they are, or leave what was there.

    Without `make_folder` a folder that is missing is an error: a run's folder may be away with its file system, and what
    was written meanwhile would be lost under it.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)
