"""Text in and out, against transformers and against decoding all tokens at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from moec.runtime.errors import ChatTemplateFails, NoChatTemplate, NoTokenizer, WrongTokenizer
from moec.runtime.tokenizer import Tokenizer

TEXT = "Grüße, 世界! 🦜 def f(x):\n\treturn x"


@pytest.fixture(scope="module")
def folder(toy: Path) -> Path:
    return toy / "tokenizer"


@pytest.fixture(scope="module")
def byte_level(folder: Path) -> Tokenizer:
    return Tokenizer(folder, "toy.moec")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer in SentencePiece's manner: word starts are marked and unknown characters become bytes."""
    fast = Fast(models.BPE(unk_token="<unk>", byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    fast.train_from_iterator(["a world of words"] * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    data = json.loads(fast.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] == "<unk>"
    target = tmp_path_factory.mktemp("sentences")
    (target / "tokenizer.json").write_text(json.dumps(data))
    return Tokenizer(target, "sentences.moec")


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_text_goes_round(byte_level: Tokenizer) -> None:
    assert byte_level.decode(byte_level.encode(TEXT)) == TEXT


def test_ids_equal_those_of_transformers(folder: Path, byte_level: Tokenizer) -> None:
    assert byte_level.encode(TEXT) == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def test_chat_equals_that_of_transformers(folder: Path, byte_level: Tokenizer) -> None:
    message = [{"role": "user", "content": TEXT}]
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert byte_level.render_chat(message) == expected
    assert byte_level.encode_chat(TEXT) == reference(expected, add_special_tokens=False)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=40))
def test_streamed_bytes_join_to_the_whole_text(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(byte_level, ids)) == byte_level.decode(ids)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=20))
def test_streamed_characters_appear_as_soon_as_they_are_whole(byte_level: Tokenizer, text: str) -> None:
    if "\N{REPLACEMENT CHARACTER}" in text:
        return
    pieces = streamed(byte_level, byte_level.encode(text))
    assert [piece for piece in pieces if piece] == list(text)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="a world é世🦜", max_size=20))
def test_streaming_keeps_the_spaces_between_words(sentences: Tokenizer, text: str) -> None:
    ids = sentences.encode(text)
    assert "".join(streamed(sentences, ids)) == sentences.decode(ids)


def test_a_start_token_that_the_configuration_asks_for(folder: Path, tmp_path: Path, byte_level: Tokenizer) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = {"add_bos_token": True, "bos_token": {"content": "<eos>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path, "toy.moec")
    assert tokenizer.encode_counting("ab") == ([256, *byte_level.encode("ab")], 0)


def test_bytes_of_the_first_token(byte_level: Tokenizer) -> None:
    assert byte_level.encode_counting("ab")[1] == 1
    assert byte_level.encode_counting("")[1] == 0


def spoil(file: str, content: str, encoding: str = "utf-8") -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content, encoding)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), NoTokenizer),
        (spoil("tokenizer.json", "{}"), WrongTokenizer),
        (spoil("tokenizer_config.json", "{"), WrongTokenizer),
        (spoil("tokenizer_config.json", "[]"), WrongTokenizer),
        (spoil("tokenizer_config.json", "[" * 100_000), WrongTokenizer),
        (spoil("tokenizer_config.json", "{}"), NoChatTemplate),
        (spoil("chat_template.jinja", "Grüße", "latin-1"), WrongTokenizer),
        (spoil("chat_template.jinja", "{{ raise_exception('no') }}"), ChatTemplateFails),
        (spoil("chat_template.jinja", "{% if %}"), ChatTemplateFails),
        (spoil("chat_template.jinja", "{{ messages.append(1) }}"), ChatTemplateFails),
        (
            spoil(
                "chat_template.jinja", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
            ),
            ChatTemplateFails,
        ),
        (spoil("chat_template.jinja", "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"), ChatTemplateFails),
        (spoil("chat_template.jinja", "{{ 'a' * 99999999999 }}"), ChatTemplateFails),
        (spoil("chat_template.jinja", "{{ 9 ** 9 ** 9 }}"), ChatTemplateFails),
        (spoil("chat_template.jinja", "{{ 1 // 0 }}"), ChatTemplateFails),
        (
            spoil("chat_template.jinja", "{{ range(99999) | map('string') | map('upper') | list | length * 'x' }}"),
            ChatTemplateFails,
        ),
        (spoil("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), ChatTemplateFails),
    ],
)
def test_wrong_files_are_one_line(
    folder: Path, tmp_path: Path, change: Callable[[Path], object], kind: type[Exception]
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    with pytest.raises(kind) as caught:
        Tokenizer(tmp_path, "toy.moec").encode_chat("hello")
    assert "\n" not in str(caught.value)


def test_named_templates(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    templates = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d{{ messages[0]['content'] }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer(tmp_path, "toy.moec").render_chat([{"role": "user", "content": "x"}]) == "dx"
