"""What a run sets and finds out once, before its first step."""

from __future__ import annotations

import logging
import random
import subprocess
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml

from dash_megatron.config import AttentionConfig, Config
from dash_megatron.data.blend import chat_template
from dash_megatron.data.chat import TEMPLATE_FILE
from dash_megatron.files import write_whole
from dash_megatron.ops.backend import pick_backend
from dash_megatron.ops.fingerprint import implementation_fingerprint

logger = logging.getLogger(__name__)


def set_up_logging(is_main: bool) -> None:
    """Send this package's log to standard error, whatever imported libraries did to the root logger.

    Rank 0 logs from INFO on, the others from ERROR on.
    """
    package = logging.getLogger("dash_megatron")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.INFO if is_main else logging.ERROR)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_backend(attention: AttentionConfig, device: torch.device) -> None:
    """Refuse `attention.backend: triton` on a device that runs no kernels, before a step would.

    Raises:
        ValueError: `device` is no GPU and nothing interprets kernels, or Triton cannot be imported.
    """
    if attention.kind == "full" or attention.backend != "triton":
        return
    try:
        pick_backend("triton", torch.empty(0, device=device))
    except ValueError as error:
        raise ValueError(
            f"attention.backend=triton cannot run here; attention.backend=auto takes what can ({error})"
        ) from error


def warn_of_new_positions(config: Config) -> None:
    """Tell where rows are longer than YaRN stretches positions to, as where `data.seq_length` alone was raised."""
    scaling, length = config.model.rope_scaling, config.data.seq_length
    if scaling is None or scaling.rope_type != "yarn":
        return
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    assert original is not None
    assert factor is not None
    if length > factor * original:
        logger.warning(
            "data.seq_length=%d exceeds %d, the positions that model.rope_scaling stretches to (factor=%g x "
            "original_max_position_embeddings=%d): those behind are new to the model; set model.rope_scaling.factor=%g",
            length,
            factor * original,
            factor,
            original,
            length / original,
        )


def check_same_implementation(fingerprint: str) -> None:
    """Compare the implementation fingerprint of all processes; collective.

    Args:
        fingerprint: versions and launch table of this process.

    Raises:
        ValueError: processes differ in it.
    """
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, fingerprint)
    ranks = {text: [rank for rank, other in enumerate(found) if other == text] for text in found}
    if len(ranks) > 1:
        listed = "; ".join(f"ranks {members} have {text}" for text, members in ranks.items())
        raise ValueError(
            f"processes would compute different results: {listed}. Start all from one environment and one checkout"
        )


def about_this_code(device: torch.device) -> dict[str, str]:
    """What checkpoints keep about the code: its commit, the implementation fingerprint, and the kind of device.

    Only rank 0, which writes it down, finds out the commit: git looks at every file of the checkout, which all may share.
    """
    return {
        "commit": code_commit() if dist.get_rank() == 0 else "unknown",
        "implementation": implementation_fingerprint(),
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """The model of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def code_commit() -> str:
    """Commit of the code that runs, with `-dirty` where files differ from it; "unknown" outside a repository."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_chat_template(config: Config) -> None:
    """Write `<run>/chat_template.jinja`, which exports carry, if the training data has conversations."""
    template = chat_template(config.data.train)
    if template is not None:
        write_whole(Path(config.run_dir) / TEMPLATE_FILE, template)


def write_config(config: Config, commit: str) -> None:
    """Write `<run>/config.yaml`: the resolved config, with the code's commit in its first line."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_whole(Path(config.run_dir) / "config.yaml", f"# commit: {commit}\n{text}")
