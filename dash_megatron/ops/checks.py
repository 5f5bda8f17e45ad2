"""Checks of arguments: every error is a ValueError that names the argument, its value, the rule and the remedy."""

import math

import torch
from torch import Tensor

from dash_megatron.ops.types import Router

CHUNK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)
# As many tokens as the largest chunk has; the kernel reads so many rows for each one.
MAX_QUERY_POOL = 128


def check_chunk_size(chunk_size: int) -> None:
    """Raise ValueError unless chunks of so many tokens exist."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size={chunk_size!r} must be a power of two from 1 to 128, as an int; try 64")


def check_router(router: Router, num_kv_heads: int, device: torch.device) -> None:
    """Raise ValueError unless every constant of the router is of its kind and in its range.

    Args:
        router: to check.
        num_kv_heads: how many factors a scaling factor that is a tensor must have.
        device: where it must lie.
    """
    check_chunk_size(router.chunk_size)
    check_scaling(router.scaling_factor, num_kv_heads, device)
    check_positive("sigma", router.sigma, "try 2.0, or 1e6 for a flat prior")
    check_flag("estimate_diagonal", router.estimate_diagonal)
    check_alpha(router.alpha)
    check_local_chunks(router.local_chunks)
    check_query_pool(router.query_pool)
    check_flag("pool_heads", router.pool_heads)


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless `alpha` is a number in (1, 2]."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 1 < alpha <= 2:
        raise ValueError(
            f"alpha={alpha!r} must be a number above 1 and at most 2; try 1.5 (2 is sparsemax; for alpha = 1 use softmax)"
        )


def check_tensors(q: Tensor, k: Tensor, v: Tensor, summary_query: Tensor | None = None) -> None:
    """Raise ValueError unless the tensors fit each other: q [B, N, Hq, D], k and v [B, N, Hkv, D], summary_query [Hkv, D]."""
    named = {"q": q, "k": k, "v": v}
    if summary_query is not None:
        named["summary_query"] = summary_query
    for name, x in named.items():
        dims, layout = (2, "[Hkv, D]") if name == "summary_query" else (4, "[B, N, heads, D]")
        if not isinstance(x, Tensor) or x.ndim != dims:
            seen = f"{name}.shape={list(x.shape)}" if isinstance(x, Tensor) else f"{name}={x!r}"
            raise ValueError(f"{seen} must be a tensor of {dims} dimensions, {layout}; reshape {name}")
    if q.dtype not in DTYPES:
        raise ValueError(
            f"q.dtype={q.dtype} must be one of {[str(d) for d in DTYPES]}; cast q, k and v to torch.bfloat16"
        )
    for name, x in named.items():
        _check_kind(name, x, q)
    check_heads(q, k, v)
    if summary_query is not None and list(summary_query.shape) != [k.shape[2], q.shape[3]]:
        shape = [k.shape[2], q.shape[3]]
        raise ValueError(
            f"summary_query.shape={list(summary_query.shape)} must be [Hkv, D] = {shape}; "
            f"a flattened one needs .view({shape[0]}, {shape[1]})"
        )


def check_own_router(routing_q: Tensor | None, routing_k: Tensor | None, k: Tensor, pool_heads: bool) -> None:
    """Raise ValueError unless the router's own queries and keys are None both, or both like k beside `pool_heads`."""
    if routing_q is None and routing_k is None:
        return
    for name, x in (("routing_q", routing_q), ("routing_k", routing_k)):
        if not is_tensor(x, k.dtype, list(k.shape), k.device):
            raise ValueError(
                f"{name}={describe(x)} must be {describe(k)}, as k: one query and one key for each key/value head; "
                "give both or neither"
            )
    if not pool_heads:
        raise ValueError(
            "pool_heads=False beside routing_q must be True: there is one query a group; pass pool_heads=True"
        )


def _check_kind(name: str, x: Tensor, q: Tensor) -> None:
    if x.numel() == 0:
        raise ValueError(
            f"{name}.shape={list(x.shape)} must have no empty dimension; skip the call for empty input"
        )
    if x.device != q.device:
        raise ValueError(
            f"{name}.device={x.device} must be q's device {q.device}; move {name} with .to(q.device)"
        )
    widened = name == "summary_query" and x.dtype == torch.float32 and q.dtype in HALF_DTYPES
    if x.dtype != q.dtype and not widened:
        raise ValueError(
            f"{name}.dtype={x.dtype} must be q's dtype {q.dtype} (summary_query may stay float32 beside half "
            f"precision); cast {name} with .to(q.dtype)"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless k and v have the shape that q and the number of key/value heads ask for."""
    for name, x in (("k", k), ("v", v)):
        expected = [q.shape[0], q.shape[1], k.shape[2], q.shape[3]]
        if list(x.shape) != expected:
            raise ValueError(
                f"{name}.shape={list(x.shape)} must be {expected}: [B, N, Hkv, D] with B, N and D of q "
                f"{list(q.shape)} and one Hkv for k and v; reshape {name}"
            )
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"q.shape={list(q.shape)} has {num_heads} heads, which must be a multiple of the {num_kv_heads} heads of k; "
            f"try {max(1, num_heads // num_kv_heads) * num_kv_heads}"
        )


def check_positive(name: str, value: float, advice: str) -> None:
    """Raise ValueError unless `value` is a finite number above 0; `advice` is the remedy in the message."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ValueError(f"{name}={value!r} must be a finite Python number above 0, not a tensor; {advice}")


def check_scaling(scaling_factor: float | Tensor, num_kv_heads: int, device: torch.device) -> None:
    """Raise ValueError unless the scaling factor is a number above 0, or a tensor [Hkv] of such on the device."""
    if not isinstance(scaling_factor, Tensor):
        check_positive("scaling_factor", scaling_factor, "try 1.0")
        return
    x = scaling_factor
    if list(x.shape) != [num_kv_heads] or not x.is_floating_point() or x.device != device:
        raise ValueError(
            f"scaling_factor={x.dtype} {list(x.shape)} on {x.device} must be a number, or a floating tensor [Hkv] = "
            f"[{num_kv_heads}] on {device}; reshape or move it"
        )
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((x > 0).all()):
        raise ValueError(
            f"scaling_factor={x.tolist()} must be above 0 for every head; learn its logarithm, for example"
        )


def check_local_chunks(value: int) -> None:
    """Raise ValueError unless `value` is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"local_chunks={value!r} must be an int of at least 0; try 2, or 0 for none")


def check_query_pool(value: int) -> None:
    """Raise ValueError unless `value` is an int from 1 to `MAX_QUERY_POOL`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_QUERY_POOL:
        raise ValueError(
            f"query_pool={value!r} must be an int from 1 to {MAX_QUERY_POOL}; try 16, or 1 for a token's own query"
        )


def check_flag(name: str, value: bool) -> None:
    """Raise ValueError unless the argument called `name` is a bool."""
    if value is not True and value is not False:
        raise ValueError(f"{name}={value!r} must be True or False; pass a bool")


def check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor) -> None:
    """Raise ValueError unless `cu_seqlens` is None or bounds the documents of q [1, N, Hq, D]; values only on CPU."""
    if cu_seqlens is None:
        return
    B, N = q.shape[:2]
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
        seen = (
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, Tensor)
            else repr(cu_seqlens)
        )
        raise ValueError(
            f"cu_seqlens={seen} must be a one-dimensional int32 tensor, [documents + 1]; "
            "build it with torch.tensor(boundaries, dtype=torch.int32)"
        )
    if B != 1:
        raise ValueError(
            f"cu_seqlens with q.shape={list(q.shape)} must have batch size 1; concatenate the {B} rows along N, or pass None"
        )
    if len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens={cu_seqlens.tolist()} must hold at least two boundaries; one document is [0, {N}]"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens.device={cu_seqlens.device} must be q's device {q.device}; move it with .to(q.device)"
        )
    if cu_seqlens.device.type != "cpu":
        return  # reading the values would make the host wait for the device at every call
    first, last = cu_seqlens[[0, -1]].tolist()
    if (first, last) != (0, N):
        raise ValueError(
            f"cu_seqlens runs from {first} to {last}, but must run from 0 to N={N}; include both ends"
        )
    lengths = cu_seqlens.diff()
    if bool((lengths <= 0).any()):
        at = int((lengths <= 0).nonzero()[0])
        raise ValueError(
            f"cu_seqlens[{at}:{at + 2}]={cu_seqlens[at : at + 2].tolist()} must rise: boundaries increase strictly; "
            "drop empty documents"
        )


def check_max_seqlen(max_seqlen: int | None, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError unless `max_seqlen` is None or bounds the documents of `cu_seqlens`, whose values are read on CPU only."""
    if max_seqlen is None:
        return
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 1:
        raise ValueError(f"max_seqlen={max_seqlen!r} must be an int of at least 1, or None")
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        longest = int(cu_seqlens.diff().max())
        if longest > max_seqlen:
            raise ValueError(
                f"max_seqlen={max_seqlen} must be at least the {longest} tokens of the longest document in cu_seqlens; "
                "pass that, or None"
            )


def check_decode_query(q: Tensor, k: Tensor, batch: int) -> None:
    """Raise ValueError unless q is [batch, Hq, D], of the dtype and on the device of a cache's k [pages, page, Hkv, D]."""
    Hkv, D = k.shape[2:]
    good = isinstance(q, Tensor) and q.ndim == 3 and q.shape[::2] == (batch, D) and q.shape[1] > 0
    if not good or q.shape[1] % Hkv:
        seen = f"q.shape={list(q.shape)}" if isinstance(q, Tensor) else f"q={q!r}"
        raise ValueError(
            f"{seen} must be [B, Hq, D] with B={batch}, D={D} and Hq a multiple of the cache's {Hkv} heads; reshape q"
        )
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q={q.dtype} on {q.device} must be {k.dtype} on {k.device}, as the cache; "
            "cast or move q with .to(cache.k)"
        )


def check_routing_query(
    routing_q: Tensor | None, q: Tensor, num_kv_heads: int, query_pool: int, pool_heads: bool, own: bool
) -> None:
    """Raise ValueError unless decoding has the router's queries where it needs them, and only where they may be.

    They are pooled queries like q, or beside `pool_heads` the router's own, one for each key/value head, which `own` says that
    there must be.
    """
    if routing_q is None and query_pool == 1 and not own:
        return
    shape = [len(q), num_kv_heads, q.shape[2]]
    shapes = [shape] if pool_heads else []
    shapes += [list(q.shape)] if query_pool > 1 and not own else []
    if not any(is_tensor(routing_q, q.dtype, allowed, q.device) for allowed in shapes):
        raise ValueError(
            f"routing_q={describe(routing_q)} must be None beside query_pool=1, and otherwise {describe(q)}, as q, but "
            f"query_pool={query_pool}; or of shape {shape} beside pool_heads=True where the router has its own; pass what the "
            "cache returned when it got the token"
        )


def check_size(name: str, value: int) -> None:
    """Raise ValueError unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an int of at least 1; pass the size wanted")


def describe(x: object) -> str:
    """Dtype, shape and device of a tensor as messages write them; the repr of anything else."""
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def is_tensor(x: object, dtype: torch.dtype, shape: list[int], device: torch.device) -> bool:
    """Whether x is a tensor of this dtype and shape on this device."""
    return isinstance(x, Tensor) and x.dtype == dtype and list(x.shape) == shape and x.device == device


def summary_dtype(dtype: torch.dtype) -> torch.dtype:
    """Data type of a cache's summaries beside keys of `dtype`: float16 for half precision, since bfloat16 rounds eight times as coarsely."""
    return torch.float16 if dtype in HALF_DTYPES else dtype


def check_cache(
    k: Tensor,
    v: Tensor,
    summary: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    chunk_size: int,
) -> None:
    """Raise ValueError unless the tensors have the layout of a `DashCache`."""
    check_chunk_size(chunk_size)
    if not isinstance(k, Tensor) or k.ndim != 4 or k.dtype not in DTYPES or k.numel() == 0:
        raise ValueError(
            f"k={describe(k)} must be [pages, page_size, Hkv, D], not empty, of a dtype in {[str(d) for d in DTYPES]}; "
            "see DashCache.paged"
        )
    pages, page_size, heads, dim = k.shape
    if page_size % chunk_size:
        raise ValueError(
            f"page_size={page_size} (k.shape[1]) must be a multiple of chunk_size={chunk_size}; "
            f"try {max(chunk_size, page_size // chunk_size * chunk_size)}"
        )
    expected = {
        "v": (v, k.dtype, [*k.shape]),
        "summary": (summary, summary_dtype(k.dtype), [pages, page_size // chunk_size, heads, dim]),
        "lengths": (lengths, torch.int32, [pages if page_table is None else len(page_table)]),
    }
    if page_table is not None:
        table_shape = list(page_table.shape) if page_table.ndim == 2 else ["B", "max_pages"]
        expected["page_table"] = (page_table, torch.int32, table_shape)
    for name, (x, dtype, shape) in expected.items():
        if not is_tensor(x, dtype, shape, k.device):
            raise ValueError(
                f"{name}={describe(x)} must be {str(dtype).removeprefix('torch.')} {shape} on {k.device}, as k "
                f"{describe(k)} with chunk_size={chunk_size} asks; allocate it so"
            )
    tables = [x for x in (lengths, page_table) if x is not None]
    if k.stride() != v.stride() or any(x.stride(-1) != 1 for x in (k, summary, *tables)):
        raise ValueError(
            f"k.stride()={k.stride()} and v.stride()={v.stride()} must be equal, and the last dimension of all tensors "
            "dense; allocate k and v alike"
        )


def check_queries(queries: Tensor | None, k: Tensor, batch: int, query_pool: int) -> None:
    """Raise ValueError unless `queries` are those that a cache with keys k keeps for a router that pools `query_pool`."""
    check_query_pool(query_pool)
    if queries is None and query_pool == 1:
        return
    dtype = str(k.dtype).removeprefix("torch.")
    good = isinstance(queries, Tensor) and queries.ndim == 4 and queries.is_contiguous()
    if good and queries is not None:
        rows, heads = queries.shape[1:3]
        good = rows >= query_pool > 1 and heads % k.shape[2] == 0
        good = good and is_tensor(queries, k.dtype, [batch, rows, heads, k.shape[3]], k.device)
    if not good:
        raise ValueError(
            f"queries={describe(queries)} with query_pool={query_pool} must be None beside 1, and above it a dense {dtype} "
            f"[{batch}, at least query_pool, Hq, {k.shape[3]}] on {k.device} with Hq a multiple of {k.shape[2]}; "
            "see DashCache.contiguous"
        )


def check_routing_keys(routing_keys: Tensor | None, k: Tensor, batch: int, chunk_size: int) -> None:
    """Raise ValueError unless `routing_keys` are None, or those that a cache with keys k keeps of chunks that are not whole."""
    if routing_keys is None:
        return
    good = isinstance(routing_keys, Tensor) and routing_keys.ndim == 4 and routing_keys.is_contiguous()
    rows = routing_keys.shape[1] if good else 0
    if rows < chunk_size or not is_tensor(routing_keys, k.dtype, [batch, rows, *k.shape[2:]], k.device):
        raise ValueError(
            f"routing_keys={describe(routing_keys)} must be None, or a dense {str(k.dtype).removeprefix('torch.')} [{batch}, at "
            f"least chunk_size={chunk_size}, {k.shape[2]}, {k.shape[3]}] on {k.device}; see DashCache.contiguous"
        )
