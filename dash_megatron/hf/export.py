"""`convert to-hf`: a run's checkpoint as a Hugging Face folder, published only after it was seen to compute the same."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from dash_megatron.checkpoint.weights import open_weights, stored_tokenizer
from dash_megatron.config import Config
from dash_megatron.data.chat import ChatTemplate, template_of_run
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.hf import modeling_dash, probe
from dash_megatron.hf.card import model_card
from dash_megatron.hf.config import MODEL_FILE, is_plain_llama, llama_config
from dash_megatron.hf.folder import check_new, new_folder, read_tensors, write_pieces
from dash_megatron.hf.names import pieces, to_hugging_face
from dash_megatron.hf.tokenizer import export_tokenizer
from dash_megatron.json_lines import read_json_lines

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export_run(
    run_dir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    dtype: str = "bfloat16",
    terms: str | None = None,
) -> probe.Report:
    """Write a run's checkpoint, of any layout, as a folder that transformers loads; on CPU, a layer at a time.

    Args:
        run_dir: the run's folder.
        output: the folder to make; may not exist.
        step: which checkpoint; None: the newest.
        dtype: of the weights, "bfloat16" or "float32".
        terms: license of the weights, for the model card; None names none.

    Returns:
        How exactly the exported model agrees with the training model.

    Raises:
        FileNotFoundError: the run has no such checkpoint, or its tokenizer is gone.
        ValueError: an argument is wrong, or the exported model computes something else. `output` does not exist then.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype} must be one of {list(DTYPES)}")
    check_new(Path(output))
    config, step, weights = open_weights(run_dir, step)
    if config.attention.kind not in ("dash", "full"):
        raise ValueError(
            f"{run_dir} has attention.kind={config.attention.kind}, a baseline that no Hugging Face model file computes; "
            "only runs of attention.kind=dash and full are exported"
        )
    with new_folder(Path(output)) as folder:
        return _write(folder, config, step, weights, DTYPES[dtype], terms)


def _chat_of(config: Config, tokenizer: Tokenizer) -> ChatTemplate | None:
    text = template_of_run(config.run_dir, tokenizer.path)
    if text is None:
        return None
    try:
        return ChatTemplate(text, tokenizer)
    except ValueError as error:
        logger.warning("generation will stop at the end of sequence only: %s", error)
        return None


def _write(
    folder: Path,
    config: Config,
    step: int,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    terms: str | None,
) -> probe.Report:
    tokenizer = stored_tokenizer(config, step)
    end = tokenizer.eod
    vocab_size = len(weights["embedding.word_embeddings.weight"])
    model = llama_config(config, vocab_size, dtype, end)
    # transformers looks into it as it loads a tokenizer
    model.save_pretrained(folder)
    chat = _chat_of(config, tokenizer)
    model.pad_token_id = export_tokenizer(tokenizer, folder, model, chat)
    model.save_pretrained(folder)
    ends = [end] if chat is None or chat.turn_end == end else [end, chat.turn_end]
    GenerationConfig(
        bos_token_id=end,
        eos_token_id=ends if len(ends) > 1 else end,
        pad_token_id=model.pad_token_id,
        # rows that only pad the table are never drawn
        suppress_tokens=list(range(tokenizer.vocab_size, vocab_size)) or None,
    ).save_pretrained(folder)
    if not is_plain_llama(config):
        shutil.copyfile(modeling_dash.__file__, folder / MODEL_FILE)
    parts = pieces(config.model, config.attention, vocab_size)
    expected = {name for piece in parts for name in piece.ours}
    extra = sorted(set(weights) - expected)
    if extra:
        raise ValueError(f"the checkpoint has {extra[0]}, for which the export has no name")
    write_pieces(
        folder,
        parts,
        lambda piece: to_hugging_face(
            read_tensors(weights, piece.ours, "the checkpoint", dtype), piece, config.model
        ),
    )
    logger.info("comparing the export with the training model")
    report = probe.compare(folder, weights, config, dtype)
    logged = Path(config.run_dir) / "metrics.jsonl"
    lines = read_json_lines(logged) if logged.is_file() else []
    last = [line for line in lines if line["step"] <= step][-1:]
    card = model_card(config, step, last[0] if last else {}, report, dtype, terms, chat is not None)
    (folder / "README.md").write_text(card)
    return report
