"""Models to evaluate, a run's checkpoint or an exported folder, behind one interface."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dash_megatron.checkpoint.files import MANIFEST
from dash_megatron.checkpoint.folder import checkpoint_folder, tag_of
from dash_megatron.checkpoint.weights import load_weights, stored_config, stored_tokenizer, whole_model
from dash_megatron.config import Config, RopeScaling
from dash_megatron.data.blend import blend_prefixes
from dash_megatron.data.index_file import edges_digest
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.files import no_folder
from dash_megatron.layers import DashGPTModel

# Alive at once, in elements: 1 GiB in float32.
MAX_LOGITS = 2**28


class LanguageModel(ABC):
    """Losses, top-1 predictions and greedy continuations of token rows.

    Rows of different lengths are padded after their last token, which no token before it can see.
    """

    name: str
    """Name of the run and its step, or of the folder."""
    fingerprint: str
    """Digest of the weights and of everything else that results depend on."""
    tokenizer: Tokenizer
    trained_length: int
    """Longest sequence of training, in tokens."""
    rope_scaling: RopeScaling | None = None
    """The RoPE scaling of this evaluation, in place of that of training; None: as trained."""
    device: torch.device

    @abstractmethod
    def hidden(self, tokens_BN: Tensor) -> Tensor:
        """Hidden states after the last norm, [B, N, hidden_size]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., rows of the table] of hidden states [..., hidden_size]."""

    @abstractmethod
    def greedy(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue prompts by the argmax each time, up to the end of the document or `max_new_tokens`."""

    @torch.no_grad()
    def losses(self, tokens_BN: Tensor) -> Tensor:
        """Cross entropy in nats of every token but a row's first, float32 [B, N - 1], on CPU."""
        hidden = self.hidden(tokens_BN[:, :-1]).flatten(0, 1)
        labels = tokens_BN[:, 1:].to(self.device).flatten()
        rows = max(1, MAX_LOGITS // self.logits(hidden[:1]).shape[-1])
        pieces = zip(hidden.split(rows), labels.split(rows), strict=True)
        parts = [torch.nn.functional.cross_entropy(self.logits(x), y, reduction="none") for x, y in pieces]
        return torch.cat(parts).view(len(tokens_BN), -1).cpu()

    @torch.no_grad()
    def answers(self, rows: list[list[int]], firsts: list[int]) -> list[tuple[Tensor, Tensor]]:
        """For the tokens of each row from number `firsts` on: losses, float32, and top-1 predictions, int64.

        Args:
            rows: tokens of each row.
            firsts: number, at least 1, of the first token of each row that is predicted.
        """
        hidden = self.hidden(pad_right(rows))
        found = []
        for x, row, first in zip(hidden, rows, firsts, strict=True):
            logits = self.logits(x[first - 1 : len(row) - 1])
            labels = torch.tensor(row[first:], device=self.device)
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            found.append((losses.cpu(), self.argmax(logits).cpu()))
        return found

    def argmax(self, logits: Tensor) -> Tensor:
        """The top-1 token of logits [..., rows of the table], int64 [...]; never a row that only pads the table."""
        return logits[..., : self.tokenizer.vocab_size].argmax(-1)


def pad_right(rows: list[list[int]]) -> Tensor:
    """Pad rows on the right to int64 [B, longest]."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


class RunModel(LanguageModel):
    """The training model with a checkpoint's whole weights on one process."""

    def __init__(
        self, model: DashGPTModel, config: Config, name: str, fingerprint: str, device: torch.device
    ) -> None:
        self.name, self.fingerprint, self.device = name, fingerprint, device
        self.tokenizer = Tokenizer(str(config.data.tokenizer))
        self.trained_length = config.data.seq_length
        self._model = model
        # the model gives hidden states, of which only those that are asked for become logits
        self._model.post_process = False

    @torch.no_grad()
    def hidden(self, tokens_BN: Tensor) -> Tensor:
        """See `LanguageModel.hidden`."""
        tokens_BN = tokens_BN.to(self.device)
        positions = torch.arange(tokens_BN.shape[1], device=self.device).expand_as(tokens_BN)
        return self._model(tokens_BN, positions).transpose(0, 1)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `LanguageModel.logits`."""
        shared = self._model.share_embeddings_and_output_weights
        weight = self._model.shared_embedding_or_output_weight() if shared else None
        return self._model.output_layer(hidden, weight=weight)[0].float()

    @torch.no_grad()
    def greedy(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """See `LanguageModel.greedy`; computes whole rows again for each token."""
        rows = [list(prompt) for prompt in prompts]
        open_rows = list(range(len(rows)))
        for _ in range(max_new_tokens):
            hidden = self.hidden(pad_right([rows[number] for number in open_rows]))
            last = torch.tensor([len(rows[number]) - 1 for number in open_rows], device=self.device)
            ends = hidden[torch.arange(len(open_rows), device=self.device), last]
            tokens = self.argmax(self.logits(ends)).tolist()
            for number, token in zip(open_rows, tokens, strict=True):
                rows[number].append(token)
            open_rows = [number for number in open_rows if rows[number][-1] != self.tokenizer.eod]
            if not open_rows:
                break
        return [
            _until(row[len(prompt) :], self.tokenizer.eod) for row, prompt in zip(rows, prompts, strict=True)
        ]


class ExportedModel(LanguageModel):
    """A folder that transformers loads, with its own code where it has some."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.name, self.fingerprint = folder.name, _folder_fingerprint(folder)
        self.tokenizer = _tokenizer_of(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, local_files_only=True, dtype="auto"
        )
        self._model: Any = model.eval()
        if self.device.type == "cpu":
            self._model.float()  # as a run: half precision is for GPUs
        self._model.to(self.device)
        self.trained_length = int(model.config.max_position_embeddings)

    @torch.no_grad()
    def hidden(self, tokens_BN: Tensor) -> Tensor:
        """See `LanguageModel.hidden`."""
        return self._model.base_model(input_ids=tokens_BN.to(self.device), use_cache=False).last_hidden_state

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `LanguageModel.logits`."""
        return self._model.get_output_embeddings()(hidden).float()

    @torch.no_grad()
    def greedy(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """See `LanguageModel.greedy`; with a cache, and padding before the rows."""
        longest, end = max(map(len, prompts)), self.tokenizer.eod
        tokens = torch.tensor([[end] * (longest - len(row)) + row for row in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        out = self._model.generate(
            tokens,
            attention_mask=mask.to(self.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
        )
        return [_until(row, end) for row in out[:, longest:].tolist()]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


@dataclass(frozen=True)
class ModelSource:
    """What is known of a model before its weights are read."""

    folder: Path
    step: int | None
    """Step of a run's checkpoint; None for an exported folder."""
    tokenizer: Tokenizer
    trained_length: int
    """See `LanguageModel`."""
    data: list[str]
    """Prefixes of validation data; empty where the model has none."""


def describe_source(
    source: str | Path, step: int | None = None, rope_scaling: RopeScaling | None = None
) -> ModelSource:
    """Say what can be said of a run or an exported folder at once; arguments and errors as in `open_model`."""
    folder = Path(source)
    if _is_export(folder, step, rope_scaling):
        longest = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
        return ModelSource(folder, None, _tokenizer_of(folder), int(longest), [])
    config, step = stored_config(folder, step)
    return describe_run(folder, config, stored_tokenizer(config, step), step, rope_scaling)


def describe_run(
    folder: Path,
    config: Config,
    tokenizer: Tokenizer,
    step: int | None = None,
    rope_scaling: RopeScaling | None = None,
) -> ModelSource:
    """Say the same of a run by its config, whether or not it is trained."""
    _with_rope(config, rope_scaling)
    return ModelSource(folder, step, tokenizer, config.data.seq_length, blend_prefixes(config.data.valid))


def _is_export(folder: Path, step: int | None, rope_scaling: RopeScaling | None) -> bool:
    """Whether a folder is an exported model, and no run; arguments and errors as in `open_model`."""
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(f"--step {step} is for runs, and {folder} is an exported model; leave it out")
        if rope_scaling is not None:
            raise ValueError(
                f"--rope-scaling is for runs, and {folder} is an exported model; leave it out, and set rope_parameters "
                "in its config.json"
            )
        return True
    if not folder.is_dir():
        raise FileNotFoundError(f"{no_folder(folder)}; give a run's folder or an exported model")
    if not checkpoint_folder(folder).is_dir():
        raise FileNotFoundError(
            f"{folder} must be a run (with checkpoints/) or a Hugging Face folder (with config.json); of imported weights give the "
            "folder that they came from"
        )
    return False


def _tokenizer_of(folder: Path) -> Tokenizer:
    names = [name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()]
    if not names:
        raise FileNotFoundError(f"{folder} has neither tokenizer.model nor tokenizer.json")
    return Tokenizer(folder / names[0])


def _with_rope(config: Config, rope_scaling: RopeScaling | None) -> Config:
    """The config with its RoPE stretched, checked as a copy would not be: factors must fit the heads."""
    if rope_scaling is None:
        return config
    shape = config.model.model_copy(update={"rope_scaling": rope_scaling})
    return config.model_copy(update={"model": type(shape).model_validate(shape.model_dump())})


@contextmanager
def open_model(
    source: str | Path, step: int | None = None, rope_scaling: RopeScaling | None = None
) -> Iterator[LanguageModel]:
    """Load a run's checkpoint or an exported folder, onto the GPU where there is one.

    Args:
        source: a run's folder, or a folder with config.json and weights.
        step: of a run: which checkpoint; None: the newest.
        rope_scaling: of a run: how its RoPE is stretched, in place of `model.rope_scaling`; None: as it was trained.

    Raises:
        FileNotFoundError: the folder is neither, or has no such checkpoint.
        ValueError: the checkpoint is damaged, its tokenizer was replaced, or `step` or `rope_scaling` was given for an export.
    """
    folder = Path(source)
    if _is_export(folder, step, rope_scaling):
        yield ExportedModel(folder)
        return
    config, step, weights = load_weights(folder, step)
    config = _with_rope(config, rope_scaling)
    with whole_model(config, weights) as (model, device):
        digest = hashlib.sha256((checkpoint_folder(folder) / tag_of(step) / MANIFEST).read_bytes())
        half = next(model.parameters()).dtype == torch.bfloat16
        digest.update(b"bfloat16" if half else b"float32")
        if rope_scaling is not None:
            digest.update(rope_scaling.model_dump_json().encode())
        found = RunModel(model, config, f"{folder.name} step {step}", digest.hexdigest()[:16], device)
        found.rope_scaling = rope_scaling
        yield found


def _folder_fingerprint(folder: Path) -> str:
    """Digest of a folder's config, its code, and the size and edges of each file of weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.py"), *folder.glob("*.safetensors"), *folder.glob("tokenizer.*")]):
        digest.update(json.dumps([path.name, edges_digest(path)]).encode())
    digest.update(b"cuda" if torch.cuda.is_available() else b"float32")
    return digest.hexdigest()[:16]
