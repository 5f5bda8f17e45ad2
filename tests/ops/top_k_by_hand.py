"""The top-k baselines token by token, in float64, as their papers' formulas read: what tests compare with."""

import math

import torch


def chunks_by_hand(q_GD, k_ND, i, C, selection, pooled_of, reduce):
    """Chunks that the group's token i of one document attends to, its own included, and the weights of pooled keys."""
    size, stride, own = selection.kernel_size, selection.kernel_stride, i // C
    starts = [start for start in range(0, len(k_ND), stride) if start + size <= i + 1]
    weights = torch.zeros(len(q_GD), 0, dtype=q_GD.dtype)
    if starts:
        pooled = torch.stack([pooled_of(k_ND[start : start + size]) for start in starts])
        weights = (q_GD @ pooled.T / math.sqrt(q_GD.shape[1])).softmax(-1)
    scores = []
    for c in range(own + 1):
        # tokens that a kernel shares with the chunk, in strides
        shared = [max(0, min(s + size, (c + 1) * C) - max(s, c * C)) / stride for s in starts]
        parts = [(p, n) for p, n in zip(weights.detach().sum(0).tolist(), shared, strict=True) if n > 0]
        scores.append(
            max((p for p, _ in parts), default=0) if reduce == "max" else sum(p * n for p, n in parts)
        )
    always = set(range(min(selection.initial_blocks, own))) | set(
        range(max(0, own - selection.local_blocks + 1), own + 1)
    )
    others = sorted(set(range(own)) - always, key=lambda c: -scores[c])
    return always | set(others[: selection.top_k]), starts, weights


def softmax_over_tokens(q_GD, k_ND, v_ND, tokens):
    weights = (q_GD @ k_ND[tokens].T / math.sqrt(q_GD.shape[1])).softmax(-1)
    return weights @ v_ND[tokens]


def tokens_of(chunks, i, C):
    return [t for c in sorted(chunks) for t in range(c * C, min((c + 1) * C, i + 1))]


def infllmv2_by_hand(q, k, v, C, selection):
    """One document, q [N, Hq, D]; also the number of chunks [N, Hkv]."""
    counts = torch.zeros(len(q), k.shape[1], dtype=torch.int32)
    G = q.shape[1] // k.shape[1]
    rows = []
    for i in range(len(q)):
        heads = []
        for h in range(k.shape[1]):
            group = q[i, h * G : h * G + G]
            chunks, _, _ = chunks_by_hand(group, k[:, h], i, C, selection, lambda x: x.mean(0), "max")
            heads.append(softmax_over_tokens(group, k[:, h], v[:, h], tokens_of(chunks, i, C)))
            counts[i, h] = len(chunks)
        rows.append(torch.cat(heads))
    out = torch.stack(rows)
    return out, counts


def compressed_by_hand(x_lD, weights, h):
    mean = (x_lD * (1 + weights.pool[h])).mean(0)
    return mean + torch.nn.functional.silu(mean @ weights.mlp_in[h]) @ weights.mlp_out[h]


def nsa_by_hand(q, k, v, gates, compress_k, compress_v, C, selection, window):
    """One document, q [N, Hq, D] and gates [N, Hq, 3]; also the number of chunks [N, Hkv]."""
    G, counts, rows = q.shape[1] // k.shape[1], torch.zeros(len(q), k.shape[1], dtype=torch.int32), []
    for i in range(len(q)):
        heads = []
        for h in range(k.shape[1]):
            group, gate = q[i, h * G : h * G + G], gates[i, h * G : h * G + G]
            chunks, starts, weights = chunks_by_hand(
                group, k[:, h], i, C, selection, lambda x, h=h: compressed_by_hand(x, compress_k, h), "sum"
            )
            compressed = torch.zeros_like(group)
            if starts:
                values = [
                    compressed_by_hand(v[s : s + selection.kernel_size, h], compress_v, h) for s in starts
                ]
                compressed = weights @ torch.stack(values)
            recent = set(range(max(0, i // C - window // C), i // C + 1))
            selected = softmax_over_tokens(group, k[:, h], v[:, h], tokens_of(chunks, i, C))
            near = softmax_over_tokens(group, k[:, h], v[:, h], tokens_of(recent, i, C))
            heads.append(gate[:, :1] * compressed + gate[:, 1:2] * selected + gate[:, 2:] * near)
            counts[i, h] = len(chunks | recent)
        rows.append(torch.cat(heads))
    return torch.stack(rows), counts
