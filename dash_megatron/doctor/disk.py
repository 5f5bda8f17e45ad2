"""The disk check: how fast the disk of a run's folder is, and whether the run's checkpoints fit."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from pathlib import Path

from dash_megatron.checkpoint.folder import checkpoint_folder
from dash_megatron.config import Config
from dash_megatron.config.flops import parameter_count
from dash_megatron.data.tokenizer import load_tokenizer
from dash_megatron.doctor.runner import Finding
from dash_megatron.doctor.session import Session

_BLOCK_BYTES = 8 << 20
# per process, all at once, as checkpoints are written; never more than a checkpoint, or what surely is free
_MAX_BLOCKS = 32
# of a checkpoint: float32 weight and both moments, whatever the precision of training
BYTES_PER_PARAMETER = 12
_GIB = 1 << 30


def check_disk(session: Session) -> Finding:
    """Compare free space with the checkpoints to come; write, flush to disk and read a nameless file in `run_dir`."""
    run_dir = Path(session.config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(session.config.data)
    parameters = parameter_count(session.config, session.config.padded_vocabulary(tokenizer.vocab_size))
    size = BYTES_PER_PARAMETER * parameters
    count = checkpoints_kept(session.config)
    free = shutil.disk_usage(run_dir).free
    # of an earlier start; the run will replace them. One process tells, as all would ask for the size of each file at once
    kept = checkpoint_folder(run_dir).rglob("*") if session.rank == 0 else ()
    there = sum(path.stat().st_size for path in kept if path.is_file())
    figures = {"free GiB": free / _GIB, "checkpoint GiB": size / _GIB, "checkpoints": count}
    if session.rank == 0 and free + there < size * count:
        return Finding(
            "failed",
            figures,
            f"run_dir={run_dir} has too little space: {there / _GIB:.1f} GiB in checkpoints and what is free must hold "
            f"{size * count / _GIB:.1f} GiB; free space, lower checkpoint.keep (not 0, which keeps all), or choose "
            "another run_dir",
        )
    blocks = min(_MAX_BLOCKS, max(1, size // session.size // _BLOCK_BYTES))
    written, read = transfer_rates(run_dir, blocks)
    return Finding(figures={"write GB/s": written / 1e9, "read GB/s": read / 1e9, **figures})


def checkpoints_kept(config: Config) -> int:
    """Largest number of checkpoints on disk at once: those that are kept, and the one being written."""
    checkpoint, steps = config.checkpoint, config.training.steps
    if not checkpoint.every:
        return 1
    written = -(-steps // checkpoint.every)
    if not checkpoint.keep:
        return written
    milestones = steps // math.lcm(checkpoint.every, checkpoint.keep_every) if checkpoint.keep_every else 0
    return min(written, checkpoint.keep + milestones + 1)


def transfer_rates(folder: Path, blocks: int) -> tuple[float, float]:
    """Bytes per second at which a temporary file without a name is written to the disk and read from it.

    Args:
        folder: on the disk to measure.
        blocks: size of the file, in blocks of 8 MiB.

    Raises:
        OSError: the folder cannot be written, or is full.
    """
    block = os.urandom(_BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        total = sum(file.write(block) for _ in range(blocks))
        os.fsync(file.fileno())
        written = time.perf_counter()
        # what this machine keeps in memory would be read from there
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start_reading = time.perf_counter()
        while file.read(_BLOCK_BYTES):
            pass
        return total / (written - started), total / (time.perf_counter() - start_reading)
