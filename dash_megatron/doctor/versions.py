"""Whether all processes run the same code with the same config."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

import torch

from dash_megatron import __version__
from dash_megatron.config import Config
from dash_megatron.doctor.findings import Figure, Finding
from dash_megatron.doctor.session import Session
from dash_megatron.ops.fingerprint import implementation_fingerprint
from dash_megatron.training.setup import code_commit

_PACKAGES = ("torch", "triton", "deepspeed", "megatron-core")
_DRIVER_FILE = Path("/sys/module/nvidia/version")


def check_versions(session: Session) -> Finding:
    """Versions, commit, GPU, driver, and hashes of the config and of what kernels' sums depend on."""
    figures: dict[str, Figure] = {"python": platform.python_version()}
    figures |= {name: _version(name) for name in _PACKAGES}
    figures["dash_megatron"] = __version__
    figures["commit"] = code_commit()
    figures["gpu"] = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "none"
    figures["driver"] = _DRIVER_FILE.read_text().strip() if _DRIVER_FILE.is_file() else "none"
    figures["implementation"] = implementation_fingerprint()
    figures["config"] = config_hash(session.config)
    figures["processes"] = session.size
    return Finding(figures=figures)


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits that differ where a setting does."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
