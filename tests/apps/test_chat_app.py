"""The chat app: one question, a conversation, a context that fills, and errors as sentences."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import edgekit

pytest.importorskip("onnxruntime")

APP = Path(__file__).parents[2] / "apps/chat/main.py"


@pytest.fixture(scope="module")
def app() -> Any:
    spec = importlib.util.spec_from_file_location("chat_app", APP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chat") / "tiny"
    edgekit.export("tiny-llama", targets=["onnxruntime"], precision="int4", context=160, out=out)
    return out


def test_one_question_is_answered_as_generate_does(
    app: Any, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main([str(bundle), "--ask", "What is a bundle?", "--limit", "20"]) == 0
    shown = capsys.readouterr()
    with edgekit.TextModel(bundle) as model:
        wanted = "".join(model.stream("What is a bundle?", chat=True, limit=20))
    assert shown.out == wanted
    assert "tokens/s" in shown.err


def test_it_needs_numpy_one_runtime_and_tokenizers_alone(bundle: Path) -> None:
    code = f"""
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "jinja2", "gguf", "safetensors", "PIL"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["main.py", {str(bundle)!r}, "--ask", "What is a bundle?", "--limit", "5"]
runpy.run_path({str(APP)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr


def test_a_conversation_goes_on_until_an_empty_line(
    app: Any,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a file?\nAnd a folder?\n\nnever read\n"))
    assert app.main([str(bundle), "--limit", "12"]) == 0
    assert capsys.readouterr().err.count("tokens/s") == 2


def test_where_the_context_is_full_the_oldest_turns_go(app: Any, bundle: Path) -> None:
    messages = [
        {"role": role, "content": f"{index} " + "word " * 20}
        for index, role in enumerate(["user", "assistant"] * 4 + ["user"])
    ]
    with edgekit.TextModel(bundle) as model:
        kept = app.fitting(model, messages, 40)
        assert len(model.encoded(kept, chat=True)) + 40 <= model.context
    assert kept == messages[-len(kept) :]
    assert kept[0]["role"] == "user"
    assert 1 <= len(kept) < len(messages)


def test_an_answer_that_is_stopped_is_kept(
    app: Any, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with edgekit.TextModel(bundle) as model:
        pieces = model.stream

        def stopped(*words: Any, **named: Any) -> Any:
            yield next(pieces(*words, **named))
            raise KeyboardInterrupt

        model.stream = stopped  # type: ignore[method-assign]
        question = [{"role": "user", "content": "What is a test?"}]
        said = app.answered(model, question, edgekit.Sampling(), 20)
    assert said[0] == question[0]
    assert said[1]["role"] == "assistant"
    assert "[stopped]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["/nowhere"], "there is no bundle folder"),
        (["{bundle}", "--ask", " "], "the prompt is empty"),
        (["{bundle}", "--ask", "x", "--temperature", "-2"], "temperature is -2"),
    ],
)
def test_errors_are_sentences(
    app: Any,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    assert app.main([word.format(bundle=bundle) for word in words]) == 2
    assert sentence in capsys.readouterr().err
