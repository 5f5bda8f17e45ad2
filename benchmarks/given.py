"""Give the layers of a whole model choices like those of a trained one, where its own routers have random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.choices import chunk_size_of, layers_of, model_names, router_of
from benchmarks.persistence import make_selected

Attend = Callable[..., Any]


def models_like(chunk_size: int, local_chunks: int) -> list[str]:
    """Models of `benchmarks/choices` with such chunks.

    Raises:
        ValueError: there is none.
    """
    found = [
        name
        for name in model_names()
        if router_of(name).local_chunks == local_chunks and chunk_size_of(name) == chunk_size
    ]
    if not found:
        sizes = sorted({(chunk_size_of(name), router_of(name).local_chunks) for name in model_names()})
        raise ValueError(
            f"attention.chunk_size={chunk_size}, attention.local_chunks={local_chunks} must be one of the pairs {sizes} of "
            "benchmarks/choices, for choices like a trained model's; set both as one of them"
        )
    return found


class Given:
    """Choices in place of what routers select; every router runs all the same."""

    def __init__(self, model: str, num_layers: int, rows: int = 1) -> None:
        """Of `model` in `benchmarks/choices`, for `num_layers` layers and batches of `rows` documents of whole chunks."""
        self.model, self.num_layers, self.rows = model, num_layers, rows
        # once: a file is milliseconds, in which the GPU would have nothing to do
        self.depths, self.chunk_size = layers_of(model), chunk_size_of(model)
        self.layer = 0
        self.made: dict[tuple[int, int], Any] = {}
        self.densities: dict[int, float] = {}
        """Of the layers that have attended, own chunks included."""

    def of_layer(self, number: int, attend: Attend) -> Attend:
        """A layer's attention, as it must be called."""

        def attend_as(*arguments: Any, **options: Any) -> Any:
            self.layer = number
            return attend(*arguments, **options)

        return attend_as

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Within, routers make way for choices of the model's layer at the same relative depth."""
        from dash_megatron.ops.kernels import dash
        from dash_megatron.ops.kernels import route as kernel

        route = kernel.route

        def choose(routing_q: Tensor, summary: Tensor, *arguments: Any, **options: Any) -> Any:
            routed = route(routing_q, summary, *arguments, **options)
            sizes = arguments[2]
            # where ranks share a sequence, their chunks have numbers
            number = arguments[5] if len(arguments) > 5 else None
            lists, *others = self._choices(summary, sizes, number)
            if sizes.lists_are_bounded:
                # a run's lists have room for every chunk, which the router has just made
                chunk, log_prior = routed[0].chunk, routed[0].log_prior
                chunk[: len(lists.chunk)], log_prior[: len(lists.chunk)] = lists.chunk, lists.log_prior
            else:
                chunk, log_prior = lists.chunk.clone(), lists.log_prior.clone()
            lists = type(lists)(chunk, log_prior, lists.offset.clone(), lists.counts.clone())
            return lists, *(x.clone() for x in others)

        # one way looks the router up in its module, the other has imported it
        with patch.object(dash, "route", choose), patch.object(kernel, "route", choose):
            yield

    @property
    def num_bytes(self) -> int:
        """Memory that the choices made so far hold, which a run would not."""
        made = [x for lists, *others in self.made.values() for x in (*lists, *others)]
        return sum(x.numel() * x.element_size() for x in made)

    def _choices(self, summary: Tensor, sizes: Any, number: Tensor | None) -> Any:
        from benchmarks.stages import as_routing

        size = self.chunk_size
        like = self.depths[self.layer * len(self.depths) // self.num_layers]
        key = like, sizes.num_tokens
        if key not in self.made:
            if number is None:
                tokens = sizes.num_tokens // self.rows
                past = make_selected(self.model, like, len(summary), tokens, size, summary.device, seed=like)
            else:
                past = self._of_chunks(like, summary, number, size)
                if past.shape[1] != sizes.num_tokens:
                    raise ValueError(
                        f"a rank's {sizes.num_tokens} tokens must be whole chunks of {size} for given choices"
                    )
            self.made[key] = as_routing(past, sizes, self.rows)
        *_, selected = self.made[key]
        if number is None and self.layer not in self.densities:
            # a token at n has n // size chunks before its own; once only: it makes the host wait for the GPU
            available = (sizes.num_tokens // self.rows // size + 1) / 2
            self.densities[self.layer] = selected.double().mean().item() / available
        return self.made[key]

    def _of_chunks(self, like: int, summary: Tensor, number: Tensor, size: int) -> Tensor:
        """Choices of the tokens of some chunks of one document, bool [key/value heads, tokens, chunks of the document]."""
        if self.rows > 1:
            raise ValueError(
                f"training.micro_batch={self.rows} must be 1 for given choices where ranks share sequences"
            )
        heads, chunks, _ = summary.shape
        parts = []
        for head in range(heads):
            # those of all tokens of all heads may not fit
            one = make_selected(
                self.model, like, 1, chunks * size, size, summary.device, seed=like * heads + head
            )
            parts.append(one.view(chunks, size, chunks)[number.long()].flatten(0, 1))
        return torch.stack(parts)
