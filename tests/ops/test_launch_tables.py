"""Launch configurations: what the pinned table holds, and what is taken from it."""

import json
import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import triton

from dash_megatron.ops.kernels import configs, hopper

HOPPER, HOPPER_OVERLAP, PLAIN = configs.HOPPER, configs.HOPPER_OVERLAP, configs.PLAIN
STAGES, Config = configs.STAGES, configs.Config
SHAPE = torch.bfloat16, 128, 64, 4
KERNELS = {stage: {PLAIN} for stage in STAGES} | {
    "attend": {PLAIN, HOPPER, HOPPER_OVERLAP},
    "keys": {PLAIN, HOPPER},
}


@pytest.fixture
def on_h200(monkeypatch):
    """Launches are found anew, as if there were such a GPU."""
    configs.find_launches.cache_clear()
    monkeypatch.setattr(configs, "device_limits", lambda device: ("NVIDIA H200", 227 * 1024, 132))
    monkeypatch.setattr(hopper, "GLUON_IS_KNOWN", True)
    yield torch.device("cuda")
    configs.find_launches.cache_clear()


def test_every_entry_of_the_table_names_its_numbers_and_kernels():
    table = json.loads(configs.TABLE_FILE.read_text())
    entries = [entry for shapes in table.values() for entry in shapes.values()]
    assert entries
    for entry in entries:
        above = {"pairs_above", "attend_pairs_above", "backward_pairs_above"}
        assert set(entry) <= {*STAGES, *above, "tile_rows", "parts_per_multiprocessor"}
        for stage in set(STAGES) & set(entry):
            config = Config(**entry[stage])
            assert config.kernel in KERNELS[stage]
            assert config.maxnreg is None or stage in ("queries", "route", "router")
            # a Hopper kernel does not fit everything: the plain one must find all its numbers
            assert config.block > 0 if stage not in ("attend", "queries") else config.keys > 0


def test_launches_of_a_measured_shape_come_from_the_table(on_h200):
    launches = configs.find_launches(on_h200, *SHAPE)
    assert launches.attend == Config(num_warps=4, num_stages=5, keys=64, kernel=HOPPER_OVERLAP)
    assert launches.keys == Config(num_warps=4, num_stages=2, block=64, keys=64, kernel=HOPPER)
    assert launches.pairs == Config(num_warps=4, num_stages=2, block=64, keys=64)
    assert launches.router == Config(num_warps=4, num_stages=1, block=32)
    assert (launches.parts, launches.pairs_above) == (4 * 132, 0)


@pytest.mark.parametrize(
    ("name", "capability", "taken"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "NVIDIA H200"),
        ("NVIDIA H200", (9, 0), "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA B200", (10, 0), "NVIDIA B200"),
    ],
)
def test_gpus_of_the_same_compute_capability_take_the_entries_of_the_measured_one(
    name, capability, taken, monkeypatch
):
    major, minor = capability
    properties = SimpleNamespace(
        name=name, major=major, minor=minor, shared_memory_per_block_optin=232448, multi_processor_count=114
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    find = configs.device_limits.__wrapped__
    assert find(torch.device("cuda")) == (taken, 232448, 114)
    # measured by its user: its own numbers
    monkeypatch.setattr(configs, "_table", lambda: {"NVIDIA H200": {}, name: {}})
    assert find(torch.device("cuda"))[0] == name


def test_attention_and_its_backward_go_over_pairs_where_these_were_measured_to_cost_less(on_h200):
    for group, parts, attend_above, backward_above in ((1, 8, 3.0, 2.6), (4, 4, 3.9, 2.0), (16, 4, 3.8, 1.9)):
        launches = configs.find_launches(on_h200, torch.bfloat16, 128, 64, group)
        assert launches.attend_by_pair == (Config(4, 3, 64, 64), parts * 132, attend_above)
        assert launches.backward_by_pair == (Config(8, 2, 128, 64), parts * 132, backward_above)
    launches = configs.find_launches(on_h200, torch.bfloat16, 64, 64, 4)
    assert launches.attend_by_pair.above == launches.backward_by_pair.above == math.inf


def test_keys_and_values_go_over_pairs_where_these_were_measured_to_cost_less(on_h200):
    def above(dtype, head_dim, chunk_size):
        return configs.find_launches(on_h200, dtype, head_dim, chunk_size, 3).pairs_above

    by_pair = (128, 64), (64, 32), (96, 128), (128, 32), (128, 16)
    assert {above(torch.bfloat16, *shape) for shape in by_pair} == {0}
    others = (torch.bfloat16, 64, 64), (torch.bfloat16, 256, 64), (torch.float32, 128, 64)
    assert {above(*shape) for shape in others} == {math.inf}


def test_numbers_of_the_hopper_kernel_for_keys_suit_the_plain_one_which_a_buffer_of_keys_takes(on_h200):
    for head_dim in (64, 128):
        measured, by_rule = (
            configs.find_launches(on_h200, torch.bfloat16, head_dim, 64, group).keys for group in (4, 3)
        )
        assert measured.kernel == HOPPER
        assert measured._replace(kernel=PLAIN) == by_rule


def test_where_triton_cannot_compile_the_hopper_kernels_their_stages_follow_the_rule_and_others_the_table(
    on_h200, monkeypatch, caplog
):
    measured, by_rule = configs.find_launches(on_h200, *SHAPE), configs.find_launches(on_h200, *SHAPE[:3], 3)
    configs.find_launches.cache_clear()
    monkeypatch.setattr(hopper, "GLUON_IS_KNOWN", False)
    configs._tell_of_plain_kernels.cache_clear()
    plain = configs.find_launches(on_h200, *SHAPE)
    (told,) = (record.getMessage() for record in caplog.records if "Hopper" in record.getMessage())
    assert told.startswith(f"Triton {triton.__version__} ")
    assert "torch 2.11" in told
    assert {measured.attend.kernel, measured.keys.kernel} == {HOPPER, HOPPER_OVERLAP}
    assert (plain.attend, plain.keys) == (by_rule.attend, by_rule.keys)
    assert (plain.route, plain.router, plain.queries) == (measured.route, measured.router, measured.queries)


def test_keys_over_pairs_take_chunks_side_by_side_up_to_64_in_steps_of_64_rows(on_h200):
    """As measured; below 64 keys tensor cores of Hopper idle, and steps of 32 rows took a tenth longer with groups of 4."""
    for group in (1, 4, 7, 32):
        for chunk_size in (16, 32, 64, 128):
            for head_dim, stages in ((16, 3), (64, 3), (80, 2), (128, 2)):
                launches = configs.find_launches(on_h200, torch.bfloat16, head_dim, chunk_size, group)
                assert launches.pairs == Config(4, stages, block=64, keys=64)
                assert launches.pair_parts == 32 * 132


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_a_program_holds_fits_into_the_shared_memory_of(kib, itemsize):
    """On an L40S, an A100 and an H200; compiled for an L40S, kernels took no more than is counted here."""
    for head_dim, chunk_size, group in product((64, 128, 256), (16, 32, 64, 128), (1, 4, 32)):
        rule = configs._rule(itemsize, head_dim, chunk_size, group, kib * 1024)
        row_bytes = head_dim * itemsize
        rows = max(16, group, min(rule["tile_rows"], chunk_size * group))
        held = {
            "attend": rows + 2 * rule["attend"]["keys"] * rule["attend"]["num_stages"],
            "queries": 2 * rows + 2 * rule["queries"]["keys"] * rule["queries"]["num_stages"],
            "keys": 2 * rule["keys"]["keys"] + 2 * rule["keys"]["block"] * rule["keys"]["num_stages"],
        }
        for stage, count in held.items():
            # what changes of layout took
            more = 16 * 1024 if stage == "keys" and rule["keys"]["keys"] > 16 else 0
            assert count * row_bytes + more <= kib * 1024, (stage, head_dim, chunk_size, group)


def test_a_table_with_a_configuration_that_faults_is_refused(on_h200, monkeypatch):
    def table(**config):
        entry = {"num_warps": 4, "num_stages": 1, "block": 64, "keys": 32} | config
        monkeypatch.setattr(
            configs, "_table", lambda: {"NVIDIA H200": {"bfloat16 D=128 C=32 G=4": {stage: entry}}}
        )
        configs.find_launches.cache_clear()
        return getattr(configs.find_launches(on_h200, torch.bfloat16, 128, 32, 4), stage)

    for stage in ("keys", "pairs"):
        with pytest.raises(
            ValueError, match=rf"H200, bfloat16 D=128 C=32 G=4: {stage}.num_stages=1 must be at least 2"
        ):
            table()
        assert table(num_stages=2).num_stages == 2
        assert table(block=32).num_stages == table(keys=64).num_stages == 1


def test_chunks_of_few_keys_come_several_a_step(on_h200):
    def launches(head_dim, chunk_size, group, dtype=torch.bfloat16):
        return configs.find_launches(on_h200, dtype, head_dim, chunk_size, group)

    # as measured
    for group in (4, 8):
        assert launches(128, 32, group).attend == Config(4, 5, keys=64, kernel=HOPPER_OVERLAP)
        assert launches(128, 32, group).queries == Config(8, 3, keys=64)
    assert launches(64, 32, 4).attend == Config(4, 3, keys=64)
    assert launches(64, 32, 4).queries == Config(8, 3, keys=64, maxnreg=128)
    assert (launches(128, 16, 4).attend, launches(128, 16, 4).queries) == (
        Config(4, 3, keys=32),
        Config(4, 2, keys=64),
    )
    # by rule
    assert launches(128, 32, 3).attend == Config(8, 3, keys=64)
    assert launches(128, 32, 3).queries == Config(8, 3, keys=64)
    assert launches(64, 32, 8).queries == Config(8, 3, keys=64, maxnreg=128)
    assert launches(96, 16, 4).queries == Config(4, 2, keys=64)
    others = launches(128, 32, 4, torch.float32), launches(256, 32, 4)
    assert {x.attend.keys for x in others} == {x.queries.keys for x in others} == {32}


def test_route_and_router_take_four_warps_in_half_precision(on_h200):
    for chunk_size, group in ((64, 32), (32, 8), (32, 16)):
        found = configs.find_launches(on_h200, torch.bfloat16, 128, chunk_size, group)
        assert (found.route, found.router) == (Config(4, 2, block=64), Config(4, 1, block=32))
    assert configs.find_launches(on_h200, torch.bfloat16, 64, 32, 8).route == Config(4, 2, block=32)
    assert configs.find_launches(on_h200, torch.float32, 64, 32, 8).router.num_warps == 8
