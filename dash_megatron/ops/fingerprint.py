"""What the results of the kernels depend on besides their inputs, as one short text to compare between processes."""

import hashlib
from importlib import metadata
from pathlib import Path

import torch

TABLE_FILE = Path(__file__).parent / "kernels" / "configs.json"


def implementation_fingerprint() -> str:
    """Versions of torch and Triton, and a hash of the table of launch configurations.

    Processes that differ in it may sum in another order, so that weights which should be equal drift apart.
    """
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    table = hashlib.sha256(TABLE_FILE.read_bytes()).hexdigest()[:16]
    return f"torch {torch.__version__}, triton {triton}, launch table {table}"
