"""Attention by pair at 2^20 tokens and 32 heads, on memory of which only what a few tiles need is ever touched.

Every tensor has more than 2^31 elements, or places that far, so that an index of 32 bits would lead elsewhere.
"""

import math
import mmap

import pytest
import torch

from dash_megatron.ops.kernels import attend_pairs, backward_pairs, configs, geometry, pair_slabs
from tests.ops.checked_addresses import check_addresses
from tests.ops.kernels_under_test import CUDA
from tests.ops.quick_interpreter import quicken

N, H, D, C = 2**20, 32, 128, 64
CHUNKS = N // C
BY_PAIR = configs.ByPair(configs.Config(num_warps=4, num_stages=2, block=64, keys=64), 2, 0)
# of the last two tiles, each a whole chunk, the chunks listed; where in the lists; the slot of their first pair
LISTED, OFFSET, SLOT = (
    ((CHUNKS - 30, CHUNKS - 9, CHUNKS - 3), (CHUNKS - 29, CHUNKS - 3, CHUNKS - 2)),
    2**27,
    2**33,
)

# Linux's number for it; Python's name is of 3.13
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)

pytestmark = pytest.mark.skipif(
    CUDA, reason="needs memory that is never touched, which the interpreter takes"
)


def _untouched(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that take memory only where they are written or read."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _sizes() -> "geometry.Sizes":
    return geometry.size_tiles(N, (H, D), H, C, CHUNKS, CHUNKS * (CHUNKS - 1) // 2, 64)


class _LastTiles:
    """The two last tiles of the last head, and the slab that has all their pairs; rows and selected chunks are random."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sizes = sizes = _sizes()
        assert sizes.tile_tokens == C
        self.rows = slice(N - 2 * C, N)
        self.q, self.k, self.v, self.out = (_untouched(N, H, D) for _ in range(4))
        self.lse, self.mean_log = _untouched(N, H), _untouched(N, H)
        for x in (self.q, self.out, self.lse, self.mean_log):
            x[self.rows, -1] = torch.randn(x[self.rows, -1].shape, generator=generator)
        for c in {c for chunks in LISTED for c in chunks}:
            for x in (self.k, self.v):
                x[c * C : (c + 1) * C, -1] = torch.randn(C, D, generator=generator)
        room = OFFSET + 8
        self.lists = geometry.Lists(
            _untouched(room, dtype=torch.int32),
            _untouched(room, C),
            _untouched(sizes.num_tiles, dtype=torch.int64),
            _untouched(sizes.num_tiles, dtype=torch.int32),
        )
        log_etc = torch.randn(3, 2, C, generator=generator)
        log_etc[torch.rand(3, 2, C, generator=generator) < 0.4] = -torch.inf
        self.log_tec = log_etc.transpose(0, 1)
        slot = _untouched(sizes.num_tiles * C + 1, dtype=torch.int64)
        counts = (self.log_tec > -torch.inf).sum(1).flatten()
        slot[-2 * C - 1 :] = SLOT + torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        for t, chunks in enumerate(LISTED):
            tile, first = sizes.num_tiles - 2 + t, OFFSET + 3 * t
            self.lists.offset[tile], self.lists.counts[tile] = first, 3
            self.lists.chunk[first : first + 3] = torch.tensor(chunks)
            self.lists.log_prior[first : first + 3] = self.log_tec[t]
        self.chunks = geometry.chunk_table(sizes, 1, None, torch.device("cpu"))
        self.slabs = pair_slabs.PairSlabs(
            by_pair=BY_PAIR,
            num_slabs=1,
            room=6 * C,
            at_once=1,
            taken=torch.tensor(True),
            key_start=geometry.own_places(None, self.chunks, sizes)[0],
            first_chunk=0,
            slab_of_tile=_untouched(sizes.num_tiles, dtype=torch.int64),
            first_tile=torch.tensor([sizes.num_tiles - 2, sizes.num_tiles]),
            slot=slot,
            count_tiles=2,
            placed=None,
        )

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Base-2 scores of the tiles' rows [2 C, 3 C] with prior, and the first row of each key's chunk [2 C, 3]."""
        start_te = torch.tensor(LISTED) * C
        key_rk = (start_te[:, :, None] + torch.arange(C)).flatten(1).repeat_interleave(C, 0)
        q_r, k_rk = self.q[self.rows, -1], self.k[:, -1][key_rk]
        prior_re = (self.log_tec.mT - self.mean_log[self.rows, -1].view(2, C, 1)).flatten(0, 1) * 0.5
        scores_rk = torch.einsum("rd,rkd->rk", q_r, k_rk) * D**-0.5 * math.log2(math.e)
        return scores_rk + prior_re.repeat_interleave(C, 1), key_rk


def test_outputs_of_the_last_of_a_million_tokens_are_merged(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quicken(monkeypatch)
    check_addresses(monkeypatch)
    x = _LastTiles()
    scores_rk, key_rk = x.scores()
    own_lse, own = x.lse[x.rows, -1].clone(), x.out[x.rows, -1].clone()
    lse = torch.logaddexp2(own_lse, torch.logsumexp(scores_rk * math.log(2), 1) / math.log(2))
    part = torch.einsum("rk,rkd->rd", torch.exp2(scores_rk - lse[:, None]), x.v[:, -1][key_rk])
    expected = own * torch.exp2(own_lse - lse)[:, None] + part
    attend_pairs.merge_pairs(
        x.q, x.k, x.v, x.out, x.lse, x.lists, x.slabs, x.mean_log, x.chunks, x.sizes, 0.5
    )
    assert (x.out[x.rows, -1] - expected).norm() < 1e-5 * expected.norm()
    assert torch.allclose(x.lse[x.rows, -1], lse, atol=1e-5)


def test_gradients_of_the_last_of_a_million_tokens_are_added(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quicken(monkeypatch)
    check_addresses(monkeypatch)
    x = _LastTiles()
    scores_rk, key_rk = x.scores()
    d_out, delta, dq, d_keys = (
        _untouched(N, H, D),
        _untouched(N, H),
        _untouched(N, H, D),
        _untouched(2, N, H, D),
    )
    generator = torch.Generator().manual_seed(1)
    d_out[x.rows, -1] = torch.randn(2 * C, D, generator=generator)
    delta[x.rows, -1] = torch.randn(2 * C, generator=generator)
    selected_lse = torch.logsumexp(scores_rk * math.log(2), 1) / math.log(2)
    x.lse[x.rows, -1] = torch.logaddexp2(x.lse[x.rows, -1], selected_lse)
    q_r, do_r, k_rk, v_rk = x.q[x.rows, -1], d_out[x.rows, -1], x.k[:, -1][key_rk], x.v[:, -1][key_rk]
    p_rk = torch.exp2(scores_rk - x.lse[x.rows, -1, None])
    ds_rk = p_rk * (torch.einsum("rd,rkd->rk", do_r, v_rk) - delta[x.rows, -1, None])
    dk, dv = torch.zeros(2, 32 * C, D)
    # keys of the last 32 chunks
    key_rk -= N - 32 * C
    dk.index_put_((key_rk,), ds_rk[..., None] * q_r[:, None] * D**-0.5, accumulate=True)
    dv.index_put_((key_rk,), p_rk[..., None] * do_r[:, None], accumulate=True)

    # the lists' own places of log priors, of which only these six are looked at
    places = _untouched(OFFSET + 8, C)
    backward_pairs.backward_pairs(
        x.q, x.k, x.v, d_out, x.lse, delta, dq, places, x.lists, x.slabs, x.mean_log, x.chunks, x.sizes, 0.5, d_keys
    )  # fmt: skip
    d_prior = places[OFFSET : OFFSET + 6].view(2, 3, C)
    d_prior_tec = ds_rk.view(2, C, 3, C).sum(3).transpose(1, 2)
    found = dq[x.rows, -1], d_keys[0, -32 * C :, -1], d_keys[1, -32 * C :, -1], d_prior
    expected = torch.einsum("rk,rkd->rd", ds_rk, k_rk) * D**-0.5, dk, dv, d_prior_tec
    for name, y, z in zip(("dq", "dk", "dv", "d prior"), found, expected, strict=True):
        assert (y - z).norm() < 1e-5 * z.norm(), name


@pytest.mark.parametrize(("selected", "entries"), [(40, False), (300, True)])
def test_slabs_of_a_million_tokens_keep_to_their_workspace(selected, entries, monkeypatch):
    """Of 32 key/value heads whose tokens select so many chunks each, in bfloat16."""
    sizes, counted = _sizes(), []

    def count_tokens(taken, counts, token_count, *_):
        counted.append(counts)
        token_count.fill_(selected)

    monkeypatch.setattr(pair_slabs, "_launch_count", count_tokens)
    lists = geometry.Lists(
        _untouched(1, dtype=torch.int32),
        _untouched(sizes.num_tiles * selected, C),
        _untouched(1, dtype=torch.int64),
        torch.full((sizes.num_tiles,), selected, dtype=torch.int32),
    )
    chunks, pair_bytes = geometry.chunk_table(sizes, 1, None, torch.device("cpu")), 2 * D + 4
    slabs = pair_slabs.plan_slabs(
        lists, chunks, sizes, pair_bytes, BY_PAIR, torch.tensor(N * H * selected), entries
    )
    assert counted == [None], "a table for all tiles would have 2^33 counts"
    assert slabs.room * pair_bytes <= 2**31
    assert slabs.count_tiles * CHUNKS * 4 <= 2**28
    tiles = slabs.first_tile.diff()
    assert slabs.first_tile[0] == 0
    assert tiles.sum() == sizes.num_tiles
    assert tiles.max() * slabs.at_once <= slabs.count_tiles
    assert tiles.max() * C * selected <= slabs.room
    # whole heads: nothing reaches into the next one
    assert torch.isin(torch.arange(H) * sizes.tiles_per_head, slabs.first_tile).all()
    # most are used
    assert (tiles > 0).sum() > 0.5 * slabs.num_slabs
