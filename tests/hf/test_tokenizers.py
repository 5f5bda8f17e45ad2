"""Tokenizers that models come with: a run encodes with them as transformers does, and exports them again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Rust
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dash_megatron.__main__ import main
from dash_megatron.data.chat import ChatTemplate
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.hf.export import export_run
from dash_megatron.hf.importing import import_folder
from dash_megatron.hf.tokenizer import export_tokenizer
from data_tools import tokenize_corpus
from tests.hf.llamas import SHAPE

# how Llama 3 and Qwen cut a text into words
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "", "a", "two  spaces ", "x\t\n\n y\r\n", "def f(self, value):\n    return [value[i] for i in range(10)]\n",
    "1234567890 3.14", "e\u0301 \u00e9 \uff21\ufb01", "\u4f60\u597d \U0001f600\U0001f468\u200d\U0001f469", "It's 'word 17', isn't it?",
]  # fmt: skip
# texts on which transformers 5 differs from the sentencepiece model that it loads: it adds no space before a space
LEADING_SPACE = [" a", "   def", " "]
NAMES = ["</s>x <s>", "<|end|>x <|begin|> <unk>"]


def lines() -> list[str]:
    """Something to train on."""
    return [f"    def word_{n}(self, value): return it's {n * 7919}  # caf\u00e9" for n in range(400)]


def write_llama2(folder: Path) -> None:
    """As Llama 2's: a sentencepiece model with bos and eos, no padding, and a space before every text."""
    folder.mkdir()
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines()), model_writer=file, model_type="bpe", vocab_size=315, byte_fallback=True,
            split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_byte_level(folder: Path, normalizer: Any = None) -> None:
    """As Llama 3's and, with NFC, Qwen's: byte-level BPE, special tokens after the vocabulary, bos before every text."""
    rust = Rust(models.BPE(ignore_merges=True))
    if normalizer is not None:
        rust.normalizer = normalizer
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        lines(), trainers.BpeTrainer(vocab_size=310, initial_alphabet=alphabet, show_progress=False)
    )
    rust.add_special_tokens(["<|begin|>", "<|end|>"])
    begin = rust.token_to_id("<|begin|>")
    rust.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<|begin|>", eos_token="<|end|>")
    fast.save_pretrained(folder)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "llama2": (write_llama2, "tokenizer.model"),
    "llama3": (write_byte_level, "tokenizer.json"),
    "qwen": (lambda folder: write_byte_level(folder, normalizers.NFC()), "tokenizer.json"),
}


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The file of a tokenizer, in a folder that transformers loads."""
    write, name = KINDS[request.param]
    write(tmp_path / "source")
    return tmp_path / "source" / name


def test_a_run_encodes_and_decodes_as_transformers(source: Path) -> None:
    ours, theirs = Tokenizer(source), AutoTokenizer.from_pretrained(source.parent)
    for text in [*TEXTS, *NAMES, *(line.strip() for line in lines()[:5])]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
        assert ours.encode(text.encode()) == ids
        assert ours.eod not in ids
    assert ours.eod == theirs.eos_token_id
    assert ours.bos == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)
    assert ours.decode([ours.bos, *ours.encode("a b"), ours.eod]) == "a b"


def test_a_sentencepiece_model_with_a_prefix_space_loses_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama2(tmp_path / "source")
    path = tmp_path / "source" / "tokenizer.model"
    ours, itself = Tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*TEXTS, *NAMES, *LEADING_SPACE]:
        assert ours.encode(text) == itself.encode(text)
        assert ours.decode(ours.encode(text)) == itself.decode(itself.encode(text)) == text
    for data in (b"\xff a", b" \xffa\xc3 b", b"\x80", "a \u2581 b".encode()):
        assert ours.decode_bytes(ours.encode(data)) == data
    whole = "".join(f"line {n}\n" for n in range(50))
    ids = ours.encode(whole)
    monkeypatch.setattr("dash_megatron.data.sentencepiece_model._MAX_SEGMENT_CHARACTERS", 20)
    assert ours.encode(whole) == ids  # later parts of a long text get no space


def test_data_is_tokenized_with_it_and_a_run_exports_it(
    source: Path,
    write_run: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(source.parent)
    assert main(["convert", "from-hf", str(source.parent), str(tmp_path / "start")]) == 0
    named = tmp_path / "start" / source.name
    assert f"data.tokenizer={named}\n" in capsys.readouterr().out
    ours = Tokenizer(named)
    assert ours.fingerprint == Tokenizer(source).fingerprint

    (tmp_path / "corpus").mkdir()
    documents = [f"{line} </s> <|end|>" for line in lines()[:20]]
    for number, text in enumerate(documents):
        (tmp_path / "corpus" / f"{number:02d}.txt").write_text(text)
    arguments = [
        "--input",
        str(tmp_path / "corpus"),
        "--tokenizer",
        str(named),
        "--output",
        str(tmp_path / "data"),
    ]
    assert not tokenize_corpus.main([*arguments, "--valid-fraction", "0", "--workers", "1"])
    facts = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert facts["tokenizer_fingerprint"] == ours.fingerprint
    assert facts["train_tokens"] == sum(len(ours.encode(text)) + 1 for text in documents)

    config, _ = write_run("full", data={"tokenizer": str(named)})
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.is_fast
    for text in [*TEXTS, *LEADING_SPACE, *NAMES]:
        ids = exported.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == ours.encode(text), text
    assert exported.eos_token_id == exported.pad_token_id == exported.bos_token_id == ours.eod
    # nothing that training did not read, though nobody asks for none
    assert exported("a b").input_ids == ours.encode("a b")
    padded = exported(["a", "a b c d"], padding=True, add_special_tokens=False)
    assert padded["attention_mask"][0][0] == 0, "padding stands in front"
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "hf")
    exec((tmp_path / "hf" / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert names["inputs"].input_ids[0].tolist() == ours.encode("The beginning")
    drawn = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert drawn["eos_token_id"] == ours.eod
    assert drawn["suppress_tokens"] == list(range(ours.vocab_size, 320))
    again = import_folder(tmp_path / "hf", tmp_path / "again").tokenizer
    assert again is not None
    assert Tokenizer(again).fingerprint == ours.fingerprint
    # a chat template writes what it wrote before, though nothing else begins a text with it
    assert Tokenizer(again).bos == ours.bos
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    export_tokenizer(
        Tokenizer(again), tmp_path / "chat", LlamaConfig(), ChatTemplate(template, Tokenizer(again))
    )
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    chatting = AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert chatting.apply_chat_template(turns, return_dict=False)[0] == ours.bos


def _rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no eos": (lambda folder: _rewrite(folder / "tokenizer_config.json", eos_token=None), "end of sequence"),
    "other eos": (
        lambda folder: _rewrite(folder / "tokenizer_config.json", eos_token="<e>"),
        "has no token <e>",
    ),
    "no file beside": (lambda folder: (folder / "tokenizer_config.json").unlink(), "end of sequence"),
    "not json": (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "not valid JSON"),
    "no mapping": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "must hold a mapping, not list",
    ),
    "number for eos": (
        lambda folder: _rewrite(folder / "tokenizer_config.json", eos_token={"id": 3}),
        "has eos_token={'id': 3}, which must be text; copy",
    ),
    "list for same data": (
        lambda folder: _rewrite(folder / "tokenizer_config.json", same_data_as=["a"]),
        r"has same_data_as=\['a'\], which must be a mapping; copy",
    ),
    "not a tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
    "lower case": (
        lambda folder: _rewrite(folder / "tokenizer.json", normalizer={"type": "Lowercase"}),
        "must keep text as it is",
    ),
    "eos no special token": (
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace('"special": true', '"special": false')
        ),
        "must mark <|end|> as special",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_tokenizer_json_that_data_cannot_be_made_with_is_refused(case: str, tmp_path: Path) -> None:
    change, message = DAMAGED[case]
    write_byte_level(tmp_path / "source")
    change(tmp_path / "source")
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        Tokenizer(tmp_path / "source" / "tokenizer.json")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "source")
    assert import_folder(tmp_path / "source", tmp_path / "start").tokenizer is None


def test_an_export_pads_with_the_end_that_special_tokens_map_json_names_or_with_what_its_tokenizer_names(
    tmp_path: Path,
) -> None:
    folder, out = tmp_path / "source", tmp_path / "hf"
    write_byte_level(folder)
    LlamaConfig().save_pretrained(out)
    _rewrite(folder / "tokenizer_config.json", pad_token="<|begin|>", padding_side="right")
    export_tokenizer(Tokenizer(folder / "tokenizer.json"), out, LlamaConfig())
    exported = AutoTokenizer.from_pretrained(out)
    assert (exported.pad_token, exported.padding_side) == ("<|begin|>", "right")

    for each in (folder, out):
        (each / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    export_tokenizer(Tokenizer(folder / "tokenizer.json"), out, LlamaConfig())
    exported = AutoTokenizer.from_pretrained(out)
    assert (exported.pad_token, exported.padding_side) == ("<|end|>", "left")


def test_texts_are_cut_at_the_trained_length_and_not_at_that_of_the_tokenizer_s_former_model(
    write_run: Callable[..., Any], tmp_path: Path
) -> None:
    write_byte_level(tmp_path / "source")
    _rewrite(tmp_path / "source" / "tokenizer_config.json", model_max_length=77)
    for name, data in (("json", {"tokenizer": str(tmp_path / "source" / "tokenizer.json")}), ("model", {})):
        config, _ = write_run("full", data={"seq_length": 96, **data})
        export_run(config.run_dir, tmp_path / name, dtype="float32")
        exported = AutoTokenizer.from_pretrained(tmp_path / name)
        assert exported.model_max_length == 96
        assert len(exported("x y" * 100).input_ids) > 96
        assert len(exported("x y" * 100, truncation=True).input_ids) == 96
        shutil.rmtree(config.run_dir)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("named", "pads"), [("<|begin|>", "<|begin|>"), ("<|pad|>", "<|end|>"), (None, "<|end|>")]
)
def test_an_exported_model_pads_as_its_tokenizer_with_what_that_names_if_training_had_it(
    named: str | None, pads: str, file: str, write_run: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    write_byte_level(source)
    if not (source / file).exists():
        (source / file).write_text("{}")
    _rewrite(source / file, pad_token=named)
    config, _ = write_run("full", data={"tokenizer": str(source / "tokenizer.json")})
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.pad_token == pads
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / "hf" / name).read_text())
        assert settings["pad_token_id"] == exported.pad_token_id
        assert settings["eos_token_id"] == exported.eos_token_id


def test_a_tokenizer_that_transformers_cannot_load_is_named_by_the_export(tmp_path: Path) -> None:
    write_byte_level(tmp_path / "source")
    # as special_tokens_map.json has it, but not tokenizer_config.json
    _rewrite(tmp_path / "source" / "tokenizer_config.json", eos_token={"content": "<|end|>"})
    LlamaConfig().save_pretrained(tmp_path / "hf")
    with pytest.raises(
        ValueError, match=r"cannot load data.tokenizer=\S+tokenizer.json .*TypeError: .*; correct tok"
    ):
        export_tokenizer(Tokenizer(tmp_path / "source" / "tokenizer.json"), tmp_path / "hf", LlamaConfig())
