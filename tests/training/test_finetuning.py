"""Supervised fine-tuning: answers alone are learnt, and the exported model answers and stops."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dash_megatron.__main__ import main
from dash_megatron.config import config_from_dict
from dash_megatron.data.batches import PackedBatch, pack_samples
from dash_megatron.data.chat import PLAIN_TEMPLATE
from dash_megatron.data.dataset import build_dataset
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.hf.export import export_run
from dash_megatron.layers import init_weights
from dash_megatron.training.loss import global_target_tokens, share_of_global_mean
from dash_megatron.training.metrics import read_metrics
from tests.hf.conftest import training_model
from tests.tiny import WORDS, answer_about
from tests.training.test_resume import run_of
from tests.training.workers import train_all


@pytest.fixture
def batch(tiny_config: dict[str, Any], tiny_chats: Path, tmp_path: Path) -> PackedBatch:
    """Two rows of conversations."""
    tokenizer = Tokenizer(tiny_config["data"]["tokenizer"])
    settings = {"seq_length": 256, "num_samples": 2, "seed": 0, "tokenizer": tokenizer}
    rows = build_dataset([str(tiny_chats / "train")], **settings, cache_dir=tmp_path / "cache")
    return pack_samples([rows[0], rows[1]], tokenizer.eod)


def test_neither_loss_nor_gradients_depend_on_what_should_follow_within_questions(
    batch: PackedBatch, tiny_config: dict[str, Any]
) -> None:
    with training_model(config_from_dict(tiny_config)) as model:
        init_weights(model, seed=1, std=0.1)

        def step(batch: PackedBatch) -> tuple[float, list[torch.Tensor]]:
            model.zero_grad()
            loss = share_of_global_mean(model, batch, global_target_tokens([batch], torch.device("cpu")))
            loss.backward()
            return loss.item(), [p.grad.clone() for p in model.parameters()]

        loss, gradients = step(batch)
        other = torch.where(batch.loss_mask, batch.labels, (batch.labels + 7) % 300)
        assert (other != batch.labels).sum() > 100
        same, same_gradients = step(replace(batch, labels=other))
        assert loss == same
        assert all(map(torch.equal, gradients, same_gradients))
        other = torch.where(batch.loss_mask, (batch.labels + 7) % 300, batch.labels)
        assert step(replace(batch, labels=other))[0] != loss
        # a batch without answers moves nothing
        nothing, none = step(replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)))
        assert nothing == 0
        assert all(not gradient.any() for gradient in none)


def test_what_is_learnt_are_the_answers_and_the_ends_of_their_turns(
    batch: PackedBatch, tiny_config: dict[str, Any]
) -> None:
    tokenizer = Tokenizer(tiny_config["data"]["tokenizer"])
    learnt = batch.labels[batch.loss_mask].tolist()
    ends = [place + 1 for place, token in enumerate(learnt) if token == tokenizer.eod]
    found = [learnt[start : end - 1] for start, end in pairwise([0, *ends])]
    assert len(found) > 5
    assert ends[-1] == len(learnt)
    assert {tokenizer.decode(answer) for answer in found} <= set(map(answer_about, WORDS))


def test_a_fine_tuned_model_answers_in_form_from_the_run_and_from_its_export(
    tiny_config: dict[str, Any],
    tiny_chats: Path,
    run_processes: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = run_of(tiny_config, tmp_path / "base", training={"steps": 2})
    tuned = run_of(
        tiny_config,
        tmp_path / "tuned",
        data={"train": [str(tiny_chats / "train")], "valid": [str(tiny_chats / "valid")]},
        training={"steps": 120, "micro_batch": 4, "init_from": str(tmp_path / "base")},
        optimizer={"lr": 5e-3},
        schedule={"kind": "cosine"},
        evaluation={"every": 60, "samples": 5},
    )
    run_processes(1, train_all, [(base, None), (tuned, None)])
    lines = read_metrics(tmp_path / "tuned")
    assert lines[-1]["valid_loss"] < 0.1 < lines[0]["loss"]
    assert all(0 < line["target_tokens"] < 4 * 128 / 3 for line in lines)
    assert (tmp_path / "tuned" / "chat_template.jinja").read_text() == PLAIN_TEMPLATE

    export_run(tmp_path / "tuned", tmp_path / "hf", dtype="float32")
    assert "apply_chat_template" in (tmp_path / "hf" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for word in ("def", "query", "range"):
        question = [{"role": "user", "content": f"what is {word}3?"}]
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
        assert output[-1] == tokenizer.eos_token_id  # and not by the length
        answer = tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == answer_about(word)
    capsys.readouterr()
    asked = ["sample", str(tmp_path / "tuned"), "--chat", "--prompt", "what is range3?", "--temperature", "0"]
    assert main(asked) == 0
    assert capsys.readouterr().out == f"{answer_about('range')}\n"
    asked[1] = str(tmp_path / "base")
    assert main(asked) == 2
    assert "learnt no conversations" in capsys.readouterr().err
