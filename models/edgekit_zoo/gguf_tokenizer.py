"""The tokenizer, chat template and stop tokens of a GGUF file, as Hugging Face's files have them.

The pre-tokenizers are those of the models' own ``tokenizer.json``, by llama.cpp's name for each.
"""

from __future__ import annotations

import json
from typing import Any

from edgekit.errors import BadModel, UnknownName
from edgekit_zoo.gguf_container import Gguf

_CONTROL, _USER_DEFINED = 3, 4  # ggml's types of tokens
# Ends of an answer by their spelling, for files that name one of several.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")

_SPLIT_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_QWEN = _SPLIT_LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        **{"type": "ByteLevel", "add_prefix_space": False},
        **{"trim_offsets": True, "use_regex": use_regex},
    }


def _split(pattern: str) -> dict[str, Any]:
    return {
        **{"type": "Split", "pattern": {"Regex": pattern}},
        **{"behavior": "Isolated", "invert": False},
    }


# By llama.cpp's name: what is done to text, how it is cut, whether whole words skip the merges.
_PRE: dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]], bool]] = {
    "smollm": (None, [{"type": "Digits", "individual_digits": True}, _byte_level(True)], False),
    "llama-bpe": (None, [_split(_SPLIT_LLAMA), _byte_level(False)], True),
    "qwen2": ({"type": "NFC"}, [_split(_SPLIT_QWEN), _byte_level(False)], False),
}


def tokenizer_from_gguf(file: Gguf) -> str:
    """The text of a ``tokenizer.json``. Raises ``BadModel`` or ``UnknownName``."""
    kind, pre = _field(file, "model"), str(file.fields.get("tokenizer.ggml.pre", "default"))
    if kind != "gpt2":
        raise BadModel(
            f"{file.path} has a tokenizer of the kind {kind!r}; byte-level BPE, which GGUF calls "
            "'gpt2', is read. Load the model from its Hugging Face folder instead."
        )
    if pre not in _PRE:
        hint = f"It is how {file.path} cuts text; load the model from its Hugging Face folder."
        raise UnknownName("pre-tokenizer", pre, _PRE, hint=hint)
    normalizer, steps, whole_words = _PRE[pre]
    spelled = _spelled(file)
    types = [int(each) for each in _field(file, "token_type")]
    merges = [merge.split(" ", 1) for merge in _field(file, "merges")]
    if any(len(merge) != 2 for merge in merges) or len(types) != len(spelled):
        raise BadModel(f"the tokenizer in {file.path} is malformed; convert the model again.")
    content = {
        **{"version": "1.0", "truncation": None, "padding": None},
        "added_tokens": [
            _added(token, text, types[token] == _CONTROL)
            for token, text in enumerate(spelled)
            if types[token] in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _beginning(file, spelled),
        "decoder": _byte_level(True),
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False},
            **{"continuing_subword_prefix": None, "end_of_word_suffix": None},
            **{"byte_fallback": False, "ignore_merges": whole_words},
            "vocab": {text: token for token, text in enumerate(spelled)},
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False)


def _spelled(file: Gguf) -> list[str]:
    spelled: list[str] = _field(file, "tokens")
    if len(set(spelled)) < len(spelled):
        raise BadModel(f"two tokens in {file.path} are spelled alike; convert the model again.")
    return spelled


def _added(token: int, text: str, special: bool) -> dict[str, Any]:
    return {
        **{"id": token, "content": text, "single_word": False, "lstrip": False},
        **{"rstrip": False, "normalized": False, "special": special},
    }


def _beginning(file: Gguf, spelled: list[str]) -> dict[str, Any] | None:
    """What puts the first token of all before a text, where the model was trained so."""
    if not file.fields.get("tokenizer.ggml.add_bos_token", False):
        return None
    token = special_text(file, "bos")
    if not token:
        raise BadModel(f"{file.path} begins each text with a token that it does not name.")
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": token, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [spelled.index(token)], "tokens": [token]}},
    }


def special_text(file: Gguf, role: str) -> str:
    """How the ``"bos"`` or ``"eos"`` token is spelled, "" where there is none."""
    token = file.fields.get(f"tokenizer.ggml.{role}_token_id")
    spelled = _field(file, "tokens")
    return spelled[token] if isinstance(token, int) and 0 <= token < len(spelled) else ""


def stops_from_gguf(file: Gguf) -> tuple[int, ...]:
    """The tokens that end an answer, ascending. Raises ``BadModel`` where none is known."""
    spelled, types = _field(file, "tokens"), _field(file, "token_type")
    named = [file.fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    stops = {token for token in named if isinstance(token, int) and token < len(spelled)}
    stops |= {
        token for token, text in enumerate(spelled) if text in _ENDS and types[token] == _CONTROL
    }
    if not stops:
        raise BadModel(f"{file.path} names no token that ends an answer; convert it again.")
    return tuple(sorted(stops))


def template_from_gguf(file: Gguf) -> str:
    """The chat template, "" where there is none."""
    template = file.fields.get("tokenizer.chat_template", "")
    return template if isinstance(template, str) else ""


def _field(file: Gguf, name: str) -> Any:
    found = file.fields.get(f"tokenizer.ggml.{name}")
    if found is None:
        raise BadModel(
            f"{file.path} has no tokenizer: tokenizer.ggml.{name} is missing. Convert the model "
            "together with its tokenizer."
        )
    return found
