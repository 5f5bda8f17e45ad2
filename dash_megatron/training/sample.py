"""Continue a prompt with a run's newest checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from dash_megatron.checkpoint.weights import load_weights, stored_tokenizer, whole_model
from dash_megatron.data.chat import ChatTemplate, template_of_run
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.layers import DashGPTModel

_LEAST_TEMPERATURE = 1e-3
"""Logits divided by less than this could leave float32."""


def sample_from_run(
    run_dir: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    seed: int = 0,
    step: int | None = None,
    chat: bool = False,
) -> str:
    """Load a run's weights and give back the text that follows `prompt`.

    Args:
        run_dir: the run's folder.
        prompt: any text; empty starts a document.
        max_new_tokens: stop after so many tokens, at the end of the document or of the turn, or at `data.seq_length`.
        temperature: divides the logits, at least 0.001; 0 takes the argmax.
        seed: fixes the draw; in [0, 2**63).
        step: which checkpoint; None: the newest.
        chat: `prompt` is what a user says, as the run's chat template renders it, and the text is the answer.

    Raises:
        FileNotFoundError: the run has no such checkpoint.
        ValueError: an argument breaks a rule, the tokenizer was replaced, or there is no chat template.
    """
    if temperature != 0 and not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be 0, which takes the argmax, or at least {_LEAST_TEMPERATURE} and finite"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must lie in [0, 2**63); pick another")
    config, step, weights = load_weights(run_dir, step)
    tokenizer = stored_tokenizer(config, step)
    with whole_model(config, weights) as (model, _):
        ends: list[int] = []
        if chat:
            text = template_of_run(run_dir, tokenizer.path)
            if text is None:
                raise ValueError(
                    f"--chat: {run_dir} learnt no conversations, and its tokenizer has no chat template"
                )
            template = ChatTemplate(text, tokenizer)
            ends.append(template.turn_end)
            ids = template.encode_question([{"role": "user", "content": prompt}])
        else:
            ids = tokenizer.encode(prompt) or [tokenizer.eod]
        room = config.data.seq_length - len(ids)
        if room < 1:
            raise ValueError(
                f"prompt has {len(ids)} tokens and must have fewer than data.seq_length={config.data.seq_length}"
            )
        generator = torch.Generator().manual_seed(seed)
        new = generate(model, ids, min(max_new_tokens, room), temperature, tokenizer, generator, ends)
    # decoded with what stands before them: alone, the first might lose a space
    return tokenizer.decode([*ids, *new])[len(tokenizer.decode(ids)) :]


@torch.no_grad()
def generate(
    model: DashGPTModel,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    tokenizer: Tokenizer,
    generator: torch.Generator,
    ends: Sequence[int] = (),
) -> list[int]:
    """Draw tokens that follow `ids`, each by a forward pass over the whole sequence.

    Args:
        model: on any device.
        ids: at least one token.
        max_new_tokens: stop after so many.
        temperature: divides the logits; 0 takes the argmax.
        tokenizer: tells the vocabulary's size and the end-of-document token, at which drawing stops.
        generator: of the CPU.
        ends: other tokens at which drawing stops.

    Returns:
        The new tokens, without the one at which drawing stopped.
    """
    device = next(model.parameters()).device
    sequence = list(ids)
    for _ in range(max_new_tokens):
        tokens = torch.tensor([sequence], device=device)
        logits = model(tokens, torch.arange(len(sequence), device=device)[None])[0, -1].float().cpu()
        logits = logits[: tokenizer.vocab_size]  # rows that only pad the table are never drawn
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token in (tokenizer.eod, *ends):
            break
        sequence.append(token)
    return sequence[len(ids) :]
