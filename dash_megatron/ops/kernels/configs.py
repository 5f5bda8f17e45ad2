"""Launch configurations: a pinned table per GPU and shape, and a rule for what the table does not hold.

Nothing is ever tuned at run time: ranks that chose different configurations would compute different results.
`benchmarks/tune_kernels.py` writes the table, configs.json: GPU name -> shape (`shape_key`) -> `tile_rows` and
`parts_per_multiprocessor`, integers, `pairs_above` and the like, and for each stage of `Launches` the fields of a `Config` that differ from
their defaults. What a shape leaves out follows the rule.
"""

import json
import logging
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from dash_megatron.ops.kernels import hopper
from dash_megatron.ops.kernels.geometry import next_power_of_two

logger = logging.getLogger("dash_megatron")

TABLE_FILE = Path(__file__).with_name("configs.json")
# By compute capability, the GPU whose entries those take that the table does not name: an H100, H800 or GH200 runs the same machine
# code under the same limits as an H200. Their own times were not measured.
MEASURED = {(9, 0): "NVIDIA H200"}
# Values of `Config.kernel`.
PLAIN, HOPPER, HOPPER_OVERLAP = "plain", "hopper", "hopper-overlap"
# Of Hopper, for tensors that are not on a GPU: what the interpreter runs should be what a GPU would.
DEFAULT_SHARED_BYTES = 227 * 1024
DEFAULT_MULTIPROCESSORS = 4
# What changes of layout may take of it.
LAYOUT_BYTES = 40 * 1024
# Programs a multiprocessor that share the pairs of keys and values. Those that run at the same time then work on few
# chunks of one head, whose rows stay in the L2 cache; each leaves sums in at most two slots, 528 MiB on an H200 with heads of 128.
PAIR_PARTS_PER_MULTIPROCESSOR = 32


class Config(NamedTuple):
    """How one stage is launched."""

    num_warps: int
    num_stages: int
    block: int = 0
    """Route and router: summaries a step. Keys and all pairs: query rows a step, of keys the plain kernel's. Attend and queries: unused."""
    keys: int = 0
    """Keys of a chunk a step or, in the passes to keys and values, a program. Smaller chunks are taken side by side: in attend and
    queries several of a list, over pairs to keys and values neighbours. Route and router: unused."""
    kernel: str = PLAIN
    """Attend and keys: "hopper" takes the Hopper kernel where it fits, and elsewhere the plain one with the other numbers.
    For attend, "hopper-overlap" also computes the next scores during the softmax."""
    maxnreg: int | None = None
    """Most registers a thread, so that more programs share a multiprocessor; None: the compiler decides. Attend, keys and pairs: unused."""


# The fields of `Launches` that have a `Config`.
STAGES = (
    "route",
    "attend",
    "queries",
    "router",
    "keys",
    "pairs",
    "attend_pairs",
    "backward_pairs",
)


class ByPair(NamedTuple):
    """How a stage over query tiles goes over pairs instead."""

    config: Config
    parts: int
    """Programs that share the pairs of a slab."""
    above: float
    """Pairs are taken where tiles list more than this many times what was selected; 0: anyway, infinity: never."""


class Launches(NamedTuple):
    """Configurations of all stages for one shape."""

    tile_rows: int
    """Rows of a query tile aimed at: tokens x heads of a group."""
    route: Config
    attend: Config
    queries: Config
    router: Config
    keys: Config
    """Keys and values over the transposed lists."""
    pairs: Config
    """Keys and values over pairs."""
    attend_pairs: Config
    """Attend over pairs."""
    backward_pairs: Config
    """Queries, keys and values together over pairs."""
    parts: int
    """Programs that share the transposed lists, or the pairs of a slab in attend and queries."""
    pair_parts: int
    """Programs that share the pairs of keys and values."""
    pairs_above: float
    """Keys and values go over pairs where tiles list more than this many times the pairs that tokens selected; 0: anyway, infinity: never."""
    attend_pairs_above: float
    """The same for attend."""
    backward_pairs_above: float
    """The same for queries, keys and values together."""

    @property
    def attend_by_pair(self) -> ByPair:
        """How attend goes over pairs."""
        return ByPair(self.attend_pairs, self.parts, self.attend_pairs_above)

    @property
    def backward_by_pair(self) -> ByPair:
        """How queries, keys and values go over pairs together."""
        return ByPair(self.backward_pairs, self.parts, self.backward_pairs_above)


# A shape's numbers and, by stage, the fields of its configurations.
Entry = dict[str, Any]


@cache
def _table() -> dict[str, dict[str, Entry]]:
    return json.loads(TABLE_FILE.read_text())


def shape_key(dtype: torch.dtype, head_dim: int, chunk_size: int, group: int) -> str:
    """A shape's key in the table, such as "bfloat16 D=128 C=64 G=4"; `group`: query heads per key/value head."""
    return f"{str(dtype).removeprefix('torch.')} D={head_dim} C={chunk_size} G={group}"


@cache
def device_limits(device: torch.device) -> tuple[str, int, int]:
    """Name in the table (its own, or that of `MEASURED`), bytes of shared memory a program may use, and number of multiprocessors."""
    if device.type != "cuda":
        return device.type, DEFAULT_SHARED_BYTES, DEFAULT_MULTIPROCESSORS
    properties = torch.cuda.get_device_properties(device)
    name = properties.name
    if name not in _table():
        name = MEASURED.get((properties.major, properties.minor), name)
    return name, properties.shared_memory_per_block_optin, properties.multi_processor_count  # type: ignore[attr-defined]


def stages_that_fit(most: int, fixed_bytes: int, bytes_per_stage: int, shared_bytes: int) -> int:
    """As many pipeline stages as fit, at least one."""
    while most > 1 and fixed_bytes + most * bytes_per_stage > shared_bytes:
        most -= 1
    return most


def keys_that_fit(most: int, fixed_bytes: int, row_bytes: int, shared_bytes: int) -> int:
    """As many keys with their values as fit, at least 16: on a GPU with 99 KiB half as many where rows have 512 bytes and more."""
    while most > 16 and fixed_bytes + 2 * most * row_bytes > shared_bytes:
        most //= 2
    return most


def _over_lists(itemsize: int, head_dim: int, chunk_size: int, rows: int, shared_bytes: int) -> Entry:
    """Attend and queries, which walk over the list of a query tile of `rows` rows.

    In half precision with heads of at most 128 dimensions, chunks of fewer than 64 tokens come several a step, 64 keys.
    Measured on an H200 in bfloat16 with groups of 4, against the best steps of one chunk: heads of 128 with chunks of 32
    (attend takes 2 to 4% less time, queries 16 to 19%) and of 16 (20 and 25%), heads of 64 with chunks of 32 (6 to 10 and
    13 to 15%: there queries need a limit of registers, with which two programs share a multiprocessor). Three stages were
    best with tiles of 128 rows, two with 64.
    """
    row_bytes = next_power_of_two(head_dim) * itemsize
    warps = 8 if rows >= 128 else 4
    several = itemsize == 2 and head_dim <= 128 and chunk_size < 64
    if several:
        keys, attend_stages = 64, 3 if warps == 8 else 2
        queries_stages = attend_stages
    else:
        keys, attend_stages, queries_stages = max(16, min(chunk_size, 32768 // row_bytes)), 3, 2
    tile_bytes, step_bytes = rows * row_bytes, 2 * keys * row_bytes
    return {
        "attend": {
            "num_warps": warps,
            "num_stages": stages_that_fit(attend_stages, tile_bytes, step_bytes, shared_bytes),
            "keys": keys,
        },
        "queries": {
            "num_warps": 8 if keys * row_bytes > 128 * 128 else warps,
            "num_stages": stages_that_fit(queries_stages, 2 * tile_bytes, step_bytes, shared_bytes),
            "keys": keys_that_fit(keys, 2 * tile_bytes, row_bytes, shared_bytes + LAYOUT_BYTES),
            "maxnreg": 128 if several and head_dim <= 64 and warps == 8 else None,
        },
    }


def _over_summaries(itemsize: int, head_dim: int, rows: int, shared_bytes: int) -> Entry:
    """Route and router, which walk over blocks of summaries for tiles of `rows` rows.

    In half precision four warps, in the blocks that were best on an H200 in bfloat16 with tiles of 128 rows: of 64 for
    route with heads of 128 (groups of 2 to 32, chunks of 64 and, with groups of 4 and 8, of 32), else of 32, which heads of
    64 had (groups of 4).
    """
    row_bytes = next_power_of_two(head_dim) * itemsize
    block = 64 if row_bytes <= 256 else 32
    if itemsize == 2:
        warps, stages, route_block, router_block = 4, 2, block if head_dim > 64 else 32, 32
    else:
        warps, stages, route_block, router_block = 8 if rows >= 128 else 4, 3, block, block
    stages = stages_that_fit(stages, rows * row_bytes, route_block * row_bytes, shared_bytes)
    return {
        "route": {"num_warps": warps, "num_stages": stages, "block": route_block},
        "router": {"num_warps": warps, "num_stages": 1, "block": router_block},
    }


def _rule(itemsize: int, head_dim: int, chunk_size: int, group: int, shared_bytes: int) -> Entry:
    """A configuration that fits any shape: smaller tiles for wider heads and float32."""
    padded_group = next_power_of_two(group)
    pair_bytes, shared_bytes = shared_bytes // 2 - 8 * 1024, shared_bytes - LAYOUT_BYTES
    row_bytes = next_power_of_two(head_dim) * itemsize
    tile_rows = 128 if row_bytes <= 256 else 64 if row_bytes <= 512 else 32
    rows = max(16, padded_group, min(tile_rows, chunk_size * padded_group))
    step = max(16, min(rows, 64 if row_bytes <= 256 else 32))
    keys = max(16, min(chunk_size, 32768 // row_bytes))
    # compiled for an L40S, changes of layout took up to 16 KiB here, and none in the queries of `_over_lists`
    keys = keys_that_fit(keys, 2 * step * row_bytes, row_bytes, shared_bytes + LAYOUT_BYTES - 16 * 1024)
    step_bytes = 2 * keys * row_bytes
    wide = keys * row_bytes > 128 * 128
    keys_stages = stages_that_fit(2, step_bytes, 4 * step * row_bytes, shared_bytes)
    # Two programs a multiprocessor. Neighbouring chunks of fewer than 64 keys are taken side by side, whatever is selected: on an
    # H200 this takes 7 to 46% less time on what trained routers selected, 6% more in the sparser case of heads of 128. What loses
    # a fifth, choices that neighbouring chunks do not share, trained routers do not make.
    pair_keys = min(64, 32768 // row_bytes)
    pair_rows = max(16, padded_group, 64 if row_bytes <= 256 else 32)
    pairs_stages = stages_that_fit(3, 2 * pair_keys * row_bytes, 2 * pair_rows * row_bytes, pair_bytes)
    slab_rows = max(16, padded_group, 64)
    slab_stages = stages_that_fit(2, 2 * chunk_size * row_bytes, 2 * slab_rows * row_bytes, shared_bytes // 2)
    # Measured on an H200: pairs cost less however alike tokens select, but for heads of 64 with chunks of 64.
    by_pairs = itemsize == 2 and head_dim <= 128 and (head_dim > 64 or chunk_size < 64)
    return {
        "tile_rows": tile_rows,
        **_over_summaries(itemsize, head_dim, rows, shared_bytes),
        **_over_lists(itemsize, head_dim, chunk_size, rows, shared_bytes),
        "keys": {"num_warps": 8 if wide else 4, "num_stages": keys_stages, "block": step, "keys": keys},
        "pairs": {
            "num_warps": 8 if pair_keys * row_bytes > 128 * 128 else 4,
            "num_stages": pairs_stages,
            "block": pair_rows,
            "keys": pair_keys,
        },
        # whole chunks stay in shared memory beside the rows of each stage
        "attend_pairs": {"num_warps": 4, "num_stages": slab_stages, "block": slab_rows, "keys": chunk_size},
        "backward_pairs": {"num_warps": 4, "num_stages": slab_stages, "block": slab_rows, "keys": chunk_size},
        "parts_per_multiprocessor": 2,
        "pairs_above": 0.0 if by_pairs else math.inf,
        "attend_pairs_above": math.inf,
        "backward_pairs_above": math.inf,
    }


def _refuse_faulting(stage: str, config: Config, place: str) -> None:
    """On an H200 passes to keys and values of this form ended in illegal memory accesses (Triton 3.6): with chunks of 32 in
    heads of 64 and 128. Neither their PTX nor the interpreter's checks of addresses show why, and with two stages they run."""
    if stage in ("keys", "pairs") and config.num_stages < 2 and config.block >= 64 > config.keys:
        raise ValueError(
            f"{place}: {stage}.num_stages={config.num_stages} must be at least 2 where block={config.block} is 64 or more and "
            f"keys={config.keys} fewer than 64, since such kernels end in illegal memory accesses; try num_stages=2"
        )


@cache
def _tell_of_plain_kernels() -> None:
    """Once: they compute the same, and nothing else would say why attention is slower than its tables."""
    logger.warning(
        "Triton %s does not compile the kernels for Hopper GPUs, which are of Triton 3.6; plain ones take their place, and "
        "attention over tiles takes 1.5 to 1.8 times as long forward. torch 2.11 brings Triton 3.6",
        triton.__version__,
    )


@cache
def find_launches(
    device: torch.device, dtype: torch.dtype, head_dim: int, chunk_size: int, group: int
) -> Launches:
    """The configurations to use for a shape on a device: from the table if it is there, otherwise by rule.

    By rule as well where the table names a Hopper kernel that this Triton cannot compile: its numbers would not suit the plain one.

    Raises:
        ValueError: the table has a configuration that is known to fault.
    """
    gpu, shared_bytes, multiprocessors = device_limits(device)
    entry = _rule(dtype.itemsize, head_dim, chunk_size, group, shared_bytes)
    shape = shape_key(dtype, head_dim, chunk_size, group)
    measured = _table().get(gpu, {}).get(shape, {})
    for name, value in measured.items():
        if name in STAGES:
            config = Config(**value)
            _refuse_faulting(name, config, f"{TABLE_FILE.name}, {gpu}, {shape}")
            if config.kernel != PLAIN and not hopper.GLUON_IS_KNOWN:
                _tell_of_plain_kernels()
                continue
        entry[name] = value
    return Launches(
        tile_rows=entry["tile_rows"],
        parts=entry["parts_per_multiprocessor"] * multiprocessors,
        pair_parts=PAIR_PARTS_PER_MULTIPROCESSOR * multiprocessors,
        pairs_above=entry["pairs_above"],
        attend_pairs_above=entry["attend_pairs_above"],
        backward_pairs_above=entry["backward_pairs_above"],
        **{stage: Config(**entry[stage]) for stage in STAGES},
    )
