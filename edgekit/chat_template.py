"""Runs a chat template: Jinja in its sandbox, with the names that transformers gives, bounded.

The sandbox keeps a template from Python; the bounds keep it from running on or filling the
memory. The one module that imports jinja2.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from edgekit.errors import BadInput, BadModel, MissingRuntime

try:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.filters import do_format
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as cause:
    raise MissingRuntime("a chat template", "jinja2", extra="language") from cause

LINES = 1_000_000  # that a template may run: a second or two
CHARACTERS = 20_000_000  # that it may write
_WIDE = re.compile(r"[%{][^%{}]{0,20}\d{8}")  # a format with a width of eight digits


class _TooLong(Exception):
    """A template that goes beyond its bounds; derives from nothing that it could catch."""


class _Refused(Exception):
    """A template's own ``raise_exception``."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, where one step cannot make a text or a number beyond what may be written."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) * len(str(left)) > CHARACTERS:
            raise _TooLong
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and hasattr(other, "__len__") and one > CHARACTERS:
                    raise _TooLong
        if operator == "%":
            _refuse_format(left)
            _refuse_numbers(right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_numbers([*args, *kwargs.values()])
        own = getattr(args[1], "__wrapped__", args[1])  # the sandbox wraps a text's ``format``
        if getattr(own, "__name__", "") in ("format", "format_map"):
            _refuse_format(getattr(own, "__self__", None))
        return super().call(*args, **kwargs)


def _refuse_numbers(values: Iterable[Any]) -> None:
    """Raises ``_TooLong`` for a number that could be a width beyond what may be written."""
    if any(isinstance(value, int) and value > CHARACTERS for value in values):
        raise _TooLong


def _refuse_format(text: Any) -> None:
    if isinstance(text, str) and _WIDE.search(text):
        raise _TooLong


def _narrow(filter: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which takes no width beyond what may be written."""

    def narrow(*args: Any, **kwargs: Any) -> Any:
        _refuse_numbers([*args, *kwargs.values()])
        if filter is do_format:
            _refuse_format(args[0])
        return filter(*args, **kwargs)

    return narrow


class _Generation(Extension):
    """``{% generation %}``: marks what the assistant says, for training; here it is only said."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_template(
    template: str,
    messages: Sequence[Mapping[str, str]],
    generation: bool,
    today: Callable[[str], str],
) -> str:
    """The text; ``today`` answers the template's ``strftime_now``.

    Raises ``BadInput`` where the template refuses the conversation, ``BadModel`` where it is
    malformed, or goes on for more than ``LINES`` steps or ``CHARACTERS``.
    """
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    widening = {name: _narrow(environment.filters[name]) for name in ("center", "indent", "format")}
    environment.filters |= {**widening, "tojson": _as_json}
    environment.globals |= {"raise_exception": _refuse, "strftime_now": today}
    try:
        compiled = environment.from_string(template)
        values = {"messages": [dict(message) for message in messages], "tools": None}
        return _bounded(compiled, {**values, "add_generation_prompt": generation})
    except _Refused as cause:
        raise BadInput(f"the model's chat template refuses the conversation: {cause}") from cause
    except _TooLong as cause:
        raise BadModel(
            "the model's chat template does not end: it was stopped after "
            f"{LINES:,} steps or {CHARACTERS:,} characters. Give a plain prompt, without chat."
        ) from cause
    except jinja2.TemplateSyntaxError as cause:
        raise BadModel(
            f"the model's chat template is malformed in line {cause.lineno}: {cause.message}"
        ) from cause
    except Exception as cause:  # a template is a program, and may fail in every way
        raise BadModel(
            f"the model's chat template fails: {type(cause).__name__}: {cause}"
        ) from cause


def _bounded(template: jinja2.Template, values: dict[str, Any]) -> str:
    """Render and count the lines run, which is the one bound that holds for every kind of loop."""
    left = LINES

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooLong
        return count

    parts: list[str] = []
    written, before = 0, sys.gettrace()
    sys.settrace(count)
    try:
        for part in template.generate(values):
            parts.append(part)
            written += len(part)
            if written > CHARACTERS:
                raise _TooLong
    finally:
        sys.settrace(before)
    return "".join(parts)


def _refuse(message: str) -> None:
    raise _Refused(message)


def _as_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own would write ``<`` and ``'`` for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
