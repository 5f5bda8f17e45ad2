"""Megatron's indexed datasets and blends as rows of tokens, checked before the first step."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dash_megatron.agreement import agreed, once_a_machine
from dash_megatron.data.bin_reader import BinReader
from dash_megatron.data.blend import Part, check_blend, parse_blend
from dash_megatron.data.conversations import CONVERSATION_ARRAYS, ConversationRows, order_of_conversations
from dash_megatron.data.index_cache import Index, cached_indices
from dash_megatron.data.index_file import check_lengths, edges_digest, read_lengths
from dash_megatron.data.row_order import BLEND_ARRAYS, PASS_ARRAYS, order_of_blend, order_of_pass
from dash_megatron.data.sidecar import Sidecar, answers_path
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.exit_codes import machine_name
from dash_megatron.files import path_for_message
from dash_megatron.open_files import allow_open_files

with warnings.catch_warnings():
    # Apex and Transformer Engine speed up GPU training; no dataset needs them
    warnings.filterwarnings("ignore", message=".*Transformer Engine.*", category=UserWarning)
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

logger = logging.getLogger(__name__)

# .idx, .bin, and Megatron's orders of documents, rows and their shuffle, all but .bin mapped into memory; of conversations answers
# too, and .idx once more while they are packed
_FILES_PER_PREFIX = 7
_FILES_PER_BLEND = 2
_MANY_ROWS = 150_000_000
"""Of a pass, from which on it is told that it is ordered."""
# Megatron numbers the parts of a blend in int16, and what is above would silently be others
_MAX_PARTS = np.iinfo(np.int16).max

_OnePass: TypeAlias = "GPTDataset | ConversationRows"


class TokenRows(torch.utils.data.Dataset[Mapping[str, Tensor]]):
    """Rows with tokens and labels (int64 [seq_length]) and loss_mask (float32 [seq_length]), and of conversations starts."""

    def __init__(self, dataset: Any, num_samples: int, vocab_size: int, names: str) -> None:
        self.dataset = dataset
        self.num_samples = num_samples
        self.vocab_size = vocab_size
        self.names = names

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """Read a row.

        Raises:
            IndexError: no such row.
            ValueError: it holds a token id outside the vocabulary, so that the .bin is damaged.
            OSError: a .bin cannot be read, even after minutes, or ends too early.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"row {index} must lie in [0, {self.num_samples})")
        try:
            sample = self.dataset[index]
        except OSError as error:
            raise OSError(error.errno, f"row {index} of {self.names}: {error.strerror}") from error
        row = {name: sample[name] for name in ("tokens", "labels", "loss_mask", "starts") if name in sample}
        for name in ("tokens", "labels"):
            low, high = torch.aminmax(row[name])
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"row {index} of {self.names} has token id {int(low if low < 0 else high)}; ids must lie "
                    f"in [0, {self.vocab_size}), the tokenizer's vocabulary; the .bin file is damaged: "
                    "tokenize again"
                )
        return row


def build_dataset(
    blend: Sequence[str],
    *,
    seq_length: int,
    num_samples: int | None,
    seed: int,
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str],
    split_name: str = "train",
) -> TokenRows:
    """Check the data, and return its rows in the order in which training or an evaluation reads them.

    Row i depends on the blend, seq_length and seed, and on nothing else: with a larger num_samples the order
    continues where it ended, so that a run may be resumed with more steps. The data is passed over as often as
    num_samples needs, each time in another order.

    Args:
        blend: prefixes of .bin/.idx pairs, each optionally preceded by its weight and a space, as in a config; prefixes
            without weights are mixed by their size.
        seq_length: tokens in a row; rows are cut from the documents, concatenated in random order.
        num_samples: number of rows; None: one pass over every prefix.
        seed: fixes the order.
        tokenizer: the one that made the data.
        cache_dir: folder of Megatron's index files; any number of processes may build at once.
        split_name: "train", or "valid", which is at most one pass long. Weights do not count in one pass.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an argument breaks a rule, the data is empty, short, truncated or of another tokenizer, or it is more
            files than this process may open.
    """
    _check_arguments(seq_length, num_samples, seed, split_name)
    field = f"data.{split_name}"
    parts = parse_blend(blend)
    _check_number(parts, field)
    prefixes = [part.prefix for part in parts]
    weights = [part.weight for part in parts if part.weight is not None]
    # which opens each file seven times and reads each index, too much for all of hundreds of processes
    sidecars = agreed(lambda: check_blend(field, blend, tokenizer, seq_length))
    _warn_of_copies(prefixes, sidecars, field)
    allow_open_files(
        _FILES_PER_PREFIX * len(prefixes) + _FILES_PER_BLEND,
        f"{field} names {len(prefixes)} data sets",
        "ask for a higher limit, or tokenize several data sets into one",
    )
    copies = zip(prefixes, sidecars, strict=True)
    once_a_machine("read data sets", [functools.partial(_check_copy, *copy) for copy in copies])
    passes = _open_passes(prefixes, sidecars, seq_length, seed, tokenizer, Path(cache_dir), split_name)
    lengths = [len(one_pass) for one_pass in passes]
    at_most_one_pass = split_name == "valid" or num_samples is None
    if at_most_one_pass and weights and len(prefixes) > 1:
        logger.warning("%s: its weights are ignored, as one pass over every prefix is read", field)
    if at_most_one_pass:
        num_samples = min(num_samples or sum(lengths), sum(lengths))
    assert num_samples is not None
    mixed_by = None if at_most_one_pass else weights or lengths
    dataset = _blended(passes, mixed_by, num_samples, seed, Path(cache_dir), field)
    return TokenRows(dataset, num_samples, tokenizer.vocab_size, ", ".join(prefixes))


def _check_arguments(seq_length: int, num_samples: int | None, seed: int, split_name: str) -> None:
    if split_name not in ("train", "valid"):
        raise ValueError(f"split_name={split_name!r} must be 'train' or 'valid'")
    if seq_length < 1:
        raise ValueError(f"data.seq_length={seq_length} must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"training.seed={seed} must lie in [0, 2**32), numpy's range; pick a smaller one")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1; set training.steps to 1 or more")


def _check_number(parts: Sequence[Part], field: str) -> None:
    if not parts:
        raise ValueError(f"{field}=[] must name at least one prefix of a .bin/.idx pair, such as data/train")
    if len(parts) > _MAX_PARTS:
        raise ValueError(
            f"{field} names {len(parts)} data sets and may name at most {_MAX_PARTS}; tokenize several into one"
        )


def _warn_of_copies(prefixes: list[str], sidecars: list[Sidecar], field: str) -> None:
    """Name prefixes of the same data: what is drawn from the one would be drawn from the other once more."""
    groups: dict[tuple[str, str], list[str]] = {}
    for prefix, sidecar in zip(prefixes, sidecars, strict=True):
        groups.setdefault((sidecar.idx_digest, sidecar.bin_digest), []).append(prefix)
    for copies in groups.values():
        if len(copies) > 1:
            logger.warning(
                "%s: %s hold the same data, each row of which is read %d times a pass; name it once, with the sum of the "
                "weights",
                field,
                ", ".join(copies),
                len(copies),
            )


@dataclass(frozen=True)
class _MegatronTokenizer:
    """The attributes that Megatron's datasets read from a tokenizer."""

    vocab_size: int
    eod: int
    fingerprint: str
    pad: int = -1
    """No token id, so that Megatron takes no real token for padding."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": "dash_megatron.Tokenizer", "fingerprint": self.fingerprint}


def _config(seq_length: int, seed: int, tokenizer: Tokenizer) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        # files are split already; Megatron only has to be told that the whole of each is used
        blend=(["unused"], None),
        split="1,0,0",
        tokenizer=_MegatronTokenizer(tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint),
        # positions, masks and document borders are made in batches.py, where rows are packed
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        # a file that is lost or cut short under a memory map kills the process without a word: see `BinReader`
        mmap_bin_files=False,
    )


class _Documents(GPTDataset):
    """One pass over documents: Megatron's rows, in an order that is made already."""

    def __init__(
        self, prefix: str, split_name: str, config: GPTDatasetConfig, order: list[np.ndarray]
    ) -> None:
        self.order = order
        indexed = GPTDataset.build_low_level_dataset(prefix, config)
        indexed.bin_reader = BinReader(f"{prefix}.bin")
        # used while an order is made: a billion documents are 4 GB in every process
        no_indices = np.empty(0, dtype=np.int32)
        super().__init__(indexed, "data", no_indices, None, Split[split_name], config)
        indexed.bin_reader.open()

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        return tuple(self.order)


def _open_passes(
    prefixes: Sequence[str], sidecars: Sequence[Sidecar], seq_length: int, seed: int, tokenizer: Tokenizer, cache_dir: Path,
    split_name: str,
) -> list[_OnePass]:  # fmt: skip
    """One pass over each prefix, in random order; files are open, so that the next blend counts them among the open files.

    Orders are named after a digest of the data, so that replaced data does not meet that of its predecessor, and paths to the same
    data share one.
    """
    indices = [
        _index(prefix, sidecar, seq_length, seed, tokenizer, cache_dir, split_name)
        for prefix, sidecar in zip(prefixes, sidecars, strict=True)
    ]
    config = _config(seq_length, seed, tokenizer)
    passes: list[_OnePass] = []
    for prefix, index, order in zip(prefixes, indices, cached_indices(indices), strict=True):
        if index.arrays == PASS_ARRAYS:
            passes.append(_Documents(prefix, split_name, config, order))
        else:
            conversations = ConversationRows(prefix, seq_length, tokenizer.eod, order)
            conversations.open()
            passes.append(conversations)
    return passes


def _index(
    prefix: str, sidecar: Sidecar, seq_length: int, seed: int, tokenizer: Tokenizer, cache_dir: Path, split_name: str
) -> Index:  # fmt: skip
    if sidecar.answer_tokens is None:
        make, arrays = _order_of_pass, PASS_ARRAYS
        key = [sidecar.idx_digest, seq_length, seed, split_name, tokenizer.fingerprint]
    else:
        make, arrays = order_of_conversations, CONVERSATION_ARRAYS
        key = ["conversations", sidecar.idx_digest, sidecar.answers_digest, seq_length, seed]
    return Index(
        make=functools.partial(make, prefix, seq_length, seed),
        folder=cache_dir / _digest(key),
        arrays=arrays,
        name=prefix,
        size=sidecar.documents,
    )


def _order_of_pass(prefix: str, seq_length: int, seed: int) -> dict[str, np.ndarray]:
    check_lengths(prefix)
    return order_of_pass(read_lengths(prefix)[0], seq_length, seed)


def _check_copy(prefix: str, sidecar: Sidecar) -> None:
    """Compare this machine's files with those that rank 0 has checked: they may be another copy."""
    digests = {f"{prefix}.idx": sidecar.idx_digest, f"{prefix}.bin": sidecar.bin_digest}
    if sidecar.answers_digest is not None:
        digests[str(answers_path(prefix))] = sidecar.answers_digest
    for path, digest in digests.items():
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{path_for_message(path)} does not exist on {machine_name()}, but on rank 0's machine; copy it there too"
            )
        if edges_digest(path) != digest:
            raise ValueError(
                f"{path} on {machine_name()} is another file than on rank 0's machine; copy it there again"
            )


def _digest(key: list[Any]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


class _ShuffledPasses(torch.utils.data.Dataset[Any]):
    """Several passes over the same rows, each in another order.

    Megatron's own repetition shuffles over all passes together, so that its order changes with the number of
    samples; a run that is resumed with more steps would see some rows again and miss others.
    """

    def __init__(self, one_pass: _OnePass, seed: int) -> None:
        self.one_pass = one_pass
        self.seed = seed
        self._orders = functools.lru_cache(maxsize=2)(self._make_order)
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Any:
        number, position = divmod(int(index), len(self.one_pass))
        # the first pass is in Megatron's random order already
        return self.one_pass[position if number == 0 else int(self._order(number)[position])]

    def _order(self, number: int) -> np.ndarray:
        with self._lock:  # threads that read ahead would each make it
            return self._orders(number)

    def _make_order(self, number: int) -> np.ndarray:
        rows = len(self.one_pass)
        if rows >= _MANY_ROWS:
            logger.info("pass %d: ordering its %d rows takes a minute or more", number + 1, rows)
        # every process keeps two; the order is that of `permutation`, which takes twice the memory
        order = np.arange(rows, dtype=np.int32 if rows <= np.iinfo(np.int32).max else np.int64)
        np.random.default_rng([self.seed, number]).shuffle(order)
        return order


class _Blend(torch.utils.data.Dataset[Any]):
    """Rows of several data sets: row i is row `rows[i]` of part `parts[i]`."""

    def __init__(self, data_sets: list[_ShuffledPasses], parts: np.ndarray, rows: np.ndarray) -> None:
        self.data_sets = data_sets
        self.parts = parts
        self.rows = rows

    def __getitem__(self, index: int) -> Any:
        return self.data_sets[self.parts[index]][self.rows[index]]


def _blended(
    passes: list[_OnePass], weights: Sequence[float] | None, num_samples: int, seed: int, cache_dir: Path, field: str
) -> _ShuffledPasses | _Blend:  # fmt: skip
    """Draw from the passes by weight, repeating each as often as needed; without weights draw every row once."""
    data_sets = [_ShuffledPasses(one_pass, seed) for one_pass in passes]
    if len(passes) == 1:
        return data_sets[0]
    lengths = [len(one_pass) for one_pass in passes]
    if weights is None:
        num_samples = sum(lengths)
    # 0.1 s for a million samples of up to 20 data sets, and 10 bytes each
    index = Index(
        make=lambda: order_of_blend(lengths, weights, num_samples),
        folder=cache_dir / _digest(["blend", lengths, weights, num_samples]),
        arrays=BLEND_ARRAYS,
        name=field,
        size=num_samples,
    )
    ((parts, rows),) = cached_indices([index])
    return _Blend(data_sets, parts, rows)
