"""Jobs of an evaluation, each one task at one length: their items, and how items are scored."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dash_megatron.evaluation.buckets import buckets
from dash_megatron.evaluation.items import Item, check_items, make_sample, task_items
from dash_megatron.evaluation.models import LanguageModel, pad_right
from dash_megatron.evaluation.samples import Sample
from dash_megatron.evaluation.settings import DOCUMENTS, PERPLEXITY, Settings
from dash_megatron.evaluation.text import LocalText

# raised whenever prompts or scores change, so that older results are not taken for new ones
RESULTS_VERSION = 2
# what a model may write beside the tokens of the answer
EXTRA_TOKENS = 8


class Job(ABC):
    """One task at one length."""

    def __init__(
        self, task: str, length: int, settings: Settings, model: LanguageModel, text: LocalText
    ) -> None:
        self.task, self.length = task, length
        self.settings, self.model, self.text = settings, model, text

    @cached_property
    def key(self) -> str:
        """Digest of all that a result depends on, except its item."""
        model, text = self.model, self.text
        facts = [
            RESULTS_VERSION,
            model.fingerprint,
            model.tokenizer.fingerprint,
            text.digest,
            text.num_tokens,
        ]
        facts += [self.task, self.length, self.settings.seed, *self.key_facts()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def key_facts(self) -> list[Any]:
        """Further facts that results depend on; they enter `key`."""
        return []

    @abstractmethod
    def items(self) -> list[Item]:
        """All items: the index, and the depth if the task has depths, of each line of results."""

    @abstractmethod
    def prepare(self) -> None:
        """Check, before anything is computed, that items can be made; of the model only the tokenizer is asked for.

        Raises:
            ValueError: no sample has this length.
        """

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Cut the items into batches, which do not depend on what is known already."""
        size = max(1, self.settings.batch_tokens // self.length)
        for first in range(0, len(items), size):
            yield list(items[first : first + size])

    @abstractmethod
    def compute(self, items: list[Item]) -> list[dict[str, Any]]:
        """Compute the results of some items in one batch."""


class PerplexityJob(Job):
    """Losses of windows of text, summed by bucket of positions."""

    @cached_property
    def _windows(self) -> list[tuple[int, np.ndarray]]:
        return self.text.windows(self.length, self.settings.samples, self.settings.seed)

    def items(self) -> list[Item]:
        """See `Job.items`; one for each window."""
        return [(index, None) for index in range(len(self._windows))]

    def prepare(self) -> None:
        """See `Job.prepare`."""
        _ = self._windows

    def compute(self, items: list[Item]) -> list[dict[str, Any]]:
        """See `Job.compute`."""
        documents, windows = zip(*(self._windows[index] for index, _ in items), strict=True)
        losses = self.model.losses(torch.from_numpy(np.stack(windows))).double()
        spans = buckets(self.length)
        return [
            {"document": document, "nll_sums": [float(row[a:b].sum()) for a, b in spans]}
            for document, row in zip(documents, losses, strict=True)
        ]


class DocumentsJob(Job):
    """Losses of documents from their beginnings on, cut behind the length, summed by bucket of positions."""

    def items(self) -> list[Item]:
        """See `Job.items`; the index is the document's number in the text. From the shortest to the longest."""
        known = [number for number, document in enumerate(self.text.documents) if len(document) > 1]
        random.Random(self.settings.seed).shuffle(known)
        chosen = known[: self.settings.samples]
        return [
            (number, None) for number in sorted(chosen, key=lambda number: (self._tokens(number), number))
        ]

    def _tokens(self, number: int) -> int:
        """Tokens that are predicted."""
        return min(self.length, len(self.text.documents[number]) - 1)

    def prepare(self) -> None:
        """See `Job.prepare`."""
        if not self.items():
            raise ValueError(
                f"task documents: no document of {self.text.name} has two tokens; give other --data"
            )

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """See `Job.batches`; as many documents as fit when all are padded to the longest."""
        batch: list[Item] = []
        for item in items:
            if batch and (len(batch) + 1) * self._tokens(item[0]) > self.settings.batch_tokens:
                yield batch
                batch = []
            batch.append(item)
        yield batch

    def compute(self, items: list[Item]) -> list[dict[str, Any]]:
        """See `Job.compute`."""
        counts = [self._tokens(number) for number, _ in items]
        rows = [
            self.text.documents[number][: count + 1].tolist()
            for (number, _), count in zip(items, counts, strict=True)
        ]
        losses = self.model.losses(pad_right(rows)).double()
        spans = buckets(self.length)
        return [
            {
                "tokens": count,
                "nll_sums": [
                    float(row[start : min(end, count)].sum()) for start, end in spans if start < count
                ],
            }
            for row, count in zip(losses, counts, strict=True)
        ]


class TaskJob(Job):
    """Samples of a task with known answers."""

    def key_facts(self) -> list[Any]:
        """See `Job.key_facts`."""
        return [self.settings.score]

    def items(self) -> list[Item]:
        """See `Job.items`."""
        return task_items(self.task, self.settings.samples, self.settings.depths)

    def sample(self, item: Item) -> Sample:
        """See `make_sample`."""
        return make_sample(self.task, self.length, item, self.text, self.model.tokenizer, self.settings.seed)

    def prepare(self) -> None:
        """See `Job.prepare`."""
        arguments = (self.text, self.model.tokenizer, self.settings.seed)
        check_items(self.task, self.length, self.items(), *arguments)

    def compute(self, items: list[Item]) -> list[dict[str, Any]]:
        """See `Job.compute`."""
        samples = [self.sample(item) for item in items]
        score = _score_generated if self.settings.score == "generate" else _score_answers
        results = score(self.model, samples)
        for result, sample in zip(results, samples, strict=True):
            result.update(tokens=len(sample.ids), place=sample.depth)
        return results


JOBS: dict[str, type[Job]] = {PERPLEXITY: PerplexityJob, DOCUMENTS: DocumentsJob}
"""The job of each task that has one of its own; all others are a `TaskJob`."""


def _score_answers(model: LanguageModel, samples: list[Sample]) -> list[dict[str, Any]]:
    """Score by one forward pass over prompts and answers: the share of answers all of whose tokens are top-1 predictions."""
    found = model.answers([sample.ids for sample in samples], [sample.prompt_tokens for sample in samples])
    return [_score_answer(sample, *pair) for sample, pair in zip(samples, found, strict=True)]


def _score_answer(sample: Sample, losses: Tensor, predicted: Tensor) -> dict[str, Any]:
    right = predicted == torch.tensor(sample.ids[sample.prompt_tokens :])
    parts = [slice(a - sample.prompt_tokens, b - sample.prompt_tokens) for a, b in sample.spans]
    return {
        "score": sum(bool(right[part].all()) for part in parts) / len(parts),
        "nll": float(torch.cat([losses[part] for part in parts]).double().mean()),
    }


def _score_generated(model: LanguageModel, samples: list[Sample]) -> list[dict[str, Any]]:
    """Score by greedy continuation: the share of answers that occur in it, in any order.

    For answers without text it is the share of tokens that are right at their place.
    """
    prompts = [sample.ids[: sample.prompt_tokens] for sample in samples]
    longest = max(len(sample.ids) - sample.prompt_tokens for sample in samples)
    results = []
    for sample, tokens in zip(samples, model.greedy(prompts, longest + EXTRA_TOKENS), strict=True):
        wanted = sample.ids[sample.prompt_tokens :]
        tokens = tokens[: len(wanted) + EXTRA_TOKENS]  # whatever its batch
        text = model.tokenizer.decode(tokens)
        if sample.texts:
            hits = [answer in text for answer in sample.texts]
        else:
            hits = [place < len(tokens) and tokens[place] == token for place, token in enumerate(wanted)]
        results.append({"score": sum(hits) / len(hits), "text": text})
    return results
