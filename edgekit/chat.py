"""Conversations to text: by a model's Jinja template, or by fixed texts cut from it beforehand.

``render`` runs the template as the package transformers does, in a sandbox with bounds, for a
template is a stranger's program. ``turns_of`` cuts from it, at export, the texts that stand
between the messages; a device then needs no Jinja. Importing this module loads neither.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime

from edgekit.errors import BadInput, BadModel, DamagedFile

Message = Mapping[str, str]  # "role": system, user or assistant; "content"

ROLES = ("system", "user", "assistant")
_THOUGHT = re.compile(r".*</think>\n*", re.DOTALL)
_TODAY = re.compile("\0([^\0]*)\0")  # a date in fixed texts: its format, for the day of the chat


def with_special_tokens(template: str, *, bos: str = "", eos: str = "") -> str:
    """The template with the names ``bos_token`` and ``eos_token`` set, so that it stands alone."""
    spelled = {"bos_token": bos, "eos_token": eos}
    sets = [
        f"{{% set {name} = {_quoted(text)} %}}\n"  # Jinja drops the line's end after a block
        for name, text in spelled.items()
        if text and name in template
    ]
    return "".join(sets) + template


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def render(template: str, messages: Sequence[Message], *, generation: bool = True) -> str:
    """The text of a conversation; with ``generation`` it ends where the model's turn begins.

    Raises ``BadInput`` for messages that are none, or that the template refuses; ``BadModel``
    for a template that is malformed or runs on; ``MissingRuntime`` without ``jinja2``.
    """
    from edgekit.chat_template import render_template

    check_messages(messages)
    return render_template(template, messages, generation, _today)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ``BadInput`` unless each message has a role and a text."""
    if not messages:
        raise BadInput("the conversation is empty; it has at least one message.")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadInput(f"message {index} has the role {role!r}; there are: {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise BadInput(f"message {index} has no text as its content.")


def _today(form: str) -> str:
    return datetime.now().strftime(form)


def _dated(text: str) -> str:
    return _TODAY.sub(lambda found: _today(found[1]), text)


# What templates do to a message before they write it: the name in ``Turns``, and the doing.
_CLEANED: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "trimmed": str.strip,
    # Qwen3 forgets what earlier answers thought.
    "unthought": lambda text: _THOUGHT.sub("", text),
}


@dataclass(frozen=True)
class Turns:
    """A chat template as fixed texts: what stands between the messages of a conversation.

    ``start`` is before the first user's message, the default system prompt in it; ``answer``
    between a user's and an assistant's, ``next`` between an assistant's and a user's,
    ``generate`` behind the last user's, where the model goes on. ``system`` are the texts before
    and behind a system prompt of one's own, up to the user's message; None where the template
    takes none. ``user`` and ``assistant`` say how their messages are cleaned: "", "trimmed" or
    "unthought".
    """

    start: str
    answer: str
    next: str
    generate: str
    system: tuple[str, str] | None = None
    user: str = ""
    assistant: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """What ``render`` gives for the template. Raises ``BadInput`` where turns do not
        alternate from the user's first to the user's last."""
        check_messages(messages)
        names = ("start", "answer", "next", "generate")
        today = {name: _dated(getattr(self, name)) for name in names}
        system = self.system and (_dated(self.system[0]), _dated(self.system[1]))
        return replace(self, **today, system=system)._written(messages)

    def _written(self, messages: Sequence[Message]) -> str:
        talk, text = list(messages), self.start
        if talk[0]["role"] == "system":
            if self.system is None:
                raise BadInput("this model takes no system prompt; begin with the user.")
            own = _CLEANED[self.user](talk.pop(0)["content"])
            text = self.system[0] + own + self.system[1]
        for index, message in enumerate(talk):
            role = ("user", "assistant")[index % 2]
            if message["role"] != role:
                raise BadInput(
                    f"turn {index} is the {message['role']}'s and would be the {role}'s: users "
                    "and assistants alternate, and the user begins."
                )
            cleaned = _CLEANED[getattr(self, role)](message["content"])
            text += cleaned + (self.answer if role == "user" else self.next)
        if len(talk) % 2 == 0:
            raise BadInput("the last message is not the user's, so there is nothing to answer.")
        return text.removesuffix(self.answer) + self.generate

    def to_json(self) -> dict[str, object]:
        """Every field."""
        return {**asdict(self), "system": None if self.system is None else list(self.system)}

    @classmethod
    def from_json(cls, value: object) -> Turns:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        try:
            fields = dict(value)  # type: ignore[call-overload]
            if fields["system"] is not None:
                first, second = fields["system"]
                fields["system"] = str(first), str(second)
            turns = cls(**fields)
        except (TypeError, KeyError, ValueError) as cause:
            raise DamagedFile(f"the fixed texts of a chat are malformed: {cause!r}.") from cause
        texts = [turns.start, turns.answer, turns.next, turns.generate, turns.user]
        if not all(isinstance(text, str) for text in [*texts, turns.assistant]):
            raise DamagedFile("the fixed texts of a chat are malformed: not all are texts.")
        if not {turns.user, turns.assistant} <= _CLEANED.keys():
            raise DamagedFile(f"the fixed texts of a chat are malformed: {turns.user!r}.")
        return turns


def turns_of(template: str) -> Turns | None:
    """The template as fixed texts, or None where it does more than that, or refuses to be read.

    Cut by rendering sentinels, then held against the template on conversations of many kinds.
    Raises ``MissingRuntime`` without ``jinja2``.
    """
    from edgekit.chat_template import render_template

    def rendered(messages: Sequence[Message], generation: bool = True) -> str:
        return render_template(template, messages, generation, lambda form: f"\0{form}\0")

    try:
        whole = rendered(_talk("EKU0", "EKA0", "EKU1"))
        start, rest = whole.split("EKU0")
        answer, rest = rest.split("EKA0")
        following, generate = rest.split("EKU1")
        system = _system_of(rendered)
        for user, assistant in itertools.product(("", "trimmed"), _CLEANED):
            turns = Turns(start, answer, following, generate, system, user, assistant)
            if all(rendered(talk) == turns._written(talk) for talk in _TRIALS):
                break
        else:
            return None
        if system is not None and not all(
            rendered(talk) == turns._written(talk) for talk in _SYSTEM_TRIALS
        ):
            turns = Turns(start, answer, following, generate, None, user, assistant)
    except (ValueError, BadInput, BadModel):  # not one sentinel where one is expected
        return None
    return turns


def _system_of(rendered: Callable[[Sequence[Message]], str]) -> tuple[str, str] | None:
    try:
        before, rest = rendered([_said("system", "EKS"), _said("user", "EKU")]).split("EKS")
        behind, _ = rest.split("EKU")
    except (ValueError, BadInput, BadModel):
        return None
    return before, behind


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _talk(*contents: str) -> list[Message]:
    roles = itertools.cycle(("user", "assistant"))
    return [_said(role, content) for role, content in zip(roles, contents, strict=False)]


_TRIALS = (
    _talk("What is a tide?"),
    _talk("a", "b", "c"),
    _talk("  a \n", "\n b  ", " c\n\n"),
    _talk("{{ x }}", "<b>&amp;'\"</b>", "{% if %}", "e", "f", "g", "h"),
    _talk("größer 海 🌊", "1\n\n2", "3", "\n4", "5\n"),
    _talk("a <think>b</think> c", "<think>\nd\n</think>\n\ne", "f", "g\n</think>\nh", "i"),
    _talk("tool", "system", "assistant", "user", "\\n"),
)
_SYSTEM_TRIALS = tuple(
    [_said("system", system), *talk]
    for system, talk in zip(
        ("Be brief.", " You are\n\na 🌊 'poet'\n", "{{ x }}"), _TRIALS, strict=False
    )
)
