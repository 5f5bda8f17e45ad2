"""Memory that attention's kernels take beside tensors of a model: routing lists, and workspaces for pairs of a token and a chunk.

What the kernels allocate is worked out from the code of `dash_megatron.ops.kernels`, whose constants stand here once more: a plan
needs no torch. A test holds the two against each other.
"""

from __future__ import annotations

import math

from dash_megatron.config import Config
from dash_megatron.planning.choices import tile_tokens
from dash_megatron.planning.kernel_times import PAIRS_ABOVE, keys_by_pair, pairs_above
from dash_megatron.planning.layout import Layout

MAX_BOUNDED_BYTES = 2 * 2**30
"""Lists up to this size have room for every chunk: `dash_megatron.ops.kernels.geometry.MAX_BOUNDED_BYTES`."""
WORKSPACE_BYTES = 2**31
"""Most bytes of partial results by pair: `dash_megatron.ops.kernels.pair_slabs.WORKSPACE_BYTES`."""
MAX_COUNTS, COUNTED_SLABS, COUNT_BYTES = 2**26, 8, 4
"""Most entries of the table in which pairs are counted, most slabs that it is for where it does not hold all tiles, and bytes of an
entry: constants of `dash_megatron.ops.kernels.pair_slabs`."""
MAX_PAIR_GRADIENT_BYTES = 2**34
"""Most of the float32 gradients of keys and values by pair: `dash_megatron.ops.kernels.backward_q.MAX_PAIR_GRADIENT_BYTES`."""
PLACE_BYTES, PLACES_BYTES = {"attend": 12, "queries": 20}, 2**28
"""Bytes of one pair's places, and of the places of several slabs that are there at once: `dash_megatron.ops.kernels.pair_slabs.new_pairs`."""
PARTS = {1: 1056, 4: 528, 16: 528}
"""By query heads of a group, programs that share a slab of pairs: eight or four for each multiprocessor of the GPU that was timed."""
MAX_PAIRS = 2**26
"""Most log priors by chunk, 8 bytes each: `dash_megatron.ops.kernels.pairs.MAX_PAIRS`."""
KEY_PARTS, LEAST_STEPS = 32 * 132, 16
"""Programs that share the pairs of keys and values on an H100 or H200, and the fewest steps of one:
`dash_megatron.ops.kernels.configs.PAIR_PARTS_PER_MULTIPROCESSOR` and `dash_megatron.ops.kernels.pairs.LEAST_STEPS`."""
MIN_RUN_TILES, MAX_RUN_COUNTS = 8, 2**24
"""Tiles that such a pass counts together, at least, and most counts, 8 bytes each: `dash_megatron.ops.kernels.pairs.MIN_RUN_TILES`
and `dash_megatron.ops.kernels.transpose.MAX_COUNTS`."""
KEYS_A_PROGRAM, ROWS_A_STEP = 64, 64
"""Keys of a program and rows of a step in the launch configurations of that pass; smaller chunks are taken side by side."""


def attends_elsewhere(layout: Layout) -> bool:
    """Whether queries attend to keys of other ranks, rather than to all keys of some heads."""
    return layout.context > 1 and layout.context_comm != "a2a"


def _list_entries(config: Config, layout: Layout) -> tuple[float, float, int]:
    """Entries of one rank's routing lists, if tiles list every past chunk: those that the kernels have room for, and those that
    exist; and the tokens of a tile."""
    model, chunk, rows = config.model, config.attention.chunk_size, config.training.micro_batch
    chunks = config.data.seq_length / chunk
    # the rows of a micro-batch are one packed row, of documents as long as the next power of two
    longest = min(rows * config.data.seq_length, 1 << (config.data.seq_length - 1).bit_length()) / chunk
    tile = tile_tokens(model.heads // model.kv_heads, chunk)
    tiles = model.kv_heads / layout.tensor * (chunk / tile) / layout.context
    return rows * chunks * (longest + 1) / 2 * tiles, rows * chunks * (chunks + 1) / 2 * tiles, tile


def lists_are_counted(config: Config, layout: Layout) -> bool:
    """Whether routing lists are too long to have room for every past chunk, so that the router counts before it writes."""
    entries, _, tile = _list_entries(config, layout)
    return entries * 4 * (1 + tile) > MAX_BOUNDED_BYTES


def _entries_made(config: Config, layout: Layout, listed: float) -> tuple[float, int]:
    """Entries of one rank's routing lists for which there is room, and the tokens of a tile."""
    entries, own, tile = _list_entries(config, layout)
    # otherwise there is room for all
    if lists_are_counted(config, layout) or config.attention.fixed_lists:
        entries = own * min(1.0, listed)
    return entries, tile


def list_bytes(config: Config, layout: Layout, listed: float) -> tuple[float, float]:
    """Routing lists of one layer call on one rank: bytes in the forward, and what the backward adds.

    An entry is a chunk number and a log prior per token of its tile; the backward adds the prior's gradient and the
    transposed lists. Where every past chunk fits into 2 GiB, room is made for all, else for the share `listed`.
    """
    entries, tile = _entries_made(config, layout, listed)
    return entries * 4 * (1 + tile), entries * (4 * tile + 16)


def pair_bytes(config: Config, layout: Layout, listed: float, gpu: str) -> dict[str, float]:
    """Workspaces of one layer call on one rank in which attention ("attend") and its gradient ("queries") may go over selected pairs.

    Kernels decide on the device, when the workspace is there already: partial results of a group's heads, up to 2 GiB and no
    more than the pairs that tiles may list where pairs are still taken; places of pairs; in the gradient also float32 sums of
    keys and values, which are the buffer's own where keys come from other ranks. What another GPU than the one timed computes goes
    over tiles alone.
    """
    if config.training.precision != "bf16":
        return dict.fromkeys(PAIRS_ABOVE, 0.0)
    return {stage: _stage_pair_bytes(stage, config, layout, listed, gpu) for stage in PAIRS_ABOVE}


def _chunks_at_once(config: Config, layout: Layout) -> tuple[float, float, float]:
    """Of one layer call on one rank: its key/value heads, the chunks of its queries, and those whose keys it has at a time."""
    chunks = config.training.micro_batch * config.data.seq_length / config.attention.chunk_size
    kv_heads = config.model.kv_heads / layout.tensor
    if not attends_elsewhere(layout):
        return kv_heads / layout.context, chunks, chunks
    own_chunks = chunks / layout.context
    # a ring has half of a rank's keys at a time
    return kv_heads, own_chunks, own_chunks / 2 if layout.context_comm == "p2p" else chunks


def _stage_pair_bytes(stage: str, config: Config, layout: Layout, listed: float, gpu: str) -> float:
    """What `pair_bytes` gives for a stage, in bf16; 0 where it goes over tiles alone."""
    model, chunk, sharded = config.model, config.attention.chunk_size, attends_elsewhere(layout)
    group, head_dim = model.heads // model.kv_heads, model.channels_per_head
    entries, tile = _entries_made(config, layout, listed)
    kv_heads, own_chunks, chunks = _chunks_at_once(config, layout)
    above = pairs_above(stage, group, head_dim, chunk, gpu)
    if stage == "queries" and not sharded:
        # float32 gradients of keys and values
        above = math.inf if 8 * kv_heads * chunks * chunk * head_dim > MAX_PAIR_GRADIENT_BYTES else above
    # partial results in bf16, and in attention their log-sum-exp
    of_pair = group * (2 * head_dim + 4 * (stage == "attend"))
    room = WORKSPACE_BYTES // of_pair
    tiles, most_of_tile = own_chunks * (chunk / tile), tile * chunks
    # where a tile's pairs might not fit, the stage goes over tiles
    if above == math.inf or 2 * most_of_tile > room:
        return 0.0
    most_taken = min(entries * tile / max(1.0, above), kv_heads * tiles * most_of_tile)
    pairs, places = min(room, most_taken), PLACE_BYTES[stage]
    at_once, slab_tiles = max(1, PLACES_BYTES // (pairs * places)), kv_heads * tiles
    counted = slab_tiles
    if slab_tiles * chunks > MAX_COUNTS:
        at_once = min(at_once, COUNTED_SLABS)
        slab_tiles = max(1, MAX_COUNTS // chunks // at_once)
        counted = slab_tiles * at_once
    slabs = most_taken // (room - most_of_tile) + kv_heads * math.ceil(tiles / slab_tiles)
    found = pairs * (of_pair + min(at_once, slabs) * places) + COUNT_BYTES * counted * chunks
    if stage == "queries":
        sums = 2 * PARTS[group] + kv_heads * chunks * (not sharded)
        found += 2 * sums * chunk * head_dim * 4
    return found


def key_bytes(config: Config, layout: Layout, listed: float) -> float:
    """Workspace of one layer call on one rank in which the gradients of keys and values are summed over selected pairs, in bf16.

    Tokens and log priors of a slab's pairs; where those of each run of tiles begin in each group of chunks; and sums in float32: two
    for each program, whose work may cut chunks at both ends, and one for each chunk.
    """
    model, chunk = config.model, config.attention.chunk_size
    head_dim = model.channels_per_head
    if config.training.precision != "bf16" or not keys_by_pair(head_dim, chunk):
        return 0.0
    entries, tile = _entries_made(config, layout, listed)
    own = (
        config.training.micro_batch * config.data.seq_length * model.kv_heads / layout.tensor / layout.context
    )
    pairs, width = entries * tile + own, max(1, KEYS_A_PROGRAM // chunk)
    parts = min(KEY_PARTS, pairs * (model.heads // model.kv_heads) / ROWS_A_STEP / LEAST_STEPS)
    sums = 2 * parts * width * chunk + own
    groups = math.ceil(config.training.micro_batch * config.data.seq_length / chunk / width)
    counts, most = own / tile / MIN_RUN_TILES * groups, MAX_RUN_COUNTS
    # longer runs, twice as long each time, where there would be more
    counts /= 1 << max(0, math.ceil(math.log2(counts / most)))
    return 8 * (min(MAX_PAIRS, width * pairs) + counts) + 8 * head_dim * sums
