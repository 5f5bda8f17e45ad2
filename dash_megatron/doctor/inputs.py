"""The versions and data checks: whether all processes run the same code with the same config on the same data."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

from dash_megatron import __version__
from dash_megatron.config import Config
from dash_megatron.data.blend import blend_prefixes
from dash_megatron.data.sidecar import check_data
from dash_megatron.data.tokenizer import load_tokenizer
from dash_megatron.doctor.runner import Figure, Finding
from dash_megatron.doctor.session import Session, describe_error
from dash_megatron.ops.fingerprint import implementation_fingerprint
from dash_megatron.training.setup import code_commit, device_name

_PACKAGES = ("deepspeed", "megatron-core")
_DRIVER_FILE = Path("/sys/module/nvidia/version")


def check_versions(session: Session) -> Finding:
    """Report versions, commit, GPU and driver, a hash of the config, and the fingerprint of what results depend on."""
    figures: dict[str, Figure] = {"python": platform.python_version()}
    figures |= {name: _version(name) for name in _PACKAGES}
    figures["dash_megatron"] = __version__
    figures["commit"] = code_commit()
    figures["device"] = device_name(session.device)
    figures["driver"] = _DRIVER_FILE.read_text().strip() if _DRIVER_FILE.is_file() else "none"
    figures["implementation"] = implementation_fingerprint()
    figures["config"] = config_hash(session.config)
    return Finding(figures=figures)


def check_data_files(session: Session) -> Finding:
    """Compare size, digests and tokenizer of every .bin/.idx with its sidecar, and with the run's tokenizer."""
    data = session.config.data
    tokenizer = load_tokenizer(session.config.data)
    figures: dict[str, Figure] = {"tokenizer": tokenizer.fingerprint[:12]}
    problems = []
    for split, entries in (("train", data.train), ("valid", data.valid)):
        tokens, digests = 0, hashlib.sha256()
        for prefix in blend_prefixes(entries):
            try:
                sidecar = check_data(prefix, tokenizer, data.seq_length)
            except (ValueError, OSError) as error:
                problems.append(describe_error(error))
                continue
            tokens += sidecar.tokens
            digests.update(sidecar.bin_digest.encode())
        figures |= {f"{split} tokens": tokens, f"{split} digest": digests.hexdigest()[:12]} if entries else {}
    return Finding("failed" if problems else "ok", figures, "; ".join(problems))


def config_hash(config: Config) -> str:
    """Hash of a config: twelve hexadecimal digits that differ if any setting differs."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
