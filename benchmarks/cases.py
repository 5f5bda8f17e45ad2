"""The cases that the attention benchmark times, and how their queries select."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.choices import chunk_size_of, layers_of, model_names
from benchmarks.stages import Case

CASES = [
    Case("16K 32/2 25%", 16384, topics=4),
    Case("64K 32/2 24%", 65536, topics=4),
    Case("64K 32/2 10%", 65536, topics=10),
    Case("64K 32/8 10%", 65536, topics=10, kv_heads=8),
    Case("64K 32/32 10%", 65536, topics=10, kv_heads=32),
    Case("128K 32/2 10%", 131072, topics=10),
    Case("128K 32/2 2.6%", 131072, topics=40),
    Case("16K 32/2 100%", 16384, scaling_factor=1e-3),
]
# other inputs: nothing may fall off a cliff
MORE_CASES = [
    Case("64K 32/2 2.6%", 65536, topics=40),
    Case("16K 32/2 10%", 16384, topics=10),
    Case("32K 32/2 10%", 32768, topics=10),
    Case("64K 32/2 runs of 8", 65536, topics=10, run=8),
    Case("64K 32/2 runs of 1", 65536, topics=10, run=1),
    Case("64K 32/2 unstructured", 65536, structured=False, scaling_factor=6.0),
    Case("64K 32/4 10%", 65536, topics=10, kv_heads=4),
    Case("64K 32/1 10%", 65536, topics=10, kv_heads=1),
    Case("64K 32/8 24%", 65536, topics=4, kv_heads=8),
    Case("128K 32/8 10%", 131072, topics=10, kv_heads=8),
    *(
        Case(
            f"{name}, heads of 64, chunks of {size}",
            tokens,
            topics=topics,
            kv_heads=8,
            head_dim=64,
            chunk_size=size,
        )
        for name, tokens, topics in (("16K 32/8 25%", 16384, 4), ("64K 32/8 10%", 65536, 10))
        for size in (64, 32)
    ),
]
TINY_CASES = [
    Case(
        f"{tokens} tokens, {topics} topics",
        tokens,
        heads=2,
        kv_heads=1,
        topics=topics,
        head_dim=16,
        chunk_size=16,
    )
    for tokens, topics in ((48, 2), (64, 2), (64, 10))
]
# of the models with chunks of their own: their shape, and topics that make the replaced router's lists about as long
TRAINED = Case("", 16384, heads=8, head_dim=64)
TRAINED_TINY = replace(TRAINED, tokens=256, heads=2, head_dim=16)


def trained_cases(like: Case) -> list[Case]:
    """A case for each model and layer of `benchmarks/choices`."""
    cases = []
    for model in model_names():
        topics, size = 4 if model.startswith("d25") else 10, chunk_size_of(model)
        own = replace(like, topics=topics, chunk_size=size, model=model)
        cases += [replace(own, name=f"{model}, layer {layer}", layer=layer) for layer in layers_of(model)]
    return cases


def with_routing(case: Case, routing: str) -> Case:
    """A case whose queries select as told: `independent`, `runs:N`, `unstructured` or `trained:MODEL:LAYER`."""
    name = f"{case.name}, {routing}"
    if routing.startswith("trained:"):
        _, model, layer = routing.split(":")
        return replace(case, name=name, model=model, layer=int(layer), chunk_size=chunk_size_of(model))
    if routing == "unstructured":
        return replace(case, name=name, structured=False, scaling_factor=6.0)
    return replace(case, name=name, run=1 if routing == "independent" else int(routing.removeprefix("runs:")))
