"""Whether every process can read the run's data, and reads the same."""

from __future__ import annotations

from dash_megatron.data.blend import parse_blend
from dash_megatron.data.dataset import check_data
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.doctor.findings import Figure, Finding
from dash_megatron.doctor.session import Session, describe


def check_data_files(session: Session) -> Finding:
    """Tokenizer, and size, digests and tokenizer of every .bin/.idx against its sidecar."""
    data = session.config.data
    for name, value in (("tokenizer", data.tokenizer), ("train", data.train)):
        if not value:
            return Finding("failed", {}, f"data.{name} is empty; set it in the YAML or as data.{name}=...")
    tokenizer = Tokenizer(str(data.tokenizer))
    figures: dict[str, Figure] = {"tokenizer": tokenizer.fingerprint[:12]}
    problems = []
    for entry in [*parse_blend(data.train), *parse_blend(data.valid)]:
        prefix = entry if isinstance(entry, str) else entry[1]
        try:
            sidecar = check_data(prefix, tokenizer, data.seq_length)
        except (ValueError, OSError) as error:
            problems.append(describe(error))
            continue
        figures[prefix] = f"{sidecar.tokens} tokens {sidecar.bin_digest[:12]}"
    return Finding("failed" if problems else "ok", figures, "; ".join(problems))
