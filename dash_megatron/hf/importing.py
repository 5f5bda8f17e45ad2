"""`convert from-hf`: a folder of a Llama-shaped model as weights that `training.init_from` starts a run from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from dash_megatron.checkpoint.folder import MODEL_SECTIONS
from dash_megatron.config import AttentionConfig, ModelConfig
from dash_megatron.files import no_folder
from dash_megatron.hf.config import multipliers, sections_of
from dash_megatron.hf.folder import (
    FolderWeights,
    check_new,
    new_folder,
    read_tensors,
    write_pieces,
)
from dash_megatron.hf.names import Piece, from_hugging_face, pieces
from dash_megatron.hf.tokenizer import import_tokenizer


class Imported(NamedTuple):
    """What `import_folder` made."""

    sections: dict[str, Any]
    """Sections of a run config: the content of `model.yaml`."""
    tokenizer: Path | None
    """Path for `data.tokenizer`; None where the source has no tokenizer that training takes."""
    positions: int | None
    """For how many its config.json says that the source was trained."""


def import_folder(source: str | Path, output: str | Path) -> Imported:
    """Write the weights of a Hugging Face folder under the training model's names; on CPU, a layer at a time.

    Args:
        source: folder with config.json and safetensors: one of `export_run`, or a dense model of a known architecture.
        output: the folder to make; may not exist. It holds safetensors, `model.yaml` with the sections that a run
            config repeats, and the tokenizer where `source` has one.

    Raises:
        FileNotFoundError: `source` lacks a file.
        ValueError: the model is not of a shape that can be trained here, a file is damaged, or a tensor is missing,
            unknown, of another shape or not finite. `output` does not exist then.
    """
    source, output = Path(source), Path(output)
    check_new(output)
    if not source.is_dir():
        raise FileNotFoundError(
            f"{no_folder(source)}; give a local folder, such as `hf download NAME --local-dir DIR` makes"
        )
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; give a folder that transformers could load")
    tree = _read_config(source / "config.json")
    weights = FolderWeights(source)
    model, attention, factors = _read_model(tree, set(weights), source)
    vocab_size = int(tree["vocab_size"])
    _check_names(weights, pieces(model, attention, vocab_size), source)
    if model.tie_embeddings and factors != (1.0, 1.0, 1.0):
        # the embedding and the output projection, one table so far, are scaled differently
        model = model.model_copy(update={"tie_embeddings": False})
    parts = pieces(model, attention, vocab_size)
    with new_folder(output) as folder:
        write_pieces(folder, parts, lambda piece: _convert(weights, piece, model, factors, source))
        sections = _write_sections(folder, model, attention)
        tokenizer = import_tokenizer(source, folder)
    place = None if tokenizer is None else output / tokenizer
    return Imported(sections, place, tree.get("max_position_embeddings"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold an object, not {type(tree).__name__}")
    return tree


def _read_model(
    tree: dict[str, Any], names: set[str], source: Path
) -> tuple[ModelConfig, AttentionConfig, tuple[float, float, float]]:
    """What `sections_of` and `multipliers` read in config.json."""
    path = source / "config.json"
    try:
        return *sections_of(tree, names), multipliers(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in problem["loc"])
        raise ValueError(f"{path}: {where}{problem['msg']}") from error
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(
            f"{path} has a value of another type than its key needs ({error}); download it again"
        ) from error


def _check_names(weights: Mapping[str, Tensor], parts: list[Piece], source: Path) -> None:
    """Check that every tensor of the folder is known; missing ones are named when they are read."""
    known = {name for piece in parts for name in piece.theirs}
    for name in weights:
        if name in known or name.endswith("rotary_emb.inv_freq"):
            continue
        tied = name == "lm_head.weight" and torch.equal(weights[name], weights["model.embed_tokens.weight"])
        if not tied:
            raise ValueError(f"{source} has tensor {name}, which a model of its config.json does not have")


def _convert(
    weights: Mapping[str, Tensor],
    piece: Piece,
    model: ModelConfig,
    factors: tuple[float, float, float],
    source: Path,
) -> dict[str, Tensor]:
    embedding, residual, logits = factors
    theirs = {}
    for name, shape in piece.theirs.items():
        untied = name == "lm_head.weight" and name not in weights and factors != (1.0, 1.0, 1.0)
        stored = "model.embed_tokens.weight" if untied else name
        tensor = read_tensors(weights, {stored: shape}, str(source))[stored]
        if not tensor.float().isfinite().all():
            raise ValueError(f"{source}: tensor {stored} has values that are not finite; download it again")
        factor = {"model.embed_tokens.weight": embedding, "lm_head.weight": logits}.get(name, 1.0)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            factor = residual
        # rounded in float32, not again to the stored dtype
        theirs[name] = tensor if factor == 1.0 else tensor.float() * factor
    return from_hugging_face(theirs, piece, model)


def _write_sections(folder: Path, model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    sections: dict[str, Any] = {"model": model.model_dump(mode="json")}
    if attention.kind == "dash" or attention.full_layers:
        sections["attention"] = attention.model_dump(mode="json", exclude={"backend"})
    text = yaml.safe_dump(sections, sort_keys=False)
    note = (
        "attention must keep kind, full_layers,\n# learned_scaling and router_projections, of which weights are here; with a "
        "target_density it goes on from scaling_factor"
        if attention.kind == "dash"
        else "any attention section will do"
    )
    note = f"# sections of a run config whose training.init_from is this folder; {note}\n"
    (folder / MODEL_SECTIONS).write_text(note + text)
    return sections
