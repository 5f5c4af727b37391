"""Templates run in bounds, and fixed texts say what the template would."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.chat import Message, Turns, render, turns_of, with_special_tokens
from edgekit.errors import BadInput, BadModel, DamagedFile

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Trims, begins with the first token of all, and says the date.
LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|system|>Today: " + strftime_now("%d %b %Y") + "\\n" + system + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
# Drops what earlier answers thought.
QWEN = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# A first turn unlike the others, a refusal of systems, turns that must alternate.
MISTRAL = """{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{- message.content + eos_token }}{%- endif %}
{%- endfor %}"""
TEMPLATES = {
    "smol": SMOL,
    "llama": with_special_tokens(LLAMA, bos="<|begin|>", eos="<|eot|>"),
    "qwen": QWEN,
    "mistral": with_special_tokens(MISTRAL, eos="</s>"),
}
HELLO = [{"role": "user", "content": "Hello"}]


def talk(*contents: str) -> list[Message]:
    roles = ("user", "assistant") * len(contents)
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]


def test_a_template_is_rendered_as_its_model_was_trained() -> None:
    assert render(SMOL, talk("Hi", "Yes?", "Why?")) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert not render(SMOL, HELLO, generation=False).endswith("assistant\n")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("contents", [["a"], [" a\n", "b </think>\nc", "<d>'é'"]])
def test_a_template_says_what_it_says_in_transformers(name: str, contents: list[str]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    said = [dict(message) for message in talk(*contents)]
    theirs: Any = render_jinja_template(
        [said], chat_template=TEMPLATES[name], add_generation_prompt=True
    )
    assert [render(TEMPLATES[name], said)] == theirs[0]


def test_blocks_leave_no_blank_lines() -> None:
    lines = ["{% for m in messages %}", "  {% if true %}", "{{ m.content }}", "  {% endif %}"]
    template = "\n".join([*lines, "{% endfor %}"])
    assert render(template, HELLO) == "Hello\n"


def test_json_is_written_as_for_a_model_not_as_for_a_page() -> None:
    assert render("{{ {'a': '<é\\'>'} | tojson }}", HELLO) == '{"a": "<é\'>"}'
    assert render("{{ [1] | tojson(indent=2) }}", HELLO) == "[\n  1\n]"


def test_marks_for_training_and_breaks_of_loops_are_understood() -> None:
    marked = "{% generation %}{{ m.content }}{% endgeneration %}{% break %}"
    template = "{% for m in messages %}" + marked + "{% endfor %}"
    assert render(template, talk("a", "b", "c")) == "a"


def test_special_tokens_are_set_in_the_template_itself() -> None:
    template = with_special_tokens(
        "  {% if true %}\n{{ bos_token }}|{{ eos_token }}{% endif %}", bos='<"\\>', eos="</s>"
    )
    assert render(template, HELLO) == '<"\\>|</s>'
    assert with_special_tokens(SMOL, bos="<s>") == SMOL


@pytest.mark.parametrize("name", TEMPLATES)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_fixed_texts_say_what_the_template_says(name: str, contents: list[str]) -> None:
    contents = contents[: len(contents) - 1 + len(contents) % 2]
    turns = CUT[name]
    assert turns.render(talk(*contents)) == render(TEMPLATES[name], talk(*contents))


@pytest.mark.parametrize("name", ["smol", "llama", "qwen"])
@pytest.mark.parametrize("system", ["Be brief.", " {{ a }}\n"])
def test_fixed_texts_take_a_system_prompt(name: str, system: str) -> None:
    asked = [{"role": "system", "content": system}, *talk("a", "b\n", " c")]
    assert CUT[name].render(asked) == render(TEMPLATES[name], asked)


def test_what_earlier_answers_thought_is_forgotten() -> None:
    asked = talk("a", "<think>\nhm\n</think>\n\nyes", "b <think>c</think>")
    assert CUT["qwen"].render(asked) == render(QWEN, asked)
    assert "hm" not in CUT["qwen"].render(asked)


def test_the_date_is_that_of_the_chat_not_of_the_export() -> None:
    turns = CUT["llama"]
    assert datetime.now().strftime("%d %b %Y") in turns.render(HELLO)
    assert "%d %b %Y" in turns.start
    later = replace(turns, start=turns.start.replace("%d %b %Y", "year %Y"))
    assert f"year {datetime.now():%Y}" in later.render(HELLO)
    # A user who writes what stands for a date gets it as it is.
    assert "\0%Y\0" in turns.render(talk("a\0%Y\0b"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages[-2:] %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ 'x' if m.content == 'tool' }}{{ m.content }}{% endfor %}",
        "{% if %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_that_does_more_than_wrap_has_no_fixed_texts(template: str) -> None:
    assert turns_of(template) is None


def test_a_template_that_refuses_systems_has_fixed_texts_without_them() -> None:
    assert CUT["mistral"].system is None
    with pytest.raises(BadInput, match="takes no system prompt"):
        CUT["mistral"].render([{"role": "system", "content": "x"}, *HELLO])


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "the conversation is empty"),
        ([{"role": "robot", "content": "x"}], "message 0 has the role 'robot'"),
        ([{"role": "user", "content": None}], "message 0 has no text"),
        ([{"role": "user"}], "message 0 has no text"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[Message], sentence: str) -> None:
    for attempt in (CUT["smol"].render, lambda these: render(SMOL, these)):
        with pytest.raises(BadInput, match=sentence):
            attempt(messages)


def test_fixed_texts_want_users_and_assistants_in_turn() -> None:
    with pytest.raises(BadInput, match="turn 1 is the user's and would be the assistant's"):
        CUT["smol"].render(HELLO * 3)
    with pytest.raises(BadInput, match="the last message is not the user's"):
        CUT["smol"].render(talk("a", "b"))
    with pytest.raises(BadInput, match="the last message is not the user's"):
        CUT["smol"].render([{"role": "system", "content": "alone"}])


def test_a_templates_own_refusal_is_passed_on() -> None:
    with pytest.raises(BadInput, match="refuses the conversation: roles must alternate"):
        render(TEMPLATES["mistral"], HELLO * 2)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in 'ab' * 99999 %}{% for b in 'ab' * 99999 %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}" + "x" * 400 + "{% endfor %}",
        "{% set x = 'a' * 10 ** 10 %}",
        "{% set x = 10 ** 10 * 'a' %}",
        "{% set x = 9 ** (9 ** 9) %}",
        "{% set x = 'x' | center(999999999) %}",
        "{% set x = 'x' | indent(999999999, true) %}",
        "{% set x = 'x'.ljust(999999999) %}",
        "{% set x = '%999999999d' % 1 %}",
        "{% set x = '%*d' % (999999999, 1) %}",
        "{% set x = '{:>999999999}'.format(1) %}",
        "{% set x = '%999999999d' | format(1) %}",
    ],
)
def test_a_template_that_runs_on_is_stopped(template: str) -> None:
    # Nothing is written in most of them: they must stop before they fill the memory.
    started, tracer = time.perf_counter(), sys.gettrace()
    with pytest.raises(BadModel, match="does not end: it was stopped after"):
        render(template, HELLO)
    assert time.perf_counter() - started < 10
    assert sys.gettrace() is tracer


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("a\n{% if %}", "malformed in line 2"),
        ("{% for m in messages %}", "malformed in line 1"),
        ("{% include 'x' %}", "fails: TypeError: no loader"),
        ("{% import '/etc/passwd' as x %}", "fails: TypeError: no loader"),
        ("{{ messages.__class__.__mro__ }}", "fails: SecurityError"),
        ("{% set x = cycler.__init__.__globals__ %}", "fails: SecurityError"),
        ("{{ messages.append(1) }}", "fails: SecurityError"),
        ("{{ messages[7].content }}", "fails: UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
        ("{{ 1 // 0 }}", "fails: ZeroDivisionError"),
    ],
)
def test_a_template_that_is_wrong_is_a_sentence(template: str, sentence: str) -> None:
    with pytest.raises(BadModel, match=f"the model's chat template (is )?{sentence}"):
        render(template, HELLO)


def test_a_users_words_are_never_taken_for_a_format() -> None:
    words = "%99999999d {:>99999999} 999999999"
    template = "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].content) }}"
    assert render(template, talk(words)) == words


@pytest.mark.parametrize("name", TEMPLATES)
def test_fixed_texts_survive_a_file(name: str) -> None:
    assert Turns.from_json(json.loads(json.dumps(CUT[name].to_json()))) == CUT[name]


@pytest.mark.parametrize(
    "change",
    [{"start": 1}, {"system": ["a"]}, {"user": "shouted"}, {"more": ""}, {"system": 3}],
)
def test_malformed_fixed_texts_are_named_so(change: dict[str, object]) -> None:
    with pytest.raises(DamagedFile, match="the fixed texts of a chat are malformed"):
        Turns.from_json({**CUT["smol"].to_json(), **change})
    with pytest.raises(DamagedFile, match="the fixed texts of a chat are malformed"):
        Turns.from_json("text")


def test_a_device_chats_by_fixed_texts_without_jinja() -> None:
    code = (
        "import json, sys\n"
        "sys.modules['jinja2'] = None\n"
        "from edgekit.chat import Turns, render\n"
        "turns = Turns.from_json(json.loads(sys.argv[1]))\n"
        "assert turns.render([{'role': 'user', 'content': 'Hi'}]).count('Hi') == 1\n"
        "try: render('', [{'role': 'user', 'content': 'Hi'}])\n"
        "except ImportError as cause: assert 'edgekit-sdk[language]' in str(cause)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(CUT["smol"].to_json())], check=True)


def cut(template: str) -> Turns:
    turns = turns_of(template)
    assert turns is not None
    return turns


CUT = {name: cut(template) for name, template in TEMPLATES.items()}
