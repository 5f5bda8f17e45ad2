from itertools import pairwise

import pytest
import torch

from dash_megatron.data.batches import BatchSource, num_target_tokens, pack_samples

EOD = 2


def row(text: list[int]) -> dict[str, torch.Tensor]:
    """A row of all but the last token, which is a label only."""
    tokens = torch.tensor(text)
    return {"tokens": tokens[:-1], "labels": tokens[1:]}


class Numbers:
    """Row i holds the token 10 + i, with an end of document in the middle."""

    def __init__(self, length: int, seq_length: int = 6) -> None:
        self.length = length
        self.seq_length = seq_length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = [10 + index] * (self.seq_length + 1)
        text[self.seq_length // 2] = EOD
        return row(text)


def naive(texts: list[list[int]], pack_documents: bool, max_context: int | None = None):
    """Walk over the tokens one by one."""
    positions, mask, starts, total = [], [], [], 0
    for text in texts:
        for place in range(len(text) - 1):
            cut = max_context is not None and place % max_context == 0
            if place == 0 or cut or (pack_documents and text[place - 1] == EOD):
                starts.append(total)
            positions.append(total - starts[-1])
            mask.append(text[place] != EOD)
            total += 1
    return positions, mask, [*starts, total]


@pytest.mark.parametrize("pack_documents", [True, False], ids=["packed", "rows alone"])
def test_packing_equals_a_walk_over_the_tokens(pack_documents):
    generator = torch.Generator().manual_seed(0)
    for num_rows, length in [(1, 2), (1, 9), (3, 5), (4, 33)]:
        for _ in range(20):
            texts = torch.randint(0, 6, (num_rows, length), generator=generator).tolist()
            batch = pack_samples([row(text) for text in texts], EOD, pack_documents)
            positions, mask, cu_seqlens = naive(texts, pack_documents)
            assert batch.tokens.tolist() == [[token for text in texts for token in text[:-1]]]
            assert batch.labels.tolist() == [[token for text in texts for token in text[1:]]]
            assert batch.position_ids.tolist() == [positions]
            assert batch.loss_mask.tolist() == [mask]
            assert batch.cu_seqlens.tolist() == cu_seqlens
            assert batch.max_seqlen == max(end - start for start, end in pairwise(cu_seqlens))
            assert num_target_tokens(batch) == sum(mask)


@pytest.mark.parametrize("pack_documents", [True, False], ids=["packed", "rows alone"])
def test_a_shorter_context_cuts_rows_and_keeps_tokens_and_targets(pack_documents):
    generator = torch.Generator().manual_seed(0)
    for max_context in (2, 4, 12):
        texts = torch.randint(0, 6, (3, 13), generator=generator).tolist()
        rows = [row(text) for text in texts]
        batch = pack_samples(rows, EOD, pack_documents, max_context=max_context)
        whole = pack_samples(rows, EOD, pack_documents)
        positions, _, cu_seqlens = naive(texts, pack_documents, max_context)
        assert batch.position_ids.tolist() == [positions]
        assert max(positions) < max_context
        assert batch.cu_seqlens.tolist() == cu_seqlens
        for name in ("tokens", "labels", "loss_mask"):
            assert torch.equal(getattr(batch, name), getattr(whole, name)), name


def test_packed_tensors_have_the_promised_types():
    batch = pack_samples([row([5, 6, 7]), row([5, EOD, 7])], EOD)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.position_ids.dtype) == (torch.int64,) * 3
    assert (batch.loss_mask.dtype, batch.cu_seqlens.dtype) == (torch.bool, torch.int32)
    assert (
        batch.tokens.shape
        == batch.labels.shape
        == batch.loss_mask.shape
        == batch.position_ids.shape
        == (1, 4)
    )
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)
    assert moved.sample_ids == [0, 1]


def test_no_loss_is_taken_across_documents():
    for pack_documents in (True, False):
        batch = pack_samples([row([5, EOD, 7, 8, EOD, EOD, 9])], EOD, pack_documents)
        assert batch.loss_mask.tolist() == [[True, False, True, True, False, False]]


def test_a_row_starts_a_document_whatever_the_row_before_ended():
    batch = pack_samples([row([5, 6, 7]), row([7, 8, 9])], EOD)
    assert batch.cu_seqlens.tolist() == [0, 2, 4]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1]]


def test_an_eod_at_the_end_leaves_no_empty_document():
    batch = pack_samples([row([5, EOD, 7]), row([EOD, EOD, 3])], EOD)
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4]


def test_the_datasets_own_loss_mask_is_kept():
    masked = row([5, 6, 7, 8]) | {"loss_mask": torch.tensor([1.0, 0.0, 1.0])}
    assert pack_samples([masked], EOD).loss_mask.tolist() == [[True, False, True]]


def test_rows_and_sample_ids_have_to_agree():
    with pytest.raises(ValueError, match="at least one row"):
        pack_samples([], EOD)
    with pytest.raises(ValueError, match="2 entries and must have one for each of the 1 rows"):
        pack_samples([row([5, 6])], EOD, sample_ids=[1, 2])


def read_step(dataset, consumed, global_batch, ranks, micro_batch, **settings):
    """Sample ids of one global batch, by rank and micro-batch."""
    steps = []
    for rank in range(ranks):
        source = BatchSource(
            dataset,
            global_batch=global_batch,
            micro_batch=micro_batch,
            eod=EOD,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            **settings,
        )
        source.load_state_dict({"consumed_samples": consumed})
        batches = [source.next_batch() for _ in range(source.accumulation_steps)]
        assert source.state_dict()["consumed_samples"] == consumed + global_batch
        steps.append(batches)
    return steps


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 4), (2, 2), (4, 1), (1, 1), (2, 1)])
def test_the_global_batch_is_the_same_however_it_is_divided(ranks, micro_batch):
    steps = read_step(Numbers(100), 8, 4, ranks, micro_batch)
    ids = [index for batches in steps for batch in batches for index in batch.sample_ids]
    assert sorted(ids) == [8, 9, 10, 11]
    tokens = [int(token) for batches in steps for batch in batches for token in batch.tokens[0]]
    assert sorted(set(tokens) - {EOD}) == [18, 19, 20, 21]


def test_resuming_reads_the_next_sample_with_any_number_of_ranks():
    def read(ranks, micro_batch, global_batch, state, steps):
        seen = []
        sources = [
            BatchSource(
                Numbers(1000),
                global_batch=global_batch,
                micro_batch=micro_batch,
                eod=EOD,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
            for rank in range(ranks)
        ]
        for source in sources:
            source.load_state_dict(state)
            for _ in range(steps * source.accumulation_steps):
                seen += source.next_batch().sample_ids
        assert len({source.state_dict()["consumed_samples"] for source in sources}) == 1
        return sorted(seen), sources[0].state_dict()

    first, state = read(2, 2, 8, {"consumed_samples": 0}, 3)
    assert first == list(range(24))
    for ranks, micro_batch, global_batch in [(2, 2, 8), (4, 1, 8), (1, 4, 8), (3, 2, 12)]:
        seen, _ = read(ranks, micro_batch, global_batch, state, 2)
        assert seen == list(range(24, 24 + 2 * global_batch))


def test_a_global_batch_that_is_under_way_counts_as_not_begun():
    source = BatchSource(Numbers(100), global_batch=4, micro_batch=1, eod=EOD)
    for _ in range(6):
        source.next_batch()
    assert source.state_dict() == {"consumed_samples": 4, "steps": 1}


@pytest.mark.parametrize("start", [0, 6])
def test_workers_read_what_the_trainer_would_read(start):
    def read(num_workers):
        source = BatchSource(
            Numbers(20),
            global_batch=6,
            micro_batch=3,
            eod=EOD,
            pad_last=True,
            num_workers=num_workers,
        )
        source.load_state_dict({"consumed_samples": start})
        return [(batch.sample_ids, batch.tokens.tolist(), batch.cu_seqlens.tolist()) for batch in source]

    random_state = torch.random.get_rng_state()
    assert read(2) == read(0)
    assert torch.equal(torch.random.get_rng_state(), random_state)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_the_length_of_a_step_depends_on_the_step_alone(num_workers):
    def read(state, micro_batch=2, global_batch=4):
        source = BatchSource(
            Numbers(100, seq_length=8),
            global_batch=global_batch,
            micro_batch=micro_batch,
            eod=0,  # there is none: only cuts make documents
            num_workers=num_workers,
            max_context={0: 2, 1: 2, 2: 4, 3: 8, 4: 8}.__getitem__,
        )
        source.load_state_dict(state)
        longest = []
        while source.steps < 5:
            step, batch = source.steps, source.next_batch()
            longest.append((step, int(batch.cu_seqlens.diff().max())))
        return sorted(set(longest)), source.state_dict()

    assert read({"consumed_samples": 0}) == (
        [(0, 2), (1, 2), (2, 4), (3, 8), (4, 8)],
        {"consumed_samples": 20, "steps": 5},
    )
    later = [(2, 4), (3, 8), (4, 8)]
    assert read({"consumed_samples": 8}, micro_batch=1)[0] == later
    # two steps of 4 samples, then steps of 6
    assert read({"consumed_samples": 8, "steps": 2}, global_batch=6) == (
        later,
        {"consumed_samples": 26, "steps": 5},
    )


def test_an_error_in_a_worker_reaches_the_trainer():
    class Broken(Numbers):
        def __getitem__(self, index):
            if index == 3:
                raise ValueError("row 3 has token id 99")
            return super().__getitem__(index)

    source = BatchSource(Broken(20), global_batch=1, micro_batch=1, eod=EOD, num_workers=2)
    for _ in range(3):
        source.next_batch()
    for _ in range(2):
        with pytest.raises(ValueError, match="row 3 has token id 99"):
            source.next_batch()


def test_going_elsewhere_drops_what_was_read_ahead():
    source = BatchSource(Numbers(100), global_batch=2, micro_batch=1, eod=EOD, num_workers=3)
    source.next_batch()
    source.load_state_dict({"consumed_samples": 50})
    assert source.next_batch().sample_ids == [50]


def test_an_incomplete_last_batch_is_skipped_or_padded():
    dataset = Numbers(7)
    assert len(list(BatchSource(dataset, global_batch=4, micro_batch=2, eod=EOD))) == 2

    def evaluate(ranks):
        ids, targets = [], 0
        for rank in range(ranks):
            source = BatchSource(
                dataset,
                global_batch=4,
                micro_batch=1,
                eod=EOD,
                pad_last=True,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
            batches = list(source)
            assert len(batches) == 8 // ranks
            for batch in batches:
                ids += batch.sample_ids
                targets += int(num_target_tokens(batch))
        return sorted(ids), targets

    assert evaluate(1) == evaluate(2) == evaluate(4) == ([-1, *range(7)], 7 * 5)


def test_an_exhausted_dataset_says_what_to_change():
    source = BatchSource(Numbers(5), global_batch=4, micro_batch=4, eod=EOD)
    source.next_batch()
    with pytest.raises(ValueError, match=r"5 samples and 4 are consumed.*lower training\.steps"):
        source.next_batch()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 0}, r"training\.micro_batch=0 must be at least 1"),
        ({"global_batch": 0}, r"training\.global_batch=0 must be at least 1"),
        ({"global_batch": 7, "micro_batch": 2, "data_parallel_size": 2}, r"multiple of 4 .*try 4"),
        ({"data_parallel_rank": 2, "data_parallel_size": 2}, r"data_parallel_rank=2 must lie in \[0, 2\)"),
        ({"num_workers": -1}, r"data\.num_workers=-1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_split_that_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        BatchSource(Numbers(5), **({"global_batch": 4, "micro_batch": 1, "eod": EOD} | changes))


def test_a_damaged_state_is_refused():
    source = BatchSource(Numbers(5), global_batch=4, micro_batch=1, eod=EOD)
    for consumed in (-1, "4", 1.5):
        with pytest.raises(ValueError, match="consumed_samples="):
            source.load_state_dict({"consumed_samples": consumed})
