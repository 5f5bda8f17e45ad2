"""Chat templates on their way from a model through a run to its export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from dash_megatron.data.chat import MARKED_PLAIN_TEMPLATE, PLAIN_TEMPLATE, ChatTemplate, read_template
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.hf.export import export_run
from dash_megatron.hf.importing import import_folder
from tests.data.test_chat import CHATML, TURNS, write_chatml
from tests.hf.llamas import SHAPE
from tests.hf.test_tokenizers import write_llama2

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
    "' ' + m.content + ' ' + eos_token }}{% endfor %}"
)


def ids_of(folder: Path, messages: list[dict[str, str]], **settings: Any) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, return_dict=False, **settings)


def test_a_kept_template_is_that_of_training_and_export_and_generation_stops_at_its_turns(
    write_run: Callable[..., Any], tmp_path: Path
) -> None:
    """A byte-level tokenizer whose turns end with another token than its documents."""
    source = write_chatml(tmp_path / "source")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(source.parent)
    kept = import_folder(source.parent, tmp_path / "start").tokenizer
    assert kept is not None
    assert read_template(kept)[0] == CHATML
    config, _ = write_run("full", data={"tokenizer": str(kept)})
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    tokenizer = Tokenizer(kept)
    stops = GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
    assert stops == [tokenizer.eod, tokenizer.special["<|im_end|>"]]
    encoded = ChatTemplate(CHATML, tokenizer).encode(TURNS[:3])
    assert ids_of(tmp_path / "hf", TURNS[:3]) == [*encoded.ids[:-1], *tokenizer.encode("\n")]
    start = encoded.answers.index(True)
    assert ids_of(tmp_path / "hf", TURNS[:2], add_generation_prompt=True) == encoded.ids[:start]

    # a run that learnt with another template keeps that
    other = CHATML.replace("role + '\n'", "role + ': '").replace("assistant\n", "assistant: ")
    (Path(config.run_dir) / "chat_template.jinja").write_text(other)
    export_run(config.run_dir, tmp_path / "other", dtype="float32")
    assert AutoTokenizer.from_pretrained(tmp_path / "other").chat_template == other
    again = import_folder(tmp_path / "other", tmp_path / "again").tokenizer
    assert again is not None
    assert read_template(again)[0] == other


@pytest.mark.parametrize("template", [LLAMA2, PLAIN_TEMPLATE], ids=["llama2", "plain"])
def test_a_sentencepiece_model_keeps_its_template_and_reads_it_as_training_did(
    template: str, write_run: Callable[..., Any], tmp_path: Path
) -> None:
    write_llama2(tmp_path / "source")
    config_file = tmp_path / "source" / "tokenizer_config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "chat_template": template}))
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "source")
    kept = import_folder(tmp_path / "source", tmp_path / "start").tokenizer
    assert kept is not None
    assert kept.name == "tokenizer.model"
    assert read_template(kept)[0] == template
    config, _ = write_run("full", data={"tokenizer": str(kept)})
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    tokenizer = Tokenizer(kept)
    encoded = ChatTemplate(template, tokenizer).encode(TURNS[1:5])
    whole = ids_of(tmp_path / "hf", TURNS[1:5])
    assert whole[: len(encoded.ids)] == encoded.ids
    # what no template writes was never trained, and is nothing to begin texts with
    begins = AutoTokenizer.from_pretrained(tmp_path / "hf").bos_token_id
    assert begins == (tokenizer.bos if template == LLAMA2 else tokenizer.eod)
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == tokenizer.eod


def test_the_plain_template_of_an_export_marks_what_training_learnt(
    write_run: Callable[..., Any], tmp_path: Path
) -> None:
    config, _ = write_run("full")
    (Path(config.run_dir) / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    exported, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(str(config.data.tokenizer))
    learnt, marked = (ChatTemplate(text, ours) for text in (PLAIN_TEMPLATE, exported.chat_template))
    assert exported.chat_template == MARKED_PLAIN_TEMPLATE
    messages = [{"role": "system", "content": " Be  brief. "}, *TURNS[1:5]]
    encoded = learnt.encode(messages)
    # as TRL asks for assistant_only_loss
    found = exported.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    count = len(encoded.ids)
    assert found["input_ids"][:count] == encoded.ids
    assert found["assistant_masks"] == [*map(int, encoded.answers), *[0] * (len(found["input_ids"]) - count)]
    assert marked.encode(messages) == encoded
    assert marked.encode_question(messages[:2]) == learnt.encode_question(messages[:2])


def test_tokens_that_were_added_to_a_sentencepiece_model_come_along_with_the_template_that_writes_them(
    tmp_path: Path,
) -> None:
    """As models of others that were fine-tuned from Llama 2: tokenizer.model lacks what tokenizer.json has beyond it."""
    write_llama2(tmp_path / "source")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "source")
    alone = import_folder(tmp_path / "source", tmp_path / "alone").tokenizer
    assert alone == tmp_path / "alone" / "tokenizer.model"
    source = AutoTokenizer.from_pretrained(tmp_path / "source")
    source.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    source.chat_template = CHATML
    source.save_pretrained(tmp_path / "source")
    kept = import_folder(tmp_path / "source", tmp_path / "start").tokenizer
    assert kept == tmp_path / "start" / "tokenizer.json"
    template = ChatTemplate(read_template(kept)[0], Tokenizer(kept))
    assert template.turn_end == source.convert_tokens_to_ids("<|im_end|>")
    question = source.apply_chat_template(TURNS[:2], add_generation_prompt=True, return_dict=False)
    assert template.encode_question(TURNS[:2]) == question


def test_a_template_that_shows_no_end_of_turns_is_exported_with_a_warning(
    write_run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_chatml(tmp_path / "source", "{{ bos_token }}{{ messages[-1].content }}")
    settings = source.with_name("tokenizer_config.json")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "bos_token": "<|im_start|>"}))
    config, _ = write_run("full", data={"tokenizer": str(source)})
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    assert "generation will stop at the end of sequence only" in caplog.text
    # it still writes what it wrote
    written = ids_of(tmp_path / "hf", TURNS[:2])
    assert written == ids_of(source.parent, TURNS[:2])
    assert written[0] == Tokenizer(source).bos
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == Tokenizer(source).eod
