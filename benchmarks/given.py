"""Give the layers of a whole model choices like those of a trained one, where its own routers have random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.choices import chunk_size_of, layers_of, model_names
from benchmarks.persistence import local_chunks_of, make_selected

Attend = Callable[..., Any]


def models_like(chunk_size: int, local_chunks: int) -> list[str]:
    """Models of `benchmarks/choices` with such chunks.

    Raises:
        ValueError: there is none.
    """
    found = [
        name
        for name in model_names()
        if local_chunks_of(name) == local_chunks and chunk_size_of(name) == chunk_size
    ]
    if not found:
        sizes = sorted({(chunk_size_of(name), local_chunks_of(name)) for name in model_names()})
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

        route = dash.route

        def choose(routing_q: Tensor, summary: Tensor, *arguments: Any, **options: Any) -> Any:
            route(routing_q, summary, *arguments, **options)
            return self._choices(summary, sizes=arguments[2])

        with patch.object(dash, "route", choose):
            yield

    def _choices(self, summary: Tensor, sizes: Any) -> Any:
        from benchmarks.stages import as_routing

        depths, size = layers_of(self.model), chunk_size_of(self.model)
        like = depths[self.layer * len(depths) // self.num_layers]
        key = like, sizes.num_tokens
        if key not in self.made:
            tokens = sizes.num_tokens // self.rows
            past = make_selected(self.model, like, len(summary), tokens, size, summary.device, seed=like)
            self.made[key] = as_routing(past, sizes, self.rows)
        lists, tau, mean_log, selected = self.made[key]
        # a token at n has n // size chunks before its own
        available = (sizes.num_tokens // self.rows // size + 1) / 2
        self.densities[self.layer] = selected.double().mean().item() / available
        return lists, tau, mean_log, selected
