"""Compile the kernels of an attention layer for a GPU that need not be there, with the launches that it would get.

`python -m tests.ops.compile_for NAME CAPABILITY SHARED_BYTES MULTIPROCESSORS SHAPE...` prints for each kernel its name and the bytes of
shared memory that a program of it takes. Nothing is computed: a launch compiles, and leaves its tensors as they are.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dash_megatron.ops.kernels import configs, cross_entropy, decode, rotary, swiglu
from dash_megatron.ops.kernels import dash as kernels
from dash_megatron.ops.types import Router

# Head dim and router.
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "recipe": (64, {"chunk_size": 32, "local_chunks": 4, "query_pool": 16, "pool_heads": True}),
    "default": (128, {"chunk_size": 64, "scaling_factor": 1.0}),
}


def compile_only(name: str, capability: int, shared_bytes: int, multiprocessors: int) -> None:
    """From now on a launch compiles its kernel for that GPU, and what is compiled is printed once."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    configs.device_limits = decode.device_limits = lambda device: (name, shared_bytes, multiprocessors)
    compiled = set()
    run = JITFunction.run

    def compile_one(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, warmup=True, **kwargs)
        if kernel.hash not in compiled:
            compiled.add(kernel.hash)
            print(self.fn.__name__, kernel.metadata.shared, flush=True)

    JITFunction.run = compile_one
    # what is not computed is 0, and so in bounds where Python looks at it
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like


def attention(
    head_dim: int, settings: dict[str, Any], heads: int = 8, kv_heads: int = 2, tokens: int = 512
) -> None:
    """Forward and backward of two packed documents, and one token for a short and a long cache."""
    q = torch.zeros(1, tokens, heads, head_dim, dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.zeros(1, tokens, kv_heads, head_dim, dtype=torch.bfloat16, requires_grad=True) for _ in "kv"
    )
    w = torch.zeros(kv_heads, head_dim, dtype=torch.bfloat16, requires_grad=True)
    router = Router(**{"scaling_factor": torch.ones(kv_heads, requires_grad=True), **settings})
    bounds = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    out, _ = kernels.dash_attention_triton(q, k, v, w, router, bounds)
    out.sum().backward()
    head_scaling, numbers = router.split()
    for chunks in (64, 4096):
        keys = torch.zeros(1, chunks * router.chunk_size, kv_heads, head_dim, dtype=torch.bfloat16)
        summary = torch.zeros(1, chunks, kv_heads, head_dim, dtype=torch.float16)
        lengths = torch.tensor([keys.shape[1]], dtype=torch.int32)
        routing_q = None if router.query_pool == 1 else q[0, :1].detach()
        with torch.no_grad():
            decode.decode(
                q[0, :1], keys, keys, summary, lengths, None, routing_q, head_scaling, **numbers._asdict()
            )


def others() -> None:
    """Rotary embedding, activation and loss."""
    heads = torch.zeros(64, 1, 2, 6, 64, dtype=torch.bfloat16)
    parts = tuple(torch.zeros(64, 1, 2 * n * 64, dtype=torch.bfloat16) for n in (4, 1, 1))
    for back in (False, True):
        rotary.turn(heads, parts, torch.zeros(2, 64, 1, 32), [4, 1, 1], back)
    halves = torch.zeros(64, 256, dtype=torch.bfloat16)
    swiglu.swiglu_backward(halves, swiglu.swiglu_forward(halves))
    logits, labels = torch.zeros(64, 1000, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int64)
    lse, _ = cross_entropy.score_labels(logits, labels)
    cross_entropy.replace_by_gradient(logits, labels, lse, lse)


if __name__ == "__main__":
    compile_only(sys.argv[1], *map(int, sys.argv[2:5]))
    for shape in sys.argv[5:]:
        attention(*SHAPES[shape])
    others()
