"""Tasks of `python -m dash_megatron evaluate`, scored on the model that trains, in the layout it trains in.

An answer is right if each of its tokens is the argmax after the prompt and the right tokens before it, so that one
forward pass over prompt and answer tells, on all processes together, as validation computes its losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dash_megatron.config import Config
from dash_megatron.data.batches import PackedBatch
from dash_megatron.data.blend import blend_prefixes
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.items import Item, check_items, make_sample, task_items
from dash_megatron.evaluation.text import LocalText, tokens_for_lines
from dash_megatron.layers import scoring
from dash_megatron.parallel import context_parallel_group
from dash_megatron.training.engine import Engine
from dash_megatron.training.loss import token_losses
from dash_megatron.training.metrics import TaskScore
from dash_megatron.training.sources import batch_source


class TaskRows:
    """Samples of all tasks and lengths as rows of tokens; each row is made on first access, and kept.

    Args:
        config: a run with `evaluation.tasks`.
        tokenizer: of the run.

    Raises:
        ValueError: a task has no sample of a length.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        evaluation = config.evaluation
        lengths = evaluation.task_lengths or (config.data.seq_length,)
        self.seq_length = config.data.seq_length
        self.tokenizer = tokenizer
        self.kinds = [(task, length) for task in evaluation.tasks for length in lengths]
        """Task and length, in the order of results."""
        self.items: list[tuple[int, Item]] = [
            (number, item)
            for number, (task, _) in enumerate(self.kinds)
            for item in task_items(task, evaluation.task_samples)
        ]
        self.text = LocalText.from_data(
            blend_prefixes(config.data.valid), tokenizer, tokens_for_lines(max(lengths))
        )
        # a file that is lost under a memory map kills the process: after this, nothing is read any more
        _ = self.text.lines, self.text.vocabulary
        self._rows: dict[int, tuple[dict[str, Tensor], list[tuple[int, int]]]] = {}
        for task, length in self.kinds:
            try:
                check_items(task, length, task_items(task, evaluation.task_samples), self.text, tokenizer)
            except ValueError as error:
                text = str(error).replace("--lengths", "length")
                raise ValueError(f"evaluation.task_lengths={list(lengths)}: {text}") from error

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """Tokens and labels, int64 [seq_length]; padding follows the sample, which cannot attend to it."""
        return self._row(index)[0]

    def spans(self, index: int) -> list[tuple[int, int]]:
        """For each answer the range [first, end) of positions in the row whose labels are the answer's tokens."""
        return self._row(index)[1]

    def _row(self, index: int) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        if index not in self._rows:
            kind, item = self.items[index]
            sample = make_sample(*self.kinds[kind], item, self.text, self.tokenizer)
            ids = torch.tensor(sample.ids + sample.ids[-1:] * (self.seq_length + 1 - len(sample.ids)))
            spans = [(first - 1, end - 1) for first, end in sample.spans]
            self._rows[index] = ({"tokens": ids[:-1], "labels": ids[1:]}, spans)
        return self._rows[index]


class TaskScorer:
    """Scores the tasks of a run's config.

    Args:
        config, tokenizer: as `TaskRows`, which also says what is raised.
        device: what this process computes on.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, device: torch.device) -> None:
        self.rows = TaskRows(config, tokenizer)
        self.vocab_size = tokenizer.vocab_size
        self.device = device
        # as few rows of padding as there can be; a sample is one document, whatever is in it
        self.source = batch_source(
            config,
            self.rows,
            tokenizer.eod,
            device,
            global_batch=config.training.micro_batch * config.data_parallel_size(dist.get_world_size()),
            pack_documents=False,
            pad_last=True,
        )

    @torch.no_grad()
    def score(self, engine: Engine, beat: Callable[[], None]) -> dict[str, dict[str, TaskScore]]:
        """Mean scores over the samples by task and length; collective.

        Args:
            engine: the model, in evaluation mode.
            beat: called before every batch.
        """
        # score, loss and samples of each task and length
        sums_K3 = torch.zeros(len(self.rows.kinds), 3, dtype=torch.float64)
        self.source.load_state_dict({"consumed_samples": 0})
        with scoring(engine.model, self.vocab_size):
            for batch in self.source:
                beat()
                found_BN2 = token_losses(engine.forward, batch.to(self.device))
                self._add(sums_K3, batch, found_BN2[0].double().cpu())
        sums_K3 = sums_K3.to(self.device)
        # samples that several processes hold count as often in all three sums, so that copies cancel
        dist.all_reduce(sums_K3)
        results: dict[str, dict[str, TaskScore]] = {}
        for (task, length), (score, nll, samples) in zip(self.rows.kinds, sums_K3.tolist(), strict=True):
            results.setdefault(task, {})[str(length)] = {"score": score / samples, "nll": nll / samples}
        return results

    def _add(self, sums_K3: Tensor, batch: PackedBatch, found_N2: Tensor) -> None:
        """Add the scores of a batch's samples, which context-parallel ranks share, to `sums_K3`; collective."""
        here = [(row, index) for row, index in enumerate(batch.sample_ids) if index >= 0]
        if not here:
            return
        spans = [
            (row * self.rows.seq_length + first, row * self.rows.seq_length + end)
            for row, index in here
            for first, end in self.rows.spans(index)
        ]
        # for each answer its tokens that are not the argmax, its loss, and its tokens
        table_S3 = torch.zeros(len(spans), 3, dtype=torch.float64)
        token_N = torch.arange(len(found_N2)) if batch.context is None else batch.context.token
        for number, (first, end) in enumerate(spans):
            nll_N, right_N = found_N2[(token_N >= first) & (token_N < end)].unbind(1)
            table_S3[number] = torch.stack([(1 - right_N).sum(), nll_N.sum(), torch.tensor(len(nll_N))])
        table_S3 = table_S3.to(self.device)
        dist.all_reduce(table_S3, group=context_parallel_group())
        parts = table_S3.cpu().split([len(self.rows.spans(index)) for _, index in here])
        for (_, index), (wrong, nll, tokens) in zip(here, (part.unbind(1) for part in parts), strict=True):
            score = (wrong == 0).double().mean()
            sums_K3[self.rows.items[index][0]] += torch.stack(
                [score, nll.sum() / tokens.sum(), torch.ones(())]
            )
