"""Text to tokens and back, by a model's own ``tokenizer.json``, through the package tokenizers."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from edgekit.errors import BadInput, DamagedFile, MissingRuntime

_HELD = 4  # tokens that may wait for the rest of a character: UTF-8 has four bytes at most


class Tokenizer:
    """A tokenizer from the text of a ``tokenizer.json``; padding and truncation are left off.

    Raises ``DamagedFile`` where the text is none, ``MissingRuntime`` without ``tokenizers``.
    """

    def __init__(self, text: str) -> None:
        try:
            import tokenizers
        except ImportError as cause:
            raise MissingRuntime("reading text", "tokenizers", extra="language") from cause
        try:
            self._own = tokenizers.Tokenizer.from_str(text)
            decoder = json.loads(text).get("decoder") or {}
        except Exception as cause:  # the package raises bare Exception for what it cannot read
            raise DamagedFile(
                f"the tokenizer cannot be read: {str(cause).splitlines()[0]}. It must be the text "
                "of a tokenizer.json; save it again with the tokenizers package."
            ) from cause
        self._own.no_truncation()
        self._own.no_padding()
        self._in_bytes = decoder.get("type") == "ByteLevel"
        # Control tokens: they steer the model and are no part of what it says.
        self._special = frozenset(
            id for id, token in self._own.get_added_tokens_decoder().items() if token.special
        )

    @property
    def size(self) -> int:
        """One more than the highest token: the rows of logits that mean something."""
        return 1 + max(self._own.get_vocab().values(), default=-1)

    @property
    def special(self) -> frozenset[int]:
        """Tokens that stand for no text, such as the end of a turn."""
        return self._special

    def token(self, text: str) -> int | None:
        """The token spelled ``text``, ``"<|im_end|>"``; None where there is none."""
        found: int | None = self._own.token_to_id(text)
        return found

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of ``text``; with ``special`` also those that the model wants around it.

        A control token spelled in the text becomes that token, as chat templates need. Raises
        ``BadInput`` for a text without tokens, or with half a surrogate pair.
        """
        if not isinstance(text, str):
            raise BadInput(f"a prompt is text; this is {type(text).__name__}.")
        if not text:
            raise BadInput("the prompt is empty; give it at least one character.")
        try:
            text.encode()
        except UnicodeEncodeError as cause:
            raise BadInput(
                f"the prompt is no valid Unicode: character {cause.start} is "
                f"U+{ord(text[cause.start]):04X}, half of a surrogate pair. Read it as UTF-8."
            ) from cause
        tokens: list[int] = self._own.encode(text, add_special_tokens=special).ids
        if not tokens:
            raise BadInput("the prompt has no token: the tokenizer drops all of its characters.")
        return tokens

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of ``tokens``, bytes that form no character as U+FFFD; with ``special`` the
        control tokens are spelled too. Raises ``BadInput`` for a number that is no token."""
        for token in tokens:
            self._check(token)
        text: str = self._own.decode(list(map(int, tokens)), skip_special_tokens=not special)
        return text

    def stream(self) -> TextStream:
        """A decoder that takes tokens one by one."""
        return TextStream(self)

    def bytes_of(self, token: int) -> bytes | None:
        """What a token of a byte-level vocabulary stands for; None in any other."""
        self._check(token)
        if not self._in_bytes:
            return None
        spelled: str | None = self._own.id_to_token(token)
        if spelled is None:
            return b""  # a number in a gap, as models pad their vocabulary
        try:
            return bytes(map(_BYTE_OF.__getitem__, spelled))
        except KeyError:  # an added token, spelled as it is
            return spelled.encode()

    def _check(self, token: Any) -> None:
        if not 0 <= int(token) < 1 << 32:
            raise BadInput(f"{token} is no token; tokens are 0 to {self.size - 1}.")


class TextStream:
    """Tokens one by one to text that never ends within a character.

    The texts joined are those of ``Tokenizer.decode`` of all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown: list[int] = []  # not byte-level: the tokens that the next ones depend on
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that ``token`` completes: "" while it ends within a character."""
        content = self._tokenizer.bytes_of(token)
        if token in self._tokenizer.special:
            return ""
        if content is not None:
            return self._characters.decode(content)
        self._held.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._held) < _HELD:
            return ""
        self._shown, self._held = self._held, []
        return text

    def flush(self) -> str:
        """What was held back, as U+FFFD; the stream starts anew."""
        text = self._characters.decode(b"", final=True)
        if self._held:
            text += self._new_text()
        self._characters.reset()
        self._shown, self._held = [], []
        return text

    def _new_text(self) -> str:
        # A decoder may strip the space before the first token of all: the tokens shown last
        # stand before the new ones, and their text is cut off again.
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes in printable characters, the other way round.

    Bytes that print in Latin-1 are themselves; the others, in their order, are U+0100 and on.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    spelled = {chr(byte): byte for byte in plain}
    return spelled | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _bytes_by_character()
