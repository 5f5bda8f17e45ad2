"""What a chat template renders, and which of its tokens are answers."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dash_megatron.data.chat import PLAIN_TEMPLATE, ChatTemplate, encode_pair, read_template
from dash_megatron.data.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content if loop.last else m.content[:2] }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two  spaces?"},
    {"role": "assistant", "content": "\nYes, caf\u00e9."},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Bye"},
]


def write_chatml(folder: Path, chat_template: str | None = CHATML, prefix: bool = False) -> Path:
    """As Qwen's: a byte-level tokenizer.json whose turns end otherwise than its documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Rust(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    if prefix:
        rust.normalizer = normalizers.Prepend(" ")
        rust.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    rust.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|endoftext|>")
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder / "tokenizer.json"


@pytest.fixture
def chatml(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_chatml(tmp_path))


def parts(
    tokenizer: Tokenizer, ids: list[int], answers: list[bool], names: dict[int, str]
) -> list[tuple[str, bool]]:
    """Runs of tokens that are or are not learnt, as text."""
    runs: list[tuple[list[str], bool]] = []
    for token, learnt in zip(ids, answers, strict=True):
        if not runs or runs[-1][1] != learnt:
            runs.append(([], learnt))
        runs[-1][0].append(names.get(token) or tokenizer.decode_bytes([token]).decode("latin-1"))
    return [("".join(text), learnt) for text, learnt in runs]


def test_answers_run_from_where_generation_begins_to_the_token_that_ends_the_turn(chatml, tokenizer):
    template = ChatTemplate(CHATML, chatml)
    assert template.turn_end == chatml.special["<|im_end|>"] != chatml.eod
    found = template.encode([{**turn, "content": turn["content"].replace("\u00e9", "e")} for turn in TURNS])
    names = {token: name for name, token in chatml.special.items()}
    assert parts(chatml, *found, names) == [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo  spaces?<|im_end|>\n<|im_start|>assistant\n", False),
        ("\nYes, cafe.<|im_end|>", True),
        ("\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n", False),
        ("No.<|im_end|>", True),
        ("<|endoftext|>", False),
    ]  # fmt: skip
    # a sentencepiece model, whose end of sequence ends turns
    template = ChatTemplate(PLAIN_TEMPLATE, tokenizer)
    assert template.turn_end == tokenizer.eod
    found = template.encode(TURNS[1:5])
    assert [text for text, learnt in parts(tokenizer, *found, {tokenizer.eod: "END"}) if learnt] == [
        "Yes, caf\u00c3\u00a9.END",
        "No.END",
    ]
    assert found.ids[: found.answers.index(True)] == template.encode_question(TURNS[1:2])


def test_a_template_marks_answers_itself_and_may_shorten_what_was_said(chatml):
    names = {token: name for name, token in chatml.special.items()}
    found = ChatTemplate(MARKED, chatml).encode(TURNS[1:2] + TURNS[4:5] + TURNS[3:5])
    assert [text for text, learnt in parts(chatml, *found, names) if learnt] == [
        "No<|im_end|>",
        "No.<|im_end|>",
    ]


def test_the_end_of_a_turn_is_learnt_though_a_template_marks_what_stands_before_it(chatml):
    names = {token: name for name, token in chatml.special.items()}
    headed = MARKED.replace("{% generation %}{{", "{% generation %}{{ '<|im_start|>' +")
    for template, answer in ((MARKED, "No.<|im_end|>"), (headed, "<|im_start|>No.<|im_end|>")):
        found = ChatTemplate(template, chatml).encode(TURNS[3:5])
        assert [text for text, learnt in parts(chatml, *found, names) if learnt] == [answer]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("'<|im_end|>' + ", ""), "with no special token"),
        (CHATML.replace("{% for", "{{ raise_exception('never') }}{% for"), "does not render it .never"),
        ("{% for", "does not render it"),
        ("{{ messages | length }}<|im_end|>", "in answer 2 otherwise"),
    ],
)
def test_a_template_that_cannot_teach_answers_is_refused_at_once(template, message, chatml):
    with pytest.raises(ValueError, match=rf"some.jinja must render a question .*{message}"):
        ChatTemplate(template, chatml, "some.jinja")


def test_what_is_wrong_with_a_conversation_is_told(chatml):
    template = ChatTemplate(CHATML, chatml)
    empty = {"role": "assistant", "content": " \n"}
    for messages, message in [
        (TURNS[:2], "no message of role 'assistant'"),
        ([], "no message of role 'assistant'"),
        ([TURNS[1], empty], "message 2 is an empty answer"),
        ([{"role": "user", "content": "a<|im_end|>"}, TURNS[4]], "message 1 has the text '<|im_end|>'"),
    ]:
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            template.encode(messages)
    # as templates of models that think do: of earlier answers a part only
    forgetful = CHATML.replace("m.content +", "(m.content if loop.last else m.content[:2]) +")
    with pytest.raises(ValueError, match="in answer 2 otherwise when more messages follow"):
        ChatTemplate(forgetful, chatml).encode(TURNS[1:5])
    once = CHATML.replace(" + '<|im_end|>'", "").replace(
        "{% endif %}", "{% else %}{{ '<|im_end|>' }}{% endif %}"
    )
    message = r"ends answer 2 with '<\|im_end\|>' only where no message follows, .*; give a template that ends every answer"
    with pytest.raises(ValueError, match=message):
        ChatTemplate(once, chatml).encode(TURNS[1:5])
    assert ChatTemplate(once, chatml).encode(TURNS[1:3]).ids
    uneven = CHATML.replace("'<|im_end|>'", "('<|im_end|>' if m.content != 'No.' else '<|endoftext|>')")
    with pytest.raises(ValueError, match="otherwise than others; give a template that ends every answer"):
        ChatTemplate(uneven, chatml).encode(TURNS[3:5])


def test_prompt_and_completion_are_encoded_apart_and_the_end_is_learnt(tokenizer):
    found = encode_pair("def number_1", "(self): ", tokenizer)
    prompt, completion = tokenizer.encode("def number_1"), tokenizer.encode("(self): ")
    assert found == (
        [*prompt, *completion, tokenizer.eod],
        [False] * len(prompt) + [True] * (len(completion) + 1),
    )
    with pytest.raises(ValueError, match="'completion' is empty"):
        encode_pair("a", "\n", tokenizer)
    with pytest.raises(ValueError, match="'prompt' is empty"):
        encode_pair("", "a", tokenizer)


def test_names_of_special_tokens_in_a_pair_are_plain_text(tmp_path, tokenizer):
    for one in (
        tokenizer,
        Tokenizer(write_chatml(tmp_path / "a")),
        Tokenizer(write_chatml(tmp_path / "b", prefix=True)),
    ):
        for name in one.special:
            ids = encode_pair(f"a{name}b", f"{name}c{name}", one).ids
            assert not {*ids[:-1]} & {*one.special.values()}
            assert one.decode(ids) == f"a{name}b{name}c{name}"


def test_the_template_is_a_file_or_the_one_beside_the_tokenizer_or_a_plain_one(tmp_path, tokenizer):
    path = write_chatml(tmp_path / "a")
    assert read_template(path) == (CHATML, str(tmp_path / "a" / "chat_template.jinja"))
    (tmp_path / "a" / "chat_template.jinja").unlink()
    assert read_template(path)[0] == PLAIN_TEMPLATE == read_template(tokenizer.path)[0]
    config = tmp_path / "a" / "tokenizer_config.json"
    for value in (CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]):
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": value}))
        assert read_template(path) == (CHATML, str(config))
    for value in (3, [{"name": "default", "template": ["x"]}]):
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": value}))
        with pytest.raises(
            ValueError, match=r"has chat_template=.*, which must be text, or a list of mappings"
        ):
            read_template(path)
    (tmp_path / "own").write_text(MARKED)
    assert read_template(path, tmp_path / "own") == (MARKED, str(tmp_path / "own"))
    with pytest.raises(FileNotFoundError, match=r"--chat-template=.*none does not exist"):
        read_template(path, tmp_path / "none")


def test_a_text_that_continues_another_gets_no_space_before_it(tmp_path):
    spaced = Tokenizer(write_chatml(tmp_path, prefix=True))
    assert spaced.encode("a") == spaced.encode(" ")[:1] + spaced.encode("a", continues=True)
    assert spaced.encode("a b") == spaced.encode("a") + spaced.encode(" b", continues=True)
    whole = spaced.encode_rendered("<|im_start|>a<|im_end|>\n")
    assert whole == spaced.encode_rendered("<|im_start|>a") + spaced.encode_rendered(
        "<|im_end|>\n", continues=True
    )
