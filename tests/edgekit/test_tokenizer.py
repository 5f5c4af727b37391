"""Text becomes tokens by the model's own tokenizer.json, and comes back whole, piece by piece."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from edgekit.errors import BadInput, DamagedFile, MissingRuntime
from edgekit.tokenizer import Tokenizer

CONTROL = ["<|end|>", "<|user|>"]


def byte_level(**changes: Any) -> str:
    """Three control tokens, the 256 bytes and two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [*CONTROL, *alphabet, "th", "the"]
    library = Library(
        models.BPE({text: id for id, text in enumerate(spelled)}, [("t", "h"), ("th", "e")])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    for name, value in changes.items():
        setattr(library, name, value)
    return library.to_str()


def sentencepiece() -> str:
    """As Llama 2's: words begin with a mark, and what is unknown is spelled in bytes."""
    spelled = ["<unk>", "▁", "h", "i", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {text: id for id, text in enumerate(spelled)}
    library = Library(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return library.to_str()


TOKENIZER = Tokenizer(byte_level())


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.add, tokens), stream.flush()]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_comes_back_whole_and_streamed(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    pieces = streamed(TOKENIZER, tokens)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 259)))
def test_any_tokens_stream_to_what_they_decode_to(tokens: list[int]) -> None:
    assert "".join(streamed(TOKENIZER, tokens)) == TOKENIZER.decode(tokens)


def test_half_a_character_waits_for_its_rest() -> None:
    assert streamed(TOKENIZER, TOKENIZER.encode("a🌊b")) == ["a", "", "", "", "🌊", "b", ""]


def test_half_a_character_at_the_end_comes_with_the_flush() -> None:
    assert streamed(TOKENIZER, TOKENIZER.encode("aé")[:-1]) == ["a", "", "\ufffd"]


def test_a_stream_starts_anew_after_its_flush() -> None:
    stream = TOKENIZER.stream()
    stream.add(TOKENIZER.encode("é")[0])
    assert stream.flush() == "\ufffd"
    assert stream.add(TOKENIZER.encode("a")[0]) == "a"


@given(st.text("hi 🌊é", min_size=1))
def test_a_vocabulary_of_words_streams_too(text: str) -> None:
    tokenizer = Tokenizer(sentencepiece())
    tokens = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_control_tokens_in_a_text_become_tokens_and_are_not_said() -> None:
    tokens = TOKENIZER.encode("<|user|>the<|end|>")
    assert tokens == [1, TOKENIZER.token("the"), 0]
    assert TOKENIZER.decode(tokens) == "the"
    assert TOKENIZER.decode(tokens, special=True) == "<|user|>the<|end|>"
    assert "".join(streamed(TOKENIZER, tokens)) == "the"
    assert TOKENIZER.special == {0, 1}


def test_a_first_token_is_added_only_where_the_model_says_so() -> None:
    beginning = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[(CONTROL[1], 1)]
    )
    tokenizer = Tokenizer(byte_level(post_processor=beginning))
    assert tokenizer.encode("the") == [1, tokenizer.token("the")]
    assert tokenizer.encode("the", special=False) == [tokenizer.token("the")]
    assert TOKENIZER.encode("the") == [TOKENIZER.token("the")]


def test_padding_and_truncation_of_the_file_are_left_off() -> None:
    library = Library.from_str(byte_level())
    library.enable_truncation(2)
    library.enable_padding(length=8)
    assert len(Tokenizer(library.to_str()).encode("abcde")) == 5


def test_the_size_counts_added_tokens_and_gaps() -> None:
    assert TOKENIZER.size == 260
    content = json.loads(byte_level())
    content["model"]["vocab"]["far"] = 400
    assert Tokenizer(json.dumps(content)).size == 401
    assert Tokenizer(json.dumps(content)).bytes_of(399) == b""


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(BadInput, match="the prompt is empty"):
        TOKENIZER.encode("")


def test_a_prompt_that_loses_all_its_characters_is_refused() -> None:
    tokenizer = Tokenizer(byte_level(normalizer=normalizers.Strip()))
    with pytest.raises(BadInput, match="drops all of its characters"):
        tokenizer.encode("   ")


def test_half_a_surrogate_pair_is_refused_with_its_place() -> None:
    with pytest.raises(BadInput, match=r"character 2 is U\+D83C"):
        TOKENIZER.encode("ab\ud83c")


def test_bytes_are_no_prompt() -> None:
    with pytest.raises(BadInput, match="this is bytes"):
        TOKENIZER.encode(b"abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_a_number_that_is_no_token_is_refused(token: int) -> None:
    with pytest.raises(BadInput, match="is no token; tokens are 0 to 259"):
        TOKENIZER.decode([token])
    with pytest.raises(BadInput, match="is no token"):
        TOKENIZER.stream().add(token)


@pytest.mark.parametrize("text", ["a" * 10**6, "the 🌊 " * 200_000])
def test_a_million_characters_are_tokens_within_seconds(text: str) -> None:
    started = time.perf_counter()
    assert len(TOKENIZER.encode(text)) >= len(text) / 2
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "Nonsense"}}', "null"])
def test_a_text_that_is_no_tokenizer_is_named_so(text: str) -> None:
    with pytest.raises(DamagedFile, match="the tokenizer cannot be read"):
        Tokenizer(text)


def test_without_the_library_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingRuntime, match=r"pip install 'edgekit-sdk\[language\]'"):
        Tokenizer(byte_level())
