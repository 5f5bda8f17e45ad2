"""The leak check: whether documents packed into one sequence stay apart."""

from __future__ import annotations

import torch
from torch import Tensor

from dash_megatron.config import Config
from dash_megatron.doctor.runner import Finding
from dash_megatron.doctor.session import Session, deterministic_sums
from dash_megatron.doctor.small import NUM_DOCUMENTS, build, documents_batch, tiny_config, vocabulary_of
from dash_megatron.layers import DashGPTModel
from dash_megatron.layers.sharding import split_of
from dash_megatron.parallel import tensor_group
from dash_megatron.training.loss import token_losses

_CHANGED_DOCUMENT = 1
# Of a gradient's norm, where kernels add up keys' gradients in pieces whose borders all documents' lists decide: a leak is
# far above it.
_ROUNDING = {"fp32": 1e-5, "bf16": 1e-2}


def check_leak(session: Session) -> Finding:
    """Change one of four documents: losses and gradients of the others must keep every bit; on a GPU, gradients all but rounding.

    Run with the run's attention, precision and layout. Each document has token ids of its own, so that the rows of the
    embedding's gradient are those of single documents.
    """
    if not session.config.data.pack_documents:
        return Finding("skipped", {}, "data.pack_documents=false: documents attend to each other on purpose")
    config = tiny_config(session.config, precision=session.config.training.precision)
    with session.model_groups(config.parallel), deterministic_sums():
        model = build(config, session.device)
        if config.training.precision == "bf16":
            model.bfloat16()
        usual = _losses_and_gradients(model, config, (), session.device)
        changed = _losses_and_gradients(model, config, (_CHANGED_DOCUMENT,), session.device)
    problems = []
    for name in usual:
        for document in range(NUM_DOCUMENTS):
            before, after = usual[name][document], changed[name][document]
            allowed = _ROUNDING[config.training.precision] if before.is_cuda and name == "gradient" else 0.0
            if document != _CHANGED_DOCUMENT and not (before - after).norm() <= allowed * before.norm():
                most = (before - after).abs().max().item()
                problems.append(f"the {name} of document {document} changed by up to {most:.1e}")
    if not problems and session.config.parallel.context == session.config.parallel.tensor == 1:
        # the check sees nothing where nothing moves
        own = usual["loss"][_CHANGED_DOCUMENT], changed["loss"][_CHANGED_DOCUMENT]
        if torch.equal(*own):
            problems.append(f"the loss of document {_CHANGED_DOCUMENT} itself did not change")
    figures = {"documents": NUM_DOCUMENTS, "tokens": config.data.seq_length}
    if not problems:
        return Finding(figures=figures)
    return Finding(
        "failed",
        figures,
        f"with document {_CHANGED_DOCUMENT} changed, {'; '.join(problems)}; documents of a packed sequence see each other: "
        "train with data.pack_documents=false at best, and report this",
    )


def _losses_and_gradients(
    model: DashGPTModel, config: Config, changed: tuple[int, ...], device: torch.device
) -> dict[str, list[Tensor]]:
    """By document: this rank's losses, and its rows of the embedding's gradient, in float32."""
    assert config.model.vocab_size is not None
    model.zero_grad()
    batch = documents_batch(config, changed).to(device)
    loss_BN = token_losses(model, batch)
    (loss_BN * batch.loss_mask).sum().backward()
    weight = model.embedding.word_embeddings.weight
    first = tensor_group().rank() * len(weight) if split_of(weight) is not None else 0
    row = torch.arange(first, first + len(weight), device=device)
    losses, gradients = [], []
    for document in range(NUM_DOCUMENTS):
        ids = vocabulary_of(document, config.model.vocab_size)
        losses.append(loss_BN[(batch.tokens >= ids.start) & (batch.tokens < ids.stop)].detach().float())
        gradients.append(weight.grad[(row >= ids.start) & (row < ids.stop)].float())
    return {"loss": losses, "gradient": gradients}
