import datetime
import errno
import gc
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dash_megatron.data import dataset as dataset_module
from dash_megatron.data import sidecar
from dash_megatron.data.blend import unigram_entropy
from dash_megatron.data.dataset import build_dataset
from dash_megatron.data.index_cache import Index, cached_indices
from dash_megatron.data.index_file import edges_digest
from dash_megatron.data.sidecar import Sidecar, describe, sidecar_path

SEQ_LENGTH = 16


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(blend, **changes):
        settings = {
            "seq_length": SEQ_LENGTH,
            "num_samples": 10,
            "seed": 1,
            "tokenizer": tokenizer,
            "cache_dir": tmp_path / "cache",
        }
        return build_dataset(blend, **(settings | changes))

    return build


def test_the_unigram_entropy_of_a_blend_goes_by_its_weights_and_without_any_by_tokens(write_data, tmp_path):
    # frequencies of 3/4 and 1/4, and of 1/2 for two tokens; ends count
    a, b = write_data(tmp_path / "a", [[5, 5, 5]] * 10), write_data(tmp_path / "b", [[5]] * 10)
    of_a, of_b = np.log(4) - 0.75 * np.log(3), np.log(2)
    assert unigram_entropy([a, b]) == pytest.approx((40 * of_a + 20 * of_b) / 60)
    assert unigram_entropy([f"0.1 {a}", f"0.9 {b}"]) == pytest.approx(0.1 * of_a + 0.9 * of_b)
    assert unigram_entropy([f"1 {a}", f"9 {b}"]) == pytest.approx(0.1 * of_a + 0.9 * of_b)


def numbered(first: int, count: int, length: int = 24) -> list[list[int]]:
    """Documents that are all different, of tokens from 3 on."""
    rng = np.random.default_rng(first)
    return [rng.integers(3, 300, length).tolist() for _ in range(count)]


def rows_of(dataset) -> list[tuple[int, ...]]:
    return [tuple(dataset[index]["tokens"].tolist()) for index in range(len(dataset))]


def test_rows_are_cut_from_documents_and_labels_are_next_tokens(write_data, build, tmp_path, tokenizer):
    documents = numbered(0, 40)
    dataset = build([write_data(tmp_path / "a", documents)], num_samples=None)
    stream_length = sum(len(document) + 1 for document in documents)
    assert len(dataset) == (stream_length - 1) // SEQ_LENGTH
    known = {tuple(document) for document in documents}
    for index in range(len(dataset)):
        row = dataset[index]
        assert row["tokens"].dtype == row["labels"].dtype == torch.int64
        assert row["tokens"].shape == row["labels"].shape == (SEQ_LENGTH,)
        assert torch.equal(row["tokens"][1:], row["labels"][:-1])
        text = [*row["tokens"].tolist(), int(row["labels"][-1])]
        # what stands between two ends of documents is a whole document
        ends = [place for place, token in enumerate(text) if token == tokenizer.eod]
        for left, right in pairwise(ends):
            assert tuple(text[left + 1 : right]) in known


def test_the_order_depends_on_the_seed_and_is_the_same_each_time(write_data, build, tmp_path):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    first = rows_of(build([prefix]))
    assert rows_of(build([prefix])) == first
    assert rows_of(build([prefix], cache_dir=tmp_path / "other")) == first
    assert rows_of(build([prefix], seed=2)) != first


def test_more_samples_go_on_where_fewer_ended(write_data, build, tmp_path):
    a, b = write_data(tmp_path / "a", numbered(0, 20)), write_data(tmp_path / "b", numbered(1, 10))
    for blend in ([a], [f"0.7 {a}", f"0.3 {b}"]):
        assert rows_of(build(blend, num_samples=150))[:70] == rows_of(build(blend, num_samples=70))


def test_every_pass_has_each_row_once_in_another_order(write_data, build, tmp_path):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    one_pass = len(build([prefix], num_samples=None))
    rows = rows_of(build([prefix], num_samples=3 * one_pass))
    passes = [rows[start : start + one_pass] for start in range(0, len(rows), one_pass)]
    assert Counter(passes[0]) == Counter(passes[1]) == Counter(passes[2])
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_a_blend_honours_its_weights_everywhere_in_the_order(write_data, build, tmp_path):
    a = write_data(tmp_path / "a", [[10] * 24 for _ in range(40)])
    b = write_data(tmp_path / "b", [[20] * 24 for _ in range(5)])
    c = write_data(tmp_path / "c", [[30] * 24 for _ in range(40)])
    dataset = build([f"6 {a}", f"3 {b}", f"1 {c}"], num_samples=500)
    kinds = [Counter(row).most_common(1)[0][0] for row in rows_of(dataset)]
    # as in earlier releases, whose runs are resumed
    assert kinds[:10] == [10, 20, 10, 30, 10, 20, 10, 10, 20, 10]
    for stop in (50, 200, 500):
        seen = Counter(kinds[:stop])
        for kind, share in ((10, 0.6), (20, 0.3), (30, 0.1)):
            assert abs(seen[kind] - share * stop) <= 2


def test_prefixes_without_weights_are_mixed_by_size(write_data, build, tmp_path):
    a = write_data(tmp_path / "a", [[10] * 24 for _ in range(60)])
    b = write_data(tmp_path / "b", [[20] * 24 for _ in range(20)])
    kinds = [Counter(row).most_common(1)[0][0] for row in rows_of(build([a, b], num_samples=200))]
    assert abs(kinds.count(10) - 150) <= 2


def test_validation_is_one_pass_over_everything(write_data, build, tmp_path):
    a, b = write_data(tmp_path / "a", numbered(0, 20)), write_data(tmp_path / "b", numbered(1, 10))
    alone = Counter(rows_of(build([a], num_samples=None)) + rows_of(build([b], num_samples=None)))
    whole = build([f"9 {a}", f"1 {b}"], num_samples=10_000, split_name="valid")
    assert set(Counter(rows_of(whole)).values()) == {1}
    assert len(whole) == sum(alone.values())
    assert rows_of(build([a, b], num_samples=7, split_name="valid")) == rows_of(whole)[:7]


def test_data_made_anew_does_not_meet_the_index_of_its_predecessor(write_data, build, tmp_path):
    build([write_data(tmp_path / "a", numbered(0, 40))])
    changed = [[7] * 3 for _ in range(200)]
    dataset = build([write_data(tmp_path / "a", changed)], num_samples=None)
    assert len(dataset) == (200 * 4 - 1) // SEQ_LENGTH
    assert {token for row in rows_of(dataset) for token in row} == {2, 7}


def test_a_build_that_was_killed_leaves_no_half_index(write_data, build, tmp_path, monkeypatch):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    save = np.save

    def fail_at_the_shuffle(path, *arguments, **settings):
        if "shuffle" in str(path):
            raise KeyboardInterrupt
        save(path, *arguments, **settings)

    monkeypatch.setattr(np, "save", fail_at_the_shuffle)
    with pytest.raises(KeyboardInterrupt):
        build([prefix])
    monkeypatch.undo()
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(build([prefix])) == 10


@pytest.mark.parametrize("blend", [["a"], ["0.7 a", "0.3 b"], ["a", "b"]], ids=str)
def test_an_index_is_built_once_and_mapped_into_memory_afterwards(
    blend, write_data, build, tmp_path, monkeypatch
):
    write_data(tmp_path / "a", numbered(0, 40))
    write_data(tmp_path / "b", numbered(1, 10))
    monkeypatch.chdir(tmp_path)
    first = rows_of(build(blend))
    one_pass = build(blend, num_samples=None)
    monkeypatch.setattr(np, "save", lambda *arguments, **settings: pytest.fail("built again"))
    monkeypatch.setattr(np, "zeros", lambda *arguments, **settings: pytest.fail("built in memory"))
    assert rows_of(build(blend)) == first
    assert len(build(blend, num_samples=None)) == len(one_pass)


def test_the_log_tells_how_many_minutes_the_order_of_large_data_takes(tmp_path, caplog):
    caplog.set_level("INFO", logger="dash_megatron")
    made = {"numbers": np.arange(3)}
    indices = []
    for size in (10**8, 3 * 10**9):
        indices.append(Index(lambda: made, tmp_path / str(size), ("numbers",), f"all {size}", size))
        for (numbers,) in cached_indices(indices):  # of which the last alone is missing
            assert list(numbers) == [0, 1, 2]
    place = f"once: later starts read it from {tmp_path}"
    assert caplog.messages == [
        f"ordering the rows of all 100000000, {place}",
        f"ordering the rows of all 3000000000, {place}; one process needs about 10 minutes",
    ]


def test_an_index_that_lost_its_end_is_made_anew(write_data, build, tmp_path, caplog):
    blend = [write_data(tmp_path / "a", numbered(0, 40)), write_data(tmp_path / "b", numbered(1, 10))]
    first = rows_of(build(blend))
    for path in sorted((tmp_path / "cache").glob("*/*.npy")):
        for size in (path.stat().st_size // 2, 0):
            os.truncate(path, size)
            assert rows_of(build(blend)) == first
    assert "the order of the rows of" in caplog.text


def _lose_a_file_of_each_index(cache: Path) -> list[Path]:
    """The files that are left."""
    for folder in cache.iterdir():
        sorted(folder.glob("*.npy"))[0].unlink()
    return sorted(cache.glob("*/*"))


def test_an_index_that_lost_a_file_is_made_anew_beside_what_others_have_mapped(write_data, build, tmp_path):
    blend = [write_data(tmp_path / "a", numbered(0, 40)), write_data(tmp_path / "b", numbered(1, 10))]
    first = rows_of(build(blend))
    before = {path: path.stat().st_ino for path in (tmp_path / "cache").glob("*/*")}
    kept = _lose_a_file_of_each_index(tmp_path / "cache")
    held = [path.open("rb") for path in kept]
    contents = [file.read() for file in held]
    assert rows_of(build(blend)) == first
    assert set((tmp_path / "cache").glob("*/*")) == set(before)
    assert all(path.stat().st_ino != before[path] for path in kept)
    for file, content in zip(held, contents, strict=True):
        file.seek(0)
        assert file.read() == content
        file.close()


def test_earlier_releases_find_no_file_of_an_index_missing(write_data, build, tmp_path):
    """They count those of Megatron, three arrays and a description, and remove what has fewer."""
    build([write_data(tmp_path / "a", numbered(0, 40))])
    (order,) = (path.parent for path in (tmp_path / "cache").glob("*/document_index.npy"))
    assert len(list(order.glob("[!.]*"))) == 4


def test_a_cache_that_may_not_be_written_to_is_named_before_an_order_is_made(
    write_data, build, tmp_path, monkeypatch
):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(dataset_module, "order_of_pass", lambda *_: pytest.fail("ordered in vain"))
    with pytest.raises(
        ValueError, match=r"cannot write to data.cache_dir=\S+/cache: .* give a folder that this user"
    ):
        build([write_data(tmp_path / "a", numbered(0, 40))])


def test_an_index_is_written_once_there_is_room(write_data, build, tmp_path, monkeypatch, caplog):
    prefix, save = write_data(tmp_path / "a", numbered(0, 40)), np.save

    def save_later(*arguments, **settings):
        monkeypatch.setattr(np, "save", save)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", save_later)
    build([prefix])
    assert re.search(
        r"cannot write \S+/cache/\w{32}: disk full: No space left .* bytes are free", caplog.text
    )
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("missing", [1, 3000, 9000])
def test_an_index_whose_end_the_disk_has_no_room_for_is_an_error_of_the_disk(tmp_path, missing):
    size = 128 + 8 * 1250
    index = Index(lambda: {"rows": np.arange(1250)}, tmp_path / "index", ("rows",), "data", 1250)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write \S+/index: File too large"):
            cached_indices([index])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    assert len(cached_indices([index])[0][0]) == 1250


def test_an_index_that_megatron_named_is_read(write_data, build, tmp_path, monkeypatch):
    blend = [write_data(tmp_path / "a", numbered(0, 40)), write_data(tmp_path / "b", numbered(1, 10))]
    first = rows_of(build(blend))
    for path in (tmp_path / "cache").glob("*/*_index.npy"):
        path.rename(path.with_name(f"0123abcd-GPTDataset-train-{path.name}"))
        (path.parent / "0123abcd-GPTDataset-train-description.txt").write_text("{}")
    monkeypatch.setattr(np, "save", lambda *arguments, **settings: pytest.fail("built again"))
    assert rows_of(build(blend)) == first


def test_what_killed_starts_left_is_removed_once_nobody_can_need_it(write_data, build, tmp_path):
    cache, prefix = tmp_path / "cache", write_data(tmp_path / "a", numbered(0, 40))
    build([prefix])
    (index,) = cache.iterdir()
    shutil.rmtree(index)
    # of the same index, and of other ones: the last file of one is a day old, that of the other is not
    same, old, new = (cache / f".building-{name}-node7-1234" for name in (index.name, "0" * 32, "1" * 32))
    for folder in (same, old, new):
        folder.mkdir()
        (folder / "document_index.npy").write_text("half")
    day_ago = time.time() - 25 * 3600
    for path in (old / "document_index.npy", old, new):
        os.utime(path, (day_ago, day_ago))
    build([prefix])
    assert set(cache.iterdir()) == {index, new}


def test_a_process_whose_parts_were_removed_as_its_index_was_there_reads_that(
    write_data, build, tmp_path, monkeypatch
):
    cache, prefix, save = tmp_path / "cache", write_data(tmp_path / "a", numbered(0, 40)), np.save
    first = rows_of(build([prefix]))
    (index,) = cache.iterdir()
    os.rename(index, tmp_path / "ready")

    def save_while_another_ends(file, array):
        save(file, array)
        if "sample" in str(file.name):
            os.rename(tmp_path / "ready", index)
            shutil.rmtree(Path(file.name).parent)

    monkeypatch.setattr(np, "save", save_while_another_ends)
    assert rows_of(build([prefix])) == first
    assert list(cache.iterdir()) == [index]


def _damaged_index(folder, rank, prefix, tokenizer):
    return build_dataset(
        [f"3 {prefix}", f"1 {prefix}"],
        seq_length=SEQ_LENGTH,
        num_samples=30,
        seed=3,
        tokenizer=tokenizer,
        cache_dir=Path(folder) / f"damaged_{rank}",
    )


def _build_on_rank(rank, folder, prefix, tokenizer, results):
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    dataset = build_dataset(
        [f"1 {prefix}", f"1 {prefix}"],
        seq_length=SEQ_LENGTH,
        num_samples=30,
        seed=1,
        tokenizer=tokenizer,
        # rank 1 is on another node, with a disk of its own, in the second round
        cache_dir=Path(folder) / "shared",
    )
    alone = build_dataset(
        [f"2 {prefix}", f"1 {prefix}"],
        seq_length=SEQ_LENGTH,
        num_samples=30,
        seed=2,
        tokenizer=tokenizer,
        cache_dir=Path(folder) / f"{rank}",
    )
    # rank 1's disk has an index that lost a file, and rank 0's has none
    damaged = _damaged_index(folder, rank, prefix, tokenizer)
    results.put((rank, rows_of(dataset), rows_of(alone), rows_of(damaged)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_that_build_at_once_see_the_same_rows(write_data, tokenizer, tmp_path):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    _damaged_index(tmp_path, 1, prefix, tokenizer)
    whole = sorted((tmp_path / "damaged_1").glob("*/*"))
    _lose_a_file_of_each_index(tmp_path / "damaged_1")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(
            target=_build_on_rank, args=(rank, str(tmp_path), prefix, tokenizer, results), daemon=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    seen = {rank: rows for rank, *rows in (results.get(timeout=60) for _ in ranks)}
    for rank in ranks:
        rank.join(timeout=60)
        assert rank.exitcode == 0
    assert seen[0] == seen[1]
    assert sorted((tmp_path / "damaged_1").glob("*/*")) == whole
    assert (
        len(list((tmp_path / "1").glob("*/*.npy"))) == len(list((tmp_path / "shared").glob("*/*.npy"))) == 5
    )


def test_the_order_of_a_later_pass_is_numpys_permutation_at_four_bytes_a_row(write_data, build, tmp_path):
    passes = build([write_data(tmp_path / "a", numbered(0, 40))], num_samples=1000).dataset
    order = passes._order(1)
    assert order.tolist() == np.random.default_rng([1, 1]).permutation(len(passes.one_pass)).tolist()
    assert order.nbytes == 4 * len(passes.one_pass)


def test_threads_that_read_ahead_order_a_later_pass_once_and_a_large_one_is_told(
    write_data, build, tmp_path, monkeypatch, caplog
):
    make, made = dataset_module._ShuffledPasses._make_order, []

    def slowly(passes, number):
        made.append(number)
        time.sleep(0.2)
        return make(passes, number)

    monkeypatch.setattr(dataset_module._ShuffledPasses, "_make_order", slowly)
    monkeypatch.setattr(dataset_module, "_MANY_ROWS", 60)
    caplog.set_level("INFO", logger="dash_megatron")
    dataset = build([write_data(tmp_path / "a", numbered(0, 40))], num_samples=1000)
    rows = len(dataset.dataset.one_pass)
    assert rows == 62
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(dataset.__getitem__, range(rows, 2 * rows)))
    assert made == [1]
    assert caplog.messages[-1] == "pass 2: ordering its 62 rows takes a minute or more"


def _build_slowly_on_rank(rank, folder, prefix, tokenizer, results):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=1),
    )
    order = dataset_module.order_of_pass

    def slowly(*arguments):
        time.sleep(3)
        return order(*arguments)

    dataset_module.order_of_pass = slowly
    rows = build_dataset(
        [prefix],
        seq_length=SEQ_LENGTH,
        num_samples=30,
        seed=1,
        tokenizer=tokenizer,
        cache_dir=folder / "cache",
    )
    results.put(rows_of(rows))


def test_ranks_wait_for_an_index_longer_than_for_a_collective(write_data, tokenizer, tmp_path):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(
            target=_build_slowly_on_rank, args=(rank, tmp_path, prefix, tokenizer, results), daemon=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    assert results.get(timeout=60) == results.get(timeout=60)


def _build_what_rank_0_checked(rank, folder, tokenizer, results):
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    read: list[str] = []
    sidecar.edges_digest = lambda path: read.append(str(path)) or edges_digest(path)
    told = []
    # rank 1's machine has other copies: one was cut, one is of as many tokens in other documents, and the last is not there
    for name in ("whole", "damaged", *(("cut", "other", "nowhere") if rank else ("whole", "whole", "whole"))):
        try:
            build_dataset(
                [str(folder / name)],
                seq_length=SEQ_LENGTH,
                num_samples=30,
                seed=1,
                tokenizer=tokenizer,
                cache_dir=folder / "cache",
            )
        except (ValueError, FileNotFoundError) as error:
            told.append(str(error))
    results.put((rank, told, len(read)))
    torch.distributed.barrier()


def test_rank_0_checks_the_data_of_all_and_each_machine_that_its_copy_is_the_same(
    write_data, tokenizer, tmp_path
):
    for name in ("whole", "damaged", "cut"):
        write_data(tmp_path / name, numbered(0, 40))
    os.truncate(tmp_path / "damaged.bin", 1000)
    os.truncate(tmp_path / "cut.bin", 1000)
    write_data(tmp_path / "other", numbered(0, 20, 23) + numbered(0, 20, 25))
    for ending in ("bin", "idx"):
        sizes = {(tmp_path / f"{name}.{ending}").stat().st_size for name in ("other", "whole")}
        assert len(sizes) == 1
    shutil.copy(tmp_path / "whole.bin", tmp_path / "other.bin")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(
            target=_build_what_rank_0_checked, args=(rank, tmp_path, tokenizer, results), daemon=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = {rank: rest for rank, *rest in (results.get(timeout=60) for _ in ranks)}
    damaged, cut, other, nowhere = found[1][0]
    assert found[0][0] == found[1][0]
    assert re.search(r"damaged\.bin has 1000 bytes and must have 2000 .*truncated", damaged)
    assert re.search(r"/cut\.bin on node1 is another file than on rank 0's machine; copy it there", cut)
    assert re.search(r"/other\.idx on node1 is another file than on rank 0's machine", other)
    assert re.search(r"nowhere\.idx does not exist on node1, but on rank 0's machine", nowhere)
    assert found[0][1] > 0
    assert found[1][1] == 0


def test_a_missing_file_is_named(write_data, build, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^data\.train: .*nothing\.idx does not exist"):
        build([str(tmp_path / "nothing")])
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    os.unlink(f"{prefix}.bin")
    with pytest.raises(FileNotFoundError, match=r"a\.bin does not exist"):
        build([prefix])


def test_a_truncated_bin_is_named(write_data, build, tmp_path):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    os.truncate(f"{prefix}.bin", 1000)
    with pytest.raises(ValueError, match=r"a\.bin has 1000 bytes and must have 2000 .*truncated"):
        build([prefix])


def test_an_index_damaged_in_its_middle_is_named_where_rows_are_ordered_and_described(
    write_data, build, tmp_path, tokenizer
):
    # in a length behind the first MiB, which digests look at
    prefix = write_data(tmp_path / "a", [[5]] * 300_000)
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(34 + 4 * 280_000)
        file.write(b"\3")
    with pytest.raises(
        ValueError, match=r"a\.idx is damaged: .* add up to 600001 tokens, and must to 600000"
    ):
        build([prefix])
    with pytest.raises(ValueError, match=r"a\.idx is damaged"):
        describe(prefix, tokenizer_fingerprint="f", vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)


def test_a_missing_sidecar_is_named_with_the_command_that_makes_it(write_data, build, tmp_path):
    prefix = write_data(tmp_path / "a", numbered(0, 40), sidecar=False)
    with pytest.raises(FileNotFoundError, match=rf"python -m data_tools.write_sidecar --prefix {prefix}"):
        build([prefix])


def test_a_damaged_sidecar_is_named(write_data, build, tmp_path):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    for content in ("{", "{}", "[]"):
        sidecar_path(prefix).write_text(content)
        with pytest.raises(ValueError, match=r"a\.idx\.json must be a data sidecar"):
            build([prefix])


def test_a_tokenizer_that_did_not_make_the_data_is_refused(write_data, build, tmp_path):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    replace(Sidecar.read(prefix), tokenizer_fingerprint="f" * 64).write(prefix)
    with pytest.raises(ValueError, match=r"fingerprint ffffffffffff, but data\.tokenizer=.* they must agree"):
        build([prefix])


def test_a_sidecar_of_other_data_is_refused(write_data, build, tmp_path):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    write_data(tmp_path / "a", numbered(1, 40), sidecar=False)
    with pytest.raises(ValueError, match="was replaced since"):
        build([prefix])


def test_rows_take_no_memory_for_each_document(write_data, build, tmp_path):
    kept = []
    for count in (1_000, 21_000):
        prefix = write_data(tmp_path / f"of{count}", [[5]] * count)
        tracemalloc.start()
        dataset = build([prefix])
        assert len(dataset) == 10
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert kept[1] - kept[0] < 20_000


def test_more_documents_than_int32_can_number_are_refused(write_data, build, tmp_path, monkeypatch):
    prefix = write_data(tmp_path / "a", numbered(0, 20))
    many = replace(sidecar.read_index(prefix), documents=1 << 31)
    monkeypatch.setattr(sidecar, "read_index", lambda _: many)
    with pytest.raises(
        ValueError, match="has 2147483648 documents and must have at most 2147483647; tokenize it as"
    ):
        build([prefix])


def test_an_empty_corpus_is_refused(write_data, build, tmp_path):
    prefix = write_data(tmp_path / "a", [])
    with pytest.raises(ValueError, match="has no tokens; an empty corpus"):
        build([prefix])


def test_a_corpus_shorter_than_one_row_is_refused(write_data, build, tmp_path):
    prefix = write_data(tmp_path / "a", [[5] * (SEQ_LENGTH - 1)])
    with pytest.raises(ValueError, match=r"has 16 tokens and must have at least data\.seq_length \+ 1 = 17"):
        build([prefix])
    assert len(build([write_data(tmp_path / "a", [[5] * SEQ_LENGTH])], num_samples=None)) == 1


def test_a_token_id_outside_the_vocabulary_is_refused_at_the_start(write_data, build, tmp_path, tokenizer):
    prefix = write_data(tmp_path / "a", numbered(0, 40))
    path = sidecar_path(prefix)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_token_id": tokenizer.vocab_size}))
    with pytest.raises(ValueError, match=rf"has token id {tokenizer.vocab_size}; ids must be below"):
        build([prefix])


def test_a_damaged_token_id_in_a_large_file_is_caught_when_read(write_data, build, tmp_path, tokenizer):
    prefix = write_data(tmp_path / "a", [[5] * 1_300_000])
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(1_300_000)
        file.write(np.uint16(tokenizer.vocab_size).tobytes())
    dataset = build([prefix], num_samples=None, seq_length=1000)
    with pytest.raises(ValueError, match=rf"row \d+ of .* has token id {tokenizer.vocab_size}; ids must lie"):
        rows_of(dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 0}, r"data\.seq_length=0 must be at least 1"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"seed": -1}, r"training\.seed=-1 must lie in"),
        ({"split_name": "test"}, "split_name='test' must be"),
        ({"blend": []}, r"data\.train=\[\] must name at least one"),
        ({"blend": ["0 a"]}, "weight 0; it must be above 0"),
        ({"blend": ["1 a", "b"]}, "weights to 1 of its 2 prefixes; give them to all or to none"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build(changes.pop("blend", ["a"]), **changes)


def test_more_data_sets_than_int16_can_number_are_refused(build):
    with pytest.raises(ValueError, match=r"data\.train names 32768 data sets and may name at most 32767"):
        build(["a"] * 32768)


def test_a_row_outside_the_dataset_is_an_error(write_data, build, tmp_path):
    dataset = build([write_data(tmp_path / "a", numbered(0, 40))])
    for index in (-1, 10):
        with pytest.raises(IndexError, match=rf"row {index} must lie in \[0, 10\)"):
            dataset[index]


def test_a_data_set_that_stands_twice_in_a_blend_is_named(write_data, build, tmp_path, caplog):
    a, b = write_data(tmp_path / "a", numbered(0, 20)), write_data(tmp_path / "b", numbered(1, 20))
    copy = write_data(tmp_path / "copy", numbered(0, 20))
    with caplog.at_level(logging.WARNING, "dash_megatron"):
        build([a, b])
        assert not caplog.records
        build([a, b, copy, a])
    (record,) = caplog.records
    assert f"data.train: {a}, {copy}, {a} hold the same data" in record.getMessage()


@pytest.fixture
def few_open_files():
    """A function that lowers this process's limits of open files, which are restored afterwards; hard ones can not be."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_blend_of_many_files_raises_the_limit_of_open_files(write_data, build, tmp_path, few_open_files):
    prefixes = [write_data(tmp_path / f"part{number}", numbered(number, 2)) for number in range(12)]
    few_open_files(len(os.listdir("/proc/self/fd")) + 40)
    dataset = build(prefixes, num_samples=24)
    assert len(rows_of(dataset)) == 24


def test_a_blend_of_more_files_than_may_be_open_is_refused(write_data, build, tmp_path, monkeypatch):
    prefixes = [write_data(tmp_path / f"part{number}", numbered(number, 2)) for number in range(3)]
    gc.collect()  # which closes files of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (before + 260, before + 265))
    needed = rf"data.train names 3 data sets: this process needs {before + 279} open files and may have {before + 265}"
    with pytest.raises(ValueError, match=needed):
        build(prefixes)
