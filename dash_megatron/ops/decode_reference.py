"""Decoding in plain torch, one sequence after another, by `reference.py`: the CPU path, and what the kernels must equal.

It reads lengths and page tables on the host. Tensors are those of a `DashCache`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dash_megatron.ops.pooling import pool_queries_reference
from dash_megatron.ops.reference import QueryPositions, attend, route, upcast
from dash_megatron.ops.types import Router


def _pages(page_table: Tensor | None, sequence: int, place: Tensor, per_page: int) -> tuple[Tensor, Tensor]:
    """Index into the pool of the tokens (or chunks) at `place` of a sequence: page, and place in it."""
    if page_table is None:
        return torch.full_like(place, sequence), place
    return page_table[sequence, place // per_page].long(), place % per_page


def _summarize_chunk(k_CHD: Tensor, w_HD: Tensor, dtype: torch.dtype) -> Tensor:
    """Summary [H, D] of a whole chunk: `reference.summarize`, but for the order in which the softmax is summed."""
    k_CHD, w_HD = upcast(k_CHD, w_HD.to(k_CHD.dtype) if k_CHD.dtype == torch.float64 else w_HD)
    weight_CH = (torch.einsum("chd,hd->ch", k_CHD, w_HD) * k_CHD.shape[-1] ** -0.5).softmax(0)
    summary_HD = torch.einsum("ch,chd->hd", weight_CH, k_CHD)
    if dtype == torch.float16:
        summary_HD = summary_HD.clamp(-65504, 65504)
    return summary_HD.to(dtype)


def cache_write_reference(
    k_new: Tensor,
    v_new: Tensor,
    w: Tensor,
    routing_k: Tensor | None,
    k: Tensor,
    v: Tensor,
    summary: Tensor,
    routing_keys: Tensor | None,
    lengths: Tensor,
    page_table: Tensor | None,
    cu_seqlens: Tensor | None,
    active: Tensor | None,
    chunk_size: int,
) -> None:
    """Append k_new and v_new [tokens, Hkv, D] to the sequences: one token each, or those between `cu_seqlens`.

    Summarizes the chunks that are completed, and moves `lengths` on. The cache has room. Where it has `routing_keys`, summaries
    are of these and of routing_k [tokens, Hkv, D].
    """
    bounds = range(len(lengths) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    skipped = [False] * len(lengths) if active is None else (~active).tolist()
    for b, start in enumerate(lengths.tolist()):
        new = slice(bounds[b], bounds[b + 1])
        end = start + new.stop - new.start
        if skipped[b] or end == start:
            continue
        at = _pages(page_table, b, torch.arange(start, end, device=k.device), k.shape[1])
        k[at], v[at] = k_new[new], v_new[new]
        if routing_k is not None and routing_keys is not None:
            # of the first chunk, the keys that are kept
            before = torch.arange(start // chunk_size * chunk_size, start, device=k.device)
            num_kept = routing_keys.shape[1]
            routing_SHD = torch.cat([routing_keys[b, before % num_kept], routing_k[new]])
            last = torch.arange(max(start, end - num_kept), end, device=k.device)
            routing_keys[b, last % num_kept] = routing_k[new][len(routing_k[new]) - len(last) :]
        for c in range(start // chunk_size, end // chunk_size):
            chunk = torch.arange(c * chunk_size, (c + 1) * chunk_size, device=k.device)
            keys_CHD = k[_pages(page_table, b, chunk, k.shape[1])]
            if routing_keys is not None:
                keys_CHD = routing_SHD[chunk - start // chunk_size * chunk_size]
            summary_at = _pages(page_table, b, torch.tensor(c, device=k.device), summary.shape[1])
            summary[summary_at] = _summarize_chunk(keys_CHD, w, summary.dtype)
        lengths[b] = end


def pool_and_keep_reference(
    q_new: Tensor,
    queries: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor | None,
    active: Tensor | None,
    query_pool: int,
) -> Tensor:
    """Router's queries [tokens, Hq, D] of new tokens, from their queries q_new and those kept in `queries`, where they go too.

    The other arguments are those of `cache_write_reference`, which has not written these tokens yet.
    """
    bounds = range(len(lengths) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    skipped = [False] * len(lengths) if active is None else (~active).tolist()
    pooled, num_kept = q_new.clone(), queries.shape[1]
    for b, start in enumerate(lengths.tolist()):
        new = q_new[bounds[b] : bounds[b + 1]]
        if skipped[b] or not len(new):
            continue
        before = torch.arange(max(0, start - query_pool + 1), start, device=q_new.device)
        rows = torch.cat([queries[b, before % num_kept], new])
        found = pool_queries_reference(rows[None], torch.arange(len(rows), device=q_new.device), query_pool)
        pooled[bounds[b] : bounds[b + 1]] = found[0, len(before) :]
        last = new[-num_kept:]
        end = start + len(new)
        queries[b, torch.arange(end - len(last), end, device=q_new.device) % num_kept] = last
    return pooled


def decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    router: Router,
    routing_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last token of every sequence, by the functions that training is made of.

    Arguments are those of `decode_and_count` and the tensors of its cache; computed in float64 if q is, otherwise in float32.

    Returns:
        Output [B, Hq, D] in q's dtype, zero for empty sequences, and the chunks selected, the own one included,
        int32 [B, Hkv].
    """
    (B, Hq, D), Hkv, C = q.shape, k.shape[2], router.chunk_size
    out = torch.zeros_like(q)
    selected = torch.zeros(B, Hkv, dtype=torch.int32, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        past, slot = divmod(length - 1, C)
        tokens = _pages(page_table, b, torch.arange(length, device=q.device), k.shape[1])
        chunks = _pages(page_table, b, torch.arange(past, device=q.device), summary.shape[1])
        rows = (x[b].unflatten(0, (Hkv, -1)) for x in (q, q if routing_q is None else routing_q))
        q_HGD, routing_q_HGD, k_SHD, v_SHD, summary_cHD = upcast(*rows, k[tokens], v[tokens], summary[chunks])
        # the rest of the own chunk is empty, and its summary is not made yet
        k_HcCD, v_HcCD = (
            F.pad(x, (0, 0, 0, 0, 0, C - 1 - slot)).transpose(0, 1).unflatten(1, (-1, C))
            for x in (k_SHD, v_SHD)
        )
        summary_HcD = F.pad(summary_cHD.to(k_SHD.dtype), (0, 0, 0, 0, 0, 1)).transpose(0, 1)
        q_HG1D, routing_q_HG1D = ((x * D**-0.5)[:, :, None] for x in (q_HGD, routing_q_HGD))
        chunk_c = torch.arange(past + 1, device=q.device)
        own_1, slot_1 = torch.tensor([[past], [slot]], device=q.device)
        places = QueryPositions(own_1, slot_1, torch.zeros_like(own_1))
        masks = places.masks(chunk_c, router.local_chunks)
        bias_H1c, count_H1 = route(routing_q_HG1D, summary_HcD, *masks, router)
        out_HG1D = attend(q_HG1D, k_HcCD, v_HcCD, bias_H1c, places.hidden(chunk_c[past:], C))
        out[b], selected[b] = out_HG1D.reshape(Hq, D).to(q.dtype), count_H1.flatten()
    return out, selected
