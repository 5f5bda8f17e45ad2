"""Rows of tokens packed into micro-batches, addressed by the number of samples already consumed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dash_megatron.config.training import micro_batches
from dash_megatron.parallel.context.layout import ContextShard, shard_sequence


class RowDataset(Protocol):
    """What `BatchSource` reads: a number of rows, as `pack_samples` takes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: its rows, concatenated to T = rows * seq_length tokens."""

    tokens: Tensor
    """int64 [1, T]"""
    labels: Tensor
    """int64 [1, T]: the token that follows each token in its row."""
    loss_mask: Tensor
    """bool [1, T]: False where the label belongs to another document or to no answer, and on padding rows."""
    position_ids: Tensor
    """int64 [1, T]: 0 at the start of each document, then counting up."""
    cu_seqlens: Tensor
    """int32 [documents + 1]: the position at which each document starts, and T at the end."""
    max_seqlen: int
    """Tokens of the longest document."""
    sample_ids: list[int]
    """The index of each row in the dataset; -1 for a padding row."""
    context: ContextShard | None = None
    """Which tokens this rank holds, where context-parallel ranks share them; None where it holds all. `cu_seqlens` and
    `max_seqlen` describe all tokens in any case."""

    def shard(self, rank: int, size: int, chunk_size: int | None, query_pool: int = 1) -> PackedBatch:
        """The part of the batch that one context-parallel rank holds.

        Args:
            rank: place of the rank among those that share the batch.
            size: number of ranks that share the batch.
            chunk_size: tokens of a chunk of DashAttention; None where no layer routes.
            query_pool: queries whose mean DashAttention's router sees.
        """
        if size == 1:
            return self
        context = shard_sequence(self.cu_seqlens, rank, size, chunk_size, query_pool)
        return replace(
            self,
            tokens=self.tokens[:, context.token],
            labels=self.labels[:, context.token],
            loss_mask=self.loss_mask[:, context.token],
            position_ids=self.position_ids[:, context.token],
            context=context,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Copy all tensors to a device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Copy all tensors to page-locked memory, so that `to(non_blocking=True)` overlaps with work."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        return replace(
            self,
            tokens=function(self.tokens),
            labels=function(self.labels),
            loss_mask=function(self.loss_mask),
            position_ids=function(self.position_ids),
            cu_seqlens=function(self.cu_seqlens),
            context=None if self.context is None else self.context.map(function),
        )


def num_target_tokens(batch: PackedBatch) -> Tensor:
    """The number of tokens that the loss averages over, an int64 scalar tensor on the batch's device."""
    return batch.loss_mask.sum()


def pack_samples(
    rows: Sequence[Mapping[str, Tensor]],
    eod: int,
    pack_documents: bool = True,
    sample_ids: Sequence[int] | None = None,
    max_context: int | None = None,
) -> PackedBatch:
    """Concatenate rows and mark where documents start.

    Args:
        rows: each with tokens and labels, int64 [seq_length], and optionally loss_mask [seq_length]. A row with starts, bool
            [seq_length], says itself where its documents start, and eod means nothing in it: it may end turns.
        eod: the token that ends a document.
        pack_documents: True starts a document at each row start and after each eod; False at row starts only, so
            that a row attends across the documents in it. The label of an eod never counts in the loss.
        sample_ids: dataset index of each row; -1 marks a padding row, which counts in no loss. Default: 0, 1,
            and so on.
        max_context: also start a document at every multiple of this number of tokens within a row. The loss does
            not stop there: the last token before such a cut still predicts the token after it, so that targets are
            the same at every length. None: rows are not cut.

    Returns:
        A PackedBatch with T = len(rows) * seq_length. An eod at the end of a row adds no empty document.
    """
    if not rows:
        raise ValueError(
            "rows=[] must hold at least one row; pass one row for each sample of the micro-batch"
        )
    ids = list(range(len(rows))) if sample_ids is None else [int(index) for index in sample_ids]
    if len(ids) != len(rows):
        raise ValueError(
            f"sample_ids has {len(ids)} entries and must have one for each of the {len(rows)} rows"
        )
    tokens_BN = torch.stack([row["tokens"] for row in rows]).long()
    labels_BN = torch.stack([row["labels"] for row in rows]).long()
    num_rows, seq_length = tokens_BN.shape

    starts_BN, loss_mask_BN = _starts_and_targets(rows, ids, tokens_BN, eod)
    starts_BN &= pack_documents
    starts_BN[:, :: max_context or seq_length] = True
    starts = starts_BN.flatten().nonzero().flatten()
    num_tokens = num_rows * seq_length
    ends = torch.cat([starts[1:], starts.new_tensor([num_tokens])])
    position_ids = torch.arange(num_tokens) - torch.repeat_interleave(starts, ends - starts)
    return PackedBatch(
        tokens=tokens_BN.reshape(1, num_tokens),
        labels=labels_BN.reshape(1, num_tokens),
        loss_mask=loss_mask_BN.reshape(1, num_tokens),
        position_ids=position_ids.reshape(1, num_tokens),
        cu_seqlens=torch.cat([starts, starts.new_tensor([num_tokens])]).to(torch.int32),
        max_seqlen=int((ends - starts).max()),
        sample_ids=ids,
    )


def _starts_and_targets(
    rows: Sequence[Mapping[str, Tensor]], ids: list[int], tokens_BN: Tensor, eod: int
) -> tuple[Tensor, Tensor]:
    """Where documents start, but for the first of each row, and whose labels count; bool [rows, seq_length] both."""
    ends_BN = tokens_BN == eod
    starts_BN, loss_mask_BN = ends_BN.roll(1, dims=1), ~ends_BN
    for index, row in enumerate(rows):
        if "starts" in row:
            starts_BN[index] = row["starts"]
            loss_mask_BN[index] = True
        if ids[index] < 0:
            loss_mask_BN[index] = False
        elif "loss_mask" in row:
            loss_mask_BN[index] &= row["loss_mask"] > 0
    return starts_BN, loss_mask_BN


class BatchSource:
    """The micro-batches of one data-parallel rank, addressed by the number of samples consumed.

    The global batch of a step is samples [consumed, consumed + global_batch) of the dataset, however it is
    split: rank r of R reads its rows [(m * R + r) * micro_batch, (m * R + r + 1) * micro_batch) in micro-batch m.
    `consumed_samples` and the number of steps that read them are therefore the whole state, and a run may resume
    with another number of ranks, micro-batch size or global batch.

    Args:
        dataset: rows in the order in which they are read, as `build_dataset` returns it.
        global_batch: samples per step, over all ranks.
        micro_batch: rows in one `PackedBatch`.
        eod: the token that ends a document.
        pack_documents: see `pack_samples`.
        data_parallel_rank, data_parallel_size: this rank's place among the ranks that read different data, and their
            number.
        num_workers: threads that read ahead, two micro-batches each; 0 reads when asked.
        pad_last: fill an incomplete last global batch with rows that count in no loss, so that an evaluation
            reads every row once with any number of ranks. Otherwise those rows are skipped.
        pin_memory: hand out batches in page-locked memory.
        context_rank, context_size, chunk_size, query_pool: which part of every batch to return, see `PackedBatch.shard`.
        max_context: function from the number of finished steps to the most tokens of context, see `pack_samples`; None:
            rows are not cut.

    Raises:
        ValueError: an argument breaks a rule, or the dataset has no further global batch.
    """

    def __init__(
        self,
        dataset: RowDataset,
        *,
        global_batch: int,
        micro_batch: int,
        eod: int,
        pack_documents: bool = True,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        num_workers: int = 0,
        pad_last: bool = False,
        pin_memory: bool = False,
        context_rank: int = 0,
        context_size: int = 1,
        chunk_size: int | None = None,
        query_pool: int = 1,
        max_context: Callable[[int], int] | None = None,
    ) -> None:
        self.accumulation_steps = micro_batches(global_batch, micro_batch, data_parallel_size)
        _check_place(data_parallel_rank, data_parallel_size, num_workers)
        self.dataset = dataset
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.eod = eod
        self.pack_documents = pack_documents
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.num_workers = num_workers
        self.pad_last = pad_last
        self.pin_memory = pin_memory
        self.share = (context_rank, context_size, chunk_size, query_pool)
        self.max_context = max_context
        self.consumed_samples = self.steps = 0
        self._micro_step = 0
        # Threads, not a DataLoader's processes: reading mostly waits for the file system, which threads do
        # well, while processes are forked with CUDA and NCCL in them, and the death of one raises wherever
        # the trainer happens to be, even within a collective.
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[PackedBatch]] = deque()

    @property
    def remaining_steps(self) -> int:
        """The number of global batches left in the dataset."""
        remaining = max(0, len(self.dataset) - self.consumed_samples)
        return -(-remaining // self.global_batch) if self.pad_last else remaining // self.global_batch

    def next_batch(self) -> PackedBatch:
        """This rank's next micro-batch; after `accumulation_steps` of them the global batch is consumed."""
        if self.remaining_steps == 0:
            raise ValueError(
                f"the dataset has {len(self.dataset)} samples and {self.consumed_samples} are consumed: no "
                f"whole global batch of {self.global_batch} is left; build it with a larger num_samples or "
                "lower training.steps"
            )
        if self.num_workers:
            batch = self._read_ahead()
        else:
            batch = self._load(self._sample_ids(self.consumed_samples, self._micro_step), self.steps)
        self._micro_step += 1
        if self._micro_step == self.accumulation_steps:
            self._micro_step = 0
            self.steps += 1
            self.consumed_samples += self.global_batch
        return batch

    def __iter__(self) -> Iterator[PackedBatch]:
        """The micro-batches of the global batches left in the dataset."""
        while self.remaining_steps:
            yield self.next_batch()

    def pack(
        self, rows: Sequence[Mapping[str, Tensor]], sample_ids: Sequence[int], max_context: int | None = None
    ) -> PackedBatch:
        """This rank's part of a micro-batch of the given rows; see `pack_samples`."""
        batch = pack_samples(rows, self.eod, self.pack_documents, sample_ids, max_context)
        return batch.shard(*self.share)

    def state_dict(self) -> dict[str, int]:
        """The position: consumed samples and finished steps; a global batch under way counts as not begun."""
        return {"consumed_samples": self.consumed_samples, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to the first sample that the saved run had not consumed, whatever its ranks and batch sizes.

        A state without a number of steps is read as one whose steps had this global batch.
        """
        consumed = state["consumed_samples"]
        if not isinstance(consumed, int) or consumed < 0:
            raise ValueError(
                f"consumed_samples={consumed!r} must be a whole number >= 0; the checkpoint is damaged"
            )
        self.consumed_samples = consumed
        self.steps = state.get("steps", consumed // self.global_batch)
        self._micro_step = 0
        self._ahead.clear()

    def _sample_ids(self, consumed: int, micro_step: int) -> list[int]:
        first = consumed + (micro_step * self.data_parallel_size + self.data_parallel_rank) * self.micro_batch
        num_rows = len(self.dataset)
        return [index if index < num_rows else -1 for index in range(first, first + self.micro_batch)]

    def _load(self, sample_ids: list[int], step: int) -> PackedBatch:
        max_context = None if self.max_context is None else self.max_context(step)
        # a padding row has to have some tokens: the first sample's, masked
        batch = self.pack([self.dataset[max(index, 0)] for index in sample_ids], sample_ids, max_context)
        return batch.pin_memory() if self.pin_memory else batch

    def _read_ahead(self) -> PackedBatch:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="data")
        first = self.consumed_samples
        end = first + self.remaining_steps * self.global_batch
        while len(self._ahead) < 2 * self.num_workers:
            number = self._micro_step + len(self._ahead)
            steps, micro_step = divmod(number, self.accumulation_steps)
            consumed = first + steps * self.global_batch
            if consumed >= end:
                break
            ids = self._sample_ids(consumed, micro_step)
            self._ahead.append(self._threads.submit(self._load, ids, self.steps + steps))
        try:
            return self._ahead.popleft().result()
        except BaseException:
            # a caller that tries again gets the same micro-batch, not the one after
            self._ahead.clear()
            raise


def _check_place(data_parallel_rank: int, data_parallel_size: int, num_workers: int) -> None:
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(
            f"data_parallel_rank={data_parallel_rank} must lie in [0, {data_parallel_size}), the "
            "data-parallel ranks"
        )
    if num_workers < 0:
        raise ValueError(
            f"data.num_workers={num_workers} must be at least 0; 0 reads in the trainer's own process"
        )
