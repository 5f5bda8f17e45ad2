"""Memory against real parameters, measured peaks and numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dash_megatron.config import Config, config_from_dict, load_config
from dash_megatron.config.flops import parameter_count
from dash_megatron.planning import baseline_times, memory, workspaces
from dash_megatron.planning.layout import Hardware, Layout, Recompute
from dash_megatron.planning.memory import memory_use, rank_parameters
from dash_megatron.planning.traffic import ContextComm
from dash_megatron.planning.workspaces import list_bytes
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study

ROOT = Path(__file__).parents[2]
# that steps of 1B were measured with, before configs followed docs/recipe.md
MEASURED_ATTENTION = [
    "attention.target_density=null",
    "attention.chunk_size=64",
    "attention.local_chunks=0",
    "attention.query_pool=1",
    "attention.pool_heads=false",
]
ALONE = Layout(1, 1, 1, 1, "all_gather", "full")


def tiny(precision: str = "bf16", **attention: Any) -> Config:
    return config_from_dict(
        {
            "run_dir": "run",
            "attention": attention,
            "model": {
                "layers": 2,
                "hidden_size": 64,
                "heads": 4,
                "kv_heads": 2,
                "ffn_hidden_size": 96,
                "vocab_size": 128,
                "qk_norm": True,
                "qkv_bias": True,
            },
            "data": {"seq_length": 256},
            "training": {"steps": 1, "global_batch": 8, "precision": precision},
        }
    )


@pytest.mark.parametrize("attention", [{}, {"pool_heads": True, "router_projections": True}], ids=str)
def test_weights_and_optimizer_are_those_of_a_real_model_and_its_adamw(attention: dict[str, Any]) -> None:
    from dash_megatron.layers.model import build_model
    from dash_megatron.parallel import destroy_process_groups, init_process_groups, read_launch

    config = tiny("fp32", **attention)
    init_process_groups(read_launch({}), config.parallel)
    try:
        model = build_model(config, 128)
    finally:
        destroy_process_groups()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = sum(
        x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values() if x.dim()
    )
    use = memory_use(config, ALONE, 128)
    assert (use.weights, use.gradients, use.optimizer) == (weights, weights, states)


def test_a_router_of_its_own_keeps_its_queries_and_keys() -> None:
    pooled = {"pool_heads": True, "query_pool": 16}
    layout = replace(ALONE, recompute="none")
    without, own = (
        memory_use(tiny(**pooled, **attention), layout, 128)
        for attention in ({}, {"router_projections": True})
    )
    # of 2 layers and 256 tokens, a query and a key of 2 kv heads, projected and turned, in bf16
    assert own.activations - without.activations == 2 * 256 * 4 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    # bytes a parameter over 4 shards
    [(0, 2, 2, 12), (1, 2, 6, 3), (2, 2, 1, 3), (3, 0.5, 1, 3)],
)
def test_zero_shards_what_its_stage_says(
    stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    config = tiny()
    use = memory_use(config, Layout(1, 2, 2, stage, "all_gather", "full"), 128)
    count = parameter_count(config, 128)
    assert (use.weights / count, use.gradients / count, use.optimizer / count) == pytest.approx(
        (weights, gradients, optimizer)
    )


def test_tensor_parallel_ranks_share_all_but_norms() -> None:
    config = tiny()
    norms = 64 * 5 + 2 * 16 * 2
    two = rank_parameters(config, Layout(2, 1, 1, 1, "all_gather", "full"), 128)
    assert 2 * two - norms == parameter_count(config, 128)


@pytest.mark.parametrize(
    ("kind", "tokens", "peak_gib"),
    [("full", 16384, 25.4), ("dash", 16384, 25.4), ("full", 65536, 34.5), ("dash", 65536, 35.6)],
)
def test_the_measured_peaks_of_1b_steps_are_met_within_10_percent(
    kind: str, tokens: int, peak_gib: float
) -> None:
    # docs/results/training.md, "One GPU: the 1B model": torch's own allocations, hence nothing reserved
    config = load_config(
        ROOT / "configs" / "1b_16k.yaml",
        [*MEASURED_ATTENTION, f"data.seq_length={tokens}", f"attention.kind={kind}"],
    )
    use = memory_use(config, ALONE, 128256, Hardware(reserved_gib=0), listed=0.1)
    assert use.total / 2**30 == pytest.approx(peak_gib, rel=0.1)


@pytest.mark.parametrize(
    ("study", "run", "peak_gib"),
    [
        ("docs/results/quality/steps_131k", "full-full_1.5e+08tok_seed1", 20.65),
        ("docs/results/quality/steps_131k", "dash_25-dash_1.5e+08tok_seed1", 25.69),
        ("docs/results/quality/steps_131k", "infllmv2_25-infllmv2_1.5e+08tok_seed1", 22.44),
        ("docs/results/quality/steps_131k", "nsa_25-nsa_1.5e+08tok_seed1", 28.46),
        ("studies/quality_16k", "full-full_1.5e+08tok_seed1", 11.38),
        ("studies/quality_16k", "dash_25-dash_1.5e+08tok_seed1", 12.61),
        ("studies/quality_16k", "infllmv2_25-infllmv2_1.5e+08tok_seed1", 12.37),
        ("studies/quality_16k", "nsa_25-nsa_1.5e+08tok_seed1", 15.40),
        ("studies/retrieval_16k", "full-full_1e+08tok", 11.38),
        ("studies/retrieval_16k", "dash_25-dash_1e+08tok", 12.61),
        ("studies/retrieval_16k", "infllmv2_25-infllmv2_1e+08tok", 12.38),
        ("studies/scaling_8k", "3m_full_6e+07tok", 1.58),
        ("studies/scaling_8k", "3m_dash_6e+07tok", 1.69),
        ("studies/scaling_8k", "6m_full_6e+07tok", 2.36),
        ("studies/scaling_8k", "6m_dash_6e+07tok", 2.48),
        ("studies/scaling_8k", "15m_full_6e+07tok", 3.70),
        ("studies/scaling_8k", "15m_dash_6e+07tok", 3.88),
        ("studies/scaling_8k", "30m_full_6e+07tok", 6.09),
        ("studies/scaling_8k", "30m_dash_6e+07tok", 6.55),
        ("studies/choices_8k", "chunk_32-dash_8e+07tok_seed1", 4.07),
        ("studies/choices_8k", "chunk_16-dash_8e+07tok_seed1", 4.48),
        ("studies/quality_16k", "dash_25_c32-dash_1.5e+08tok_seed1", 13.90),
        ("studies/quality_16k", "dash_25_c16-dash_1.5e+08tok_seed1", 16.64),
        ("studies/retrieval_16k", "dash_25_c32-dash_1e+08tok", 13.90),
    ],
)
def test_the_measured_peaks_of_studies_without_recomputation_are_met_within_10_percent(
    study: str, run: str, peak_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch's own allocations: `gpu_memory_gib` in the summaries of docs/results/quality. Then lists had room for documents
    # as long as the micro-batch.
    def of_one_row(config: Config, layout: Layout, listed: float) -> tuple[float, float]:
        rows = config.training.micro_batch
        data = config.data.model_copy(update={"seq_length": rows * config.data.seq_length})
        training = config.training.model_copy(update={"micro_batch": 1})
        return list_bytes(
            config.model_copy(update={"data": data, "training": training}), layout, listed / rows
        )

    if "dash" in run:
        monkeypatch.setattr(memory, "list_bytes", of_one_row)
    runs = {run.name: run for run in expand(load_study(ROOT / f"{study}.yaml"))}
    use = memory_use(
        runs[run].config, replace(ALONE, recompute="none"), 16384, Hardware(reserved_gib=0),
        listed=0.12 if "v2" in run or "nsa" in run else 1.0,
    )  # fmt: skip
    assert use.total / 2**30 == pytest.approx(peak_gib, rel=0.1)


def test_rows_of_a_micro_batch_add_their_lists_and_no_pairs_between_them() -> None:
    four = load_config(
        ROOT / "configs" / "60m_16k.yaml", ["training.micro_batch=4", "training.global_batch=4"]
    )
    one = load_config(
        ROOT / "configs" / "60m_16k.yaml", ["training.micro_batch=1", "training.global_batch=4"]
    )
    assert list_bytes(four, ALONE, 1.0) == tuple(4 * x for x in list_bytes(one, ALONE, 1.0))


def test_lists_have_room_for_all_chunks_until_2_gib_and_for_the_listed_ones_above() -> None:
    # 4 chunks make 10 pairs in each of 2 kv heads; a tile of 64 tokens x 2 heads holds a whole chunk
    forward, backward = list_bytes(tiny(), ALONE, listed=0.1)
    assert (forward, backward) == (10 * 2 * 4 * 65, 10 * 2 * (4 * 64 + 16))
    long = load_config(ROOT / "configs" / "8b_16k.yaml", ["data.seq_length=131072"])
    assert list_bytes(long, ALONE, 0.1)[0] == pytest.approx(0.1 * list_bytes(long, ALONE, 1.0)[0])
    assert list_bytes(long, ALONE, 1.0)[0] > workspaces.MAX_BOUNDED_BYTES


@pytest.mark.parametrize(
    ("kind", "ranks", "forward", "backward"),
    # K and V of one of 2 ranks are 2 x 128 x 2 x 16 x 2 = 16384 bytes, twice that in float32, as have its 4 heads of queries;
    # summaries 2 x 2 x 16 x 2
    [
        ("all_gather", 2, 2 * 16512, 2 * (3 * 16512 + 32768)),
        ("sparse", 2, 2 * 16512, 2 * (3 * 16512 + 32768)),
        ("p2p", 2, 2 * 16512, 2 * 16512 + 3 * 32768 + 2 * 32768),
        ("p2p", 4, 16512, 16512 + 5 * 16384 + 2 * 16384),
        ("a2a", 2, 128 * 12 * 16 * 2, 2 * 128 * 12 * 16 * 2),
    ],
)
def test_exchanges_hold_what_their_buffers_need(
    kind: ContextComm, ranks: int, forward: float, backward: float
) -> None:
    layout = Layout(1, ranks, 1, 1, kind, "full")
    shape = memory.context_shape(tiny(), layout)
    assert memory._exchange_bytes(shape, layout) == (forward, backward)


@pytest.mark.parametrize("recompute", ["none", "selective", "attention", "full"])
def test_keys_that_are_gathered_early_are_there_while_the_feed_forward_parts_backward_runs(
    recompute: Recompute,
) -> None:
    plain = tiny()
    wide = plain.model_copy(update={"model": plain.model.model_copy(update={"ffn_hidden_size": 4096})})
    gathered, fetched = (
        memory_use(wide, Layout(1, 2, 1, 1, comm, recompute), 128).working
        for comm in ("all_gather", "sparse")
    )
    # K and V of both ranks
    assert gathered - fetched == (0 if recompute == "attention" else 2 * 16384)


def heads_of_128(length: int, *changes: str) -> Config:
    """8B, whose groups have 4 heads, with chunks of 64."""
    return load_config(
        ROOT / "configs" / "8b_16k.yaml",
        ["attention.chunk_size=64", "attention.local_chunks=0", f"data.seq_length={length}", *changes],
    )


def test_pairs_have_workspaces_of_2_gib_or_of_what_a_decision_for_them_leaves() -> None:
    long = workspaces.pair_bytes(heads_of_128(16384), ALONE, 1.0, "H200")
    # a pair of 4 heads: 128 elements in bf16 each, a float32 log-sum-exp in attention, and 12 or 20 bytes of places, of several
    # slabs at once up to 256 MiB; 512 tiles of 32 tokens, by 256 chunks and 8 kv heads, have 4 bytes each; keys and values have
    # float32 sums for every chunk of 64 x 128 elements, and two for each of 528 programs
    counts = 512 * 256 * 8 * 4
    attend, queries = 2**31 // 1040, 2**31 // 1024
    # 256 chunks make 32896 pairs, in 2 tiles each of 8 kv heads, of 32 tokens: tiles list 3.9 times what is taken at least
    assert 32896 * 2 * 8 * 32 / 3.9 // (attend - 32 * 256) + 8 == 10
    assert long["attend"] == attend * (1040 + 10 * 12) + counts
    assert long["queries"] == queries * (1024 + 6 * 20) + counts + 2 * (2048 + 1056) * 64 * 128 * 4
    # 64 chunks make 2080 pairs; each head has a slab, of which the places of all are there at once
    short = workspaces.pair_bytes(heads_of_128(4096), ALONE, 1.0, "H200")
    pairs, counts = 2080 * 2 * 8 * 32, counts / 16
    sums = 2 * (512 + 1056) * 64 * 128 * 4
    assert short == pytest.approx(
        {
            "attend": pairs / 3.9 * (1040 + 8 * 12) + counts,
            "queries": pairs / 2.0 * (1024 + 8 * 20) + counts + sums,
        }
    )
    halves = workspaces.pair_bytes(heads_of_128(4096), Layout(2, 1, 1, 1, "all_gather", "full"), 1.0, "H200")
    # half as many heads, and slabs of each half as many; all of the programs
    assert halves == pytest.approx(
        {
            "attend": pairs / 7.8 * (1040 + 4 * 12) + counts / 2,
            "queries": pairs / 4.0 * (1024 + 4 * 20) + counts / 2 + 2 * (256 + 1056) * 64 * 128 * 4,
        }
    )
    # so that, with a small vocabulary, the worst moment is in attention
    narrow = "model.ffn_hidden_size=1024"
    one, two = (
        memory_use(heads_of_128(16384, f"model.head_dim={width}", narrow), ALONE, 1024).working
        for width in (128, 112)
    )
    # keys and values go over pairs with either
    assert one - two > long["queries"] - workspaces.key_bytes(
        heads_of_128(16384, "model.head_dim=112"), ALONE, 1.0
    )
    assert workspaces.pair_bytes(heads_of_128(16384), ALONE, 1.0, "A100") == {"attend": 0.0, "queries": 0.0}
    other = memory_use(heads_of_128(16384, narrow), ALONE, 1024, Hardware.of("A100")).working
    assert other < one


def test_pairs_of_a_million_tokens_are_counted_for_a_few_slabs_at_a_time() -> None:
    found = workspaces.pair_bytes(heads_of_128(2**20), ALONE, 0.05, "H200")
    # the places of 6 slabs fill 256 MiB in the gradient; of 10 in attention, of which 8 are counted at a time
    attend, queries = 2**31 // 1040, 2**31 // 1024
    assert found["attend"] == attend * (1040 + 8 * 12) + 2**26 * 4
    # a slab has as many tiles as let 2**26 counts do for 6 of them, by 16384 chunks
    counts = 2**26 // 16384 // 6 * 6 * 16384 * 4
    assert found["queries"] == queries * (1024 + 6 * 20) + counts + 2 * (131072 + 1056) * 64 * 128 * 4
    # float32 gradients of 32 key/value heads would be 32 GiB, and the kernels go over tiles
    wide = workspaces.pair_bytes(heads_of_128(2**20, "model.kv_heads=32"), ALONE, 0.05, "H200")
    assert wide["attend"] > 2**31
    assert wide["queries"] == 0


def test_pairs_of_ranks_that_share_a_sequence_have_workspaces_for_their_own_queries() -> None:
    # sums of keys and values are those of the exchange; what is added to them waits in two slots of each program
    attend, queries, slots = 2**31 // 1040, 2**31 // 1024, 2 * 1056 * 64 * 128 * 4
    for comm, keys in (("all_gather", 512), ("sparse", 512), ("p2p", 128)):
        found = workspaces.pair_bytes(heads_of_128(32768), Layout(1, 2, 1, 1, comm, "full"), 1.0, "H200")
        # 512 tiles of half the rows, by the chunks of the keys that are there at a time
        counts = 512 * keys * 8 * 4
        assert found["attend"] == attend * (1040 + 10 * 12) + counts, comm
        assert found["queries"] == queries * (1024 + 6 * 20) + counts + slots, comm


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (heads_of_128(16384, "training.precision=fp32"), ALONE),
        (heads_of_128(16384, "model.kv_heads=4"), ALONE),
        (heads_of_128(16384, "model.head_dim=64"), ALONE),
        (heads_of_128(16384, "attention.chunk_size=32"), ALONE),
        (heads_of_128(2**22), ALONE),
    ],
    ids=["fp32", "8 heads a group", "heads of 64", "chunks of 32", "too many in a tile"],
)
def test_where_pairs_are_never_taken_they_have_no_workspaces(config: Config, layout: Layout) -> None:
    assert workspaces.pair_bytes(config, layout, 1.0, "H200") == {"attend": 0.0, "queries": 0.0}


def test_keys_over_pairs_have_places_and_sums_of_the_programs_and_chunks() -> None:
    # 64 chunks make 2080 pairs, in 2 tiles of 32 tokens each of 8 kv heads, and every token has one with its own chunk
    pairs, own = 2080 * 2 * 8 * 32 + 4096 * 8, 4096 * 8
    # 132 multiprocessors have 32 programs each, which leave dk and dv of 64 keys twice
    # of 16 runs of 8 tiles each, each head has a count for each chunk
    counts = 16 * 8 * 64
    found = workspaces.key_bytes(heads_of_128(4096), ALONE, 1.0)
    assert found == 8 * (pairs + counts) + 8 * 128 * (2 * 4224 * 64 + own)
    # two chunks of 32 are taken side by side, each with a log prior; at least 16 steps of 64 rows, 16 tokens, a program
    pairs, own = 528 * 8 * 32 + 1024 * 8, 1024 * 8
    small = workspaces.key_bytes(heads_of_128(1024, "attention.chunk_size=32"), ALONE, 1.0)
    counts = 4 * 8 * 16
    assert small == 8 * (2 * pairs + counts) + 8 * 128 * (2 * pairs / 16 / 16 * 64 + own)
    long = workspaces.key_bytes(heads_of_128(65536, "attention.chunk_size=32"), ALONE, 1.0)
    counts = 256 * 8 * 1024
    assert long == 8 * (2**26 + counts) + 8 * 128 * (2 * 4224 * 64 + 65536 * 8) < 2**31
    # 8,192 runs of 8 tiles, 16,384 groups and 8 heads would have 2**30 counts: runs are of 512 tiles
    longest = workspaces.key_bytes(heads_of_128(2**20, "attention.chunk_size=32"), ALONE, 1.0)
    assert longest == 8 * (2**26 + 2**24) + 8 * 128 * (2 * 4224 * 64 + 2**20 * 8)
    for never in (
        "attention.chunk_size=64 model.head_dim=64",
        "training.precision=fp32",
        "model.head_dim=256",
    ):
        assert workspaces.key_bytes(heads_of_128(4096, *never.split()), ALONE, 1.0) == 0


def test_recomputation_and_sharing_tokens_only_ever_save() -> None:
    config = load_config(ROOT / "configs" / "8b_64k.yaml")
    none, selective, attention, full = (
        memory_use(config, Layout(2, 2, 2, 2, "all_gather", recompute), 128256).total
        for recompute in ("none", "selective", "attention", "full")
    )
    assert none > attention > full
    assert none > selective > full
    whole, shared = (
        memory_use(config, Layout(2, 2, 2, 2, "all_gather", "none", sequence), 128256).total
        for sequence in (False, True)
    )
    assert shared < whole


def test_a_recomputed_layer_has_the_activations_of_one_piece_of_a_feed_forward_part() -> None:
    # 14336 wide: 37449 tokens a piece
    long = load_config(ROOT / "configs" / "8b_64k.yaml", ["data.seq_length=524288", "attention.kind=full"])
    layout = replace(ALONE, zero_stage=1)
    assert memory.feed_forward_pieces(long, layout) == 14
    assert memory.feed_forward_pieces(long, replace(layout, tensor=8)) == 2
    assert memory.feed_forward_pieces(long, replace(layout, context=16)) == 1
    # hooks of modules gather weights there
    assert memory.feed_forward_pieces(long, replace(layout, zero_stage=3)) == 1
    assert memory.feed_forward_pieces(long, replace(layout, recompute="selective")) == 1
    in_pieces, whole = (
        memory_use(long, replace(layout, zero_stage=stage), 128256).working for stage in (1, 3)
    )
    # norm, both halves and activation, with a gradient for each; beside those of a piece the whole input's and sums for three weights
    stream, product = 524288 * 4096 * 2, 524288 * 14336 * 2
    of_all = 2 * (stream + 3 * product)
    assert whole - in_pieces == of_all - (of_all / 14 + stream + 3 * 4096 * 14336 * 4)


@pytest.mark.parametrize("group", [1, 4, 16])
def test_programs_that_share_pairs_are_those_of_the_table_of_launches(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dash_megatron.ops.kernels import configs

    monkeypatch.setattr(configs, "device_limits", lambda _: ("NVIDIA H200", 227 * 1024, 132))
    launches = configs.find_launches.__wrapped__(torch.device("cpu"), torch.bfloat16, 128, 64, group)
    assert workspaces.PARTS[group] == launches.backward_by_pair.parts
    heads = ["model.heads=32", f"model.kv_heads={32 // group}"]
    found = workspaces.pair_bytes(heads_of_128(4096, *heads), ALONE, 1.0, "H200")
    monkeypatch.setitem(workspaces.PARTS, group, 0)
    without = workspaces.pair_bytes(heads_of_128(4096, *heads), ALONE, 1.0, "H200")
    # a part leaves two chunks of dk and of dv, in float32
    assert found["queries"] - without["queries"] == launches.backward_by_pair.parts * 2 * 2 * 64 * 128 * 4


def test_limits_are_those_of_the_code_they_describe() -> None:
    from dash_megatron.layers.recompute import MAX_ACTIVATED
    from dash_megatron.layers.vocabulary_loss import MAX_LOGITS
    from dash_megatron.ops.kernels import backward_q, configs, pair_slabs, pairs, transpose
    from dash_megatron.ops.kernels.geometry import MAX_BOUNDED_BYTES
    from dash_megatron.ops.topk.nsa import MAX_SHARED_BIAS
    from dash_megatron.training.engine import BUCKET_ELEMENTS

    assert memory.BUCKET_ELEMENTS == BUCKET_ELEMENTS
    assert memory.MAX_ACTIVATED == MAX_ACTIVATED
    assert (memory.MAX_LOGITS, workspaces.MAX_BOUNDED_BYTES) == (MAX_LOGITS, MAX_BOUNDED_BYTES)
    assert baseline_times.MAX_SHARED_BIAS == MAX_SHARED_BIAS
    for name in ("WORKSPACE_BYTES", "PLACES_BYTES", "MAX_COUNTS", "COUNTED_SLABS"):
        assert getattr(workspaces, name) == getattr(pair_slabs, name), name
    assert workspaces.MAX_PAIR_GRADIENT_BYTES == backward_q.MAX_PAIR_GRADIENT_BYTES
    for name in ("MAX_PAIRS", "LEAST_STEPS"):
        assert getattr(workspaces, name) == getattr(pairs, name), name
    assert (workspaces.MIN_RUN_TILES, workspaces.MAX_RUN_COUNTS) == (
        pairs.MIN_RUN_TILES,
        transpose.MAX_COUNTS,
    )
    assert workspaces.KEY_PARTS == configs.PAIR_PARTS_PER_MULTIPROCESSOR * 132
    slabs: Any = SimpleNamespace(slot=torch.empty(0), room=3, at_once=2)
    for stage, entries in (("attend", False), ("queries", True)):
        places = [x for x in pair_slabs.new_pairs(slabs, entries) if x is not None]
        assert sum(x.nbytes for x in places) == 2 * 3 * workspaces.PLACE_BYTES[stage]
