"""Files of one checkpoint: what each process kept, a description, and a manifest with every file's size and checksum.

    state_00000.safetensors    what process 0 kept: fragments of master weights and moments, and its random state
    probe.safetensors          a row of tokens, whose loss `checkpoint.json` holds
    checkpoint.json            step, layout, config, trainer's state, and where each fragment belongs
    manifest.json              size and SHA-256 of all the others

Fragments are consecutive elements of a parameter of one tensor-parallel rank, flattened; together they are all of it.
So weights can be read whole, or cut for any other layout. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from dash_megatron.files import sync, telling_errors_of_the_disk, usual_mode
from dash_megatron.retry import retry

MANIFEST = "manifest.json"
PROBE = "probe.safetensors"
FORMAT = 1


def state_file(rank: int) -> str:
    """Name of the file that a process writes, by its global rank."""
    return f"state_{rank:05d}.safetensors"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, wait until it is on the disk, and give its manifest entry.

    Raises:
        OSError: the file could not be written.
    """
    save_tensors(path, tensors)
    return _synced_entry(path)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with the mode that the umask gives.

    Raises:
        OSError: the file could not be written.
    """
    with telling_errors_of_the_disk(path), usual_mode(path):
        save_file(tensors, path, metadata)


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write a JSON file, wait until it is on the disk, and give its manifest entry."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return _synced_entry(path)


def _synced_entry(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """Compare a checkpoint's files with its manifest; gives what is wrong, or None where they are as they were written.

    Args:
        folder: the checkpoint.
        share, shares: look at one of `shares` equal shares of the files only, so that many processes can divide the work.

    Raises:
        OSError: the files cannot be read at present, which says nothing about them.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in list(files.items())[share::shares]:
            size = (folder / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes, but {facts['bytes']} were written"
            if checksum(folder / name) != facts["sha256"]:
                return f"the checksum of {name} differs from that of what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    return None


def agreed_damage(folder: Path, seconds: float = 0.0) -> str | None:
    """As `damage`, with the same result on all processes, which divide the reading; collective.

    Without a process group this process reads everything, and once only.

    Args:
        folder: the checkpoint, the same on all processes.
        seconds: how long a process that cannot read its share tries again.

    Raises:
        OSError: on all processes, if one cannot read its share.
    """
    if not dist.is_initialized():
        return damage(folder)
    share, shares = dist.get_rank(), dist.get_world_size()
    found: str | OSError | None
    try:
        found = retry(lambda: damage(folder, share, shares), f"read {folder.name}", seconds)
    except OSError as error:
        found = error  # raised when the others, which wait for this process, know of it
    results: list[str | OSError | None] = [None] * shares
    dist.all_gather_object(results, found)
    for result in results:
        if isinstance(result, OSError):
            raise result
    return next((result for result in results if isinstance(result, str)), None)
