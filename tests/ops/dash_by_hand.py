"""DashAttention as loops over documents, tokens and chunks, with the entmax of the package of that name."""

import math

import entmax as package
import torch


def _package_entmax(z, alpha):
    return package.entmax15(z) if alpha == 1.5 else package.entmax_bisect(z, alpha=alpha, n_iter=100)


def _attend_by_loops(
    q,
    k,
    v,
    w,
    C,
    scaling_factor,
    sigma,
    estimate_diagonal,
    alpha,
    local_chunks,
    query_pool,
    pool_heads,
    routing_q,
    routing_k,
):
    """One document, one key/value head, one token and chunk at a time: q [N, G, D], k and v [N, D], w [D].

    The router's are routing_q [N, G or 1, D] and routing_k [N, D].
    """
    N, G, D = q.shape
    outputs, counts = [], []
    for i in range(N):
        own = i // C
        routed = max(0, own - local_chunks)
        selected = list(range(routed, own + 1))
        prior = [torch.zeros((), dtype=q.dtype) for _ in selected]
        if routed > 0:
            chunks = [routing_k[c * C : (c + 1) * C] for c in range(routed)]
            summaries = torch.stack([(x @ w / math.sqrt(D)).softmax(0) @ x for x in chunks])
            r = routing_q[max(0, i - query_pool + 1) : i + 1].mean(0)
            r = r.mean(0, keepdim=True).expand(G, D) if pool_heads else r
            z = [scaling_factor * summaries @ r[g] / math.sqrt(D) for g in range(G)]
            p = sum(_package_entmax(z_g, alpha) for z_g in z) / G
            past = [c for c in range(routed) if p[c] > 0]
            log_p = [p[c].log() for c in past]
            if estimate_diagonal:
                mean = sum(x.detach() for x in log_p) / len(past)
                log_p = [(x - mean) / sigma for x in log_p]
            selected, prior = selected + past, prior + log_p
        scores, values = [], []
        for c, b in zip(selected, prior, strict=True):
            seen = slice(c * C, min((c + 1) * C, i + 1))
            scores.append(q[i] @ k[seen].T / math.sqrt(D) + b)
            values.append(v[seen])
        outputs.append(torch.cat(scores, dim=1).softmax(1) @ torch.cat(values))
        counts.append(len(selected))
    return torch.stack(outputs), torch.tensor(counts)


def oracle(
    leaves,
    upstream,
    chunk_size=4,
    scaling_factor=6.0,
    sigma=2.0,
    estimate_diagonal=True,
    alpha=1.5,
    cu_seqlens=None,
    local_chunks=0,
    query_pool=1,
    pool_heads=False,
    routing_q=None,
    routing_k=None,
):
    """Output, gradients and chunk counts of the loops, in float64; the router's own queries and keys come after the leaves."""
    own = [] if routing_q is None else [routing_q, routing_k]
    leaves = [x.detach().double().requires_grad_() for x in (*leaves, *own)]
    q, k, v, w, *own = leaves
    (B, N, Hq, _), Hkv = q.shape, k.shape[2]
    ends = [0, N] if cu_seqlens is None else cu_seqlens.tolist()
    factors = scaling_factor if isinstance(scaling_factor, torch.Tensor) else [scaling_factor] * Hkv
    out, counts = torch.zeros_like(q), torch.zeros(B, N, Hkv)
    for b in range(B):
        for h in range(Hkv):
            heads = slice(h * Hq // Hkv, (h + 1) * Hq // Hkv)
            for document in map(slice, ends[:-1], ends[1:]):
                routing = (
                    (own[0][b, document, h : h + 1], own[1][b, document, h])
                    if own
                    else (q[b, document, heads], k[b, document, h])
                )
                out[b, document, heads], counts[b, document, h] = _attend_by_loops(
                    q[b, document, heads], k[b, document, h], v[b, document, h], w[h],
                    chunk_size, factors[h], sigma, estimate_diagonal, alpha,
                    local_chunks, query_pool, pool_heads, *routing,
                )  # fmt: skip
    leaves += learned(scaling_factor)
    grads = torch.autograd.grad(out, leaves, upstream.double(), allow_unused=True, materialize_grads=True)
    return out.detach(), grads, counts


def learned(scaling_factor):
    return [scaling_factor] if isinstance(scaling_factor, torch.Tensor) else []
