"""Each call that build_engine.py makes must exist in every TensorRT it is for.

NVIDIA's own bindings are imported, so names and signatures are the real ones. They link to
libraries that only a machine with a GPU has any use for; stubs with the few symbols stand in, for
nothing is called. What the script uses is read from its text: a new use is checked without a word
here, as long as it is written ``trt.X.Y`` or on a variable that RECEIVERS names.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

import edgekit_tensorrt.build_engine as script
from edgekit_tensorrt.bindings import MODULES

ROOT = Path(__file__).parents[2]
FOLDER = os.environ.get("TENSORRT_BINDINGS", "")
REQUIRED = "tensorrt" in os.environ.get("EDGEKIT_REQUIRED", "").split(",")
VERSIONS = ("10.3.0", "10.13.3.9", "11.4.0.106")
# What the script calls its objects, and the class that TensorRT has for each.
RECEIVERS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "error": "ParserError",
    "tensor": "ITensor",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL"),
    *("getPluginRegistry", "getBuilderPluginRegistry", "getNvOnnxParserVersion"),
    "initLibNvInferPlugins",
)
# Prints every name of the module ``trt``: those of classes with whether it is callable, and doc.
DUMP = """
import json
def members(value):
    names = [name for name in dir(value) if hasattr(value, name)]
    values = {name: getattr(value, name) for name in names}
    return {name: [callable(each), each.__doc__ or ""] for name, each in values.items()}
names = {name: getattr(trt, name) for name in dir(trt)}
print(json.dumps({n: members(v) if isinstance(v, type) else None for n, v in names.items()}))
"""
Api = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """``owner.name``, or a call of it; "" owns the module's own names."""

    owner: str
    name: str
    line: int = 0
    called: tuple[int, tuple[str, ...]] | None = None  # positional arguments, keywords
    guards: tuple[tuple[str, str], ...] = ()  # what hasattr asked for first

    def __str__(self) -> str:
        return f"line {self.line}: {self.owner or 'trt'}.{self.name}"


class Uses(ast.NodeVisitor):
    """Collects what a script uses of TensorRT."""

    def __init__(self) -> None:
        self.found: list[Use] = []
        self._guards: list[tuple[str, str]] = []

    def visit_If(self, node: ast.If) -> None:
        guard = self._guard(node.test)
        self.visit(node.test)
        self._guards += guard
        for statement in node.body:
            self.visit(statement)
        del self._guards[len(self._guards) - len(guard) :]
        for statement in node.orelse:
            self.visit(statement)

    def _guard(self, test: ast.expr) -> list[tuple[str, str]]:
        if isinstance(test, ast.Call) and ast.unparse(test.func) == "hasattr":
            owner = ast.unparse(test.args[0]).removeprefix("trt").removeprefix(".")
            return [(owner, str(ast.literal_eval(test.args[1])))]
        return []

    def visit_Call(self, node: ast.Call) -> None:
        keywords = tuple(keyword.arg or "**" for keyword in node.keywords)
        if isinstance(node.func, ast.Attribute):
            self._add(node.func, (len(node.args), keywords))
        for child in (*node.args, *(keyword.value for keyword in node.keywords), node.func):
            if child is not node.func or not isinstance(child, ast.Attribute):
                self.visit(child)
            else:
                self.visit(child.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._add(node, None)
        self.visit(node.value)

    def _add(self, node: ast.Attribute, called: tuple[int, tuple[str, ...]] | None) -> None:
        owner = ast.unparse(node.value).removeprefix("self._")
        if owner.partition(".")[0] == "trt":
            owner = owner.removeprefix("trt").removeprefix(".")
        elif owner in RECEIVERS:
            owner = RECEIVERS[owner]
        else:
            return
        self.found.append(Use(owner, node.attr, node.lineno, called, tuple(self._guards)))


def uses_of(text: str) -> list[Use]:
    uses = Uses()
    uses.visit(ast.parse(text))
    return uses.found


def wanted() -> list[Use]:
    """All that the script uses: what its text says, and what it looks up by a name's text."""
    by_text = [
        *(Use("DataType", name) for name in script.DTYPES),
        *(Use("ILogger", name) for name in ("ERROR", "INTERNAL_ERROR")),
        Use("ComputeCapability", "CURRENT", guards=(("", "ComputeCapability"),)),
        # Asked for with hasattr, and still there in every version: without the first, the
        # precisions that the model is written in would not hold.
        Use("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        Use("BuilderFlag", "TF32"),
    ]
    return uses_of(inspect.getsource(script)) + by_text


def exists(api: Api, owner: str, name: str) -> bool:
    return name in (api if not owner else api.get(owner) or {})


def complaints(api: Api, uses: Sequence[Use]) -> list[str]:
    """What of ``uses`` the bindings do not have, or take otherwise."""
    found = []
    for use in uses:
        if not all(exists(api, *guard) for guard in use.guards):
            continue
        if not exists(api, use.owner, use.name):
            found.append(f"{use} does not exist")
        elif use.owner or use.called:
            found += _misused(api, use)
    return found


def _misused(api: Api, use: Use) -> Iterator[str]:
    """A call that does not fit, a method that is not called, a property that is."""
    owner, name, called = use.owner, use.name, use.called
    if not owner:  # a class, called to make one
        owner, name = name, "__init__"
    is_callable, doc = api[owner][name]
    if called is None:
        if is_callable:
            yield f"{use} is a method and is not called"
        return
    if not is_callable:
        yield f"{use} is no method and is called"
        return
    count, keywords = called
    if use.name == "__init__":  # called on the class, with self as the first argument
        count -= 1
    forms = [*signatures(name, doc)]
    if not any(fits(form, count, keywords) for form in forms):
        yield f"{use} is called with {count} and {keywords}; it takes {forms}"


def signatures(name: str, doc: str) -> Iterator[list[str]]:
    """The parameters of each form that the doc of a method lists, without self."""
    for text in re.findall(rf"^(?:\d+\. )?{name}\((.*)\) ->", doc, re.MULTILINE):
        if text.startswith("self"):
            yield _split(text)[1:]


def _split(text: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def fits(form: Sequence[str], count: int, keywords: Sequence[str]) -> bool:
    names = [parameter.partition(":")[0] for parameter in form]
    given = {*names[:count], *keywords}
    needed = {n for n, parameter in zip(names, form, strict=True) if "=" not in parameter}
    return count <= len(names) and set(keywords) <= set(names[count:]) and needed <= given


def absent(reason: str) -> NoReturn:
    if REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)


def dump(load: str, environment: dict[str, str] | None = None) -> Api:
    """The names of the module that ``load`` binds to ``trt``, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", load + DUMP],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    api: Api = json.loads(done.stdout)
    return api


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Api]:
    compiler = shutil.which("gcc")
    if not FOLDER:
        absent(
            "TENSORRT_BINDINGS names no folder; run: python tools/fetch_tensorrt_bindings.py FOLDER"
        )
    if compiler is None:
        pytest.skip("gcc is not installed; on Debian run: apt-get install gcc")
    stubs = tmp_path_factory.mktemp("stubs")
    source = stubs / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for major in ("10", "11"):
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            name = f"lib{library}.so.{major}"
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}"]
            subprocess.run([*command, "-o", str(stubs / name), str(source)], check=True)

    @cache
    def read(version: str) -> Api:
        folder = Path(FOLDER).resolve() / version
        if not folder.is_dir() and sys.version_info >= (3, 13):
            pytest.skip(f"NVIDIA has no bindings of TensorRT {version} for this Python")
        if not folder.is_dir():
            absent(f"{folder} is missing; run: python tools/fetch_tensorrt_bindings.py {FOLDER}")
        variables = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(stubs)}
        load = "import tensorrt_bindings as trt\n"
        api = dump(load + f"assert trt.__version__.startswith({version[:5]!r})\n", variables)
        # The distribution ``tensorrt`` re-exports it; what it adds is not in the bindings.
        return {**api, "__name__": None}

    return read


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_exists_with_its_signature(bindings: Callable[[str], Api], version: str) -> None:
    assert complaints(bindings(version), wanted()) == []


def test_every_call_exists_in_tensorrt_rtx() -> None:
    assert complaints(rtx(), wanted()) == []


def rtx() -> Api:
    need_rtx()
    return dump("from edgekit_tensorrt.bindings import load\ntrt = load().module\n")


def need_rtx() -> None:
    if not any(importlib.util.find_spec(name) for name in MODULES):
        absent("TensorRT-RTX is not installed; run: pip install 'edgekit-sdk[tensorrt]'")


# Builds and refuses with the vendor's own code, which for another GPU than this needs none.
BUILD = """
import onnx
from onnx import TensorProto, helper
from edgekit.evidence import NotPossible
from edgekit_tensorrt.bindings import load
from edgekit_tensorrt.build_engine import build
trt = load().module
def model(op):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], name="here")], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()
shapes = {"x": ((1, 4, 4), (2, 4, 4), (4, 4, 4))}
def refusal(content, shapes, target="SM86"):
    try:
        build(content, shapes, target=target, workspace_mb=64, trt=trt)
    except NotPossible as stop:
        return str(stop)
print(len(build(model("Relu"), shapes, target="SM86", workspace_mb=64, trt=trt)) > 1000)
print(refusal(model("Det"), shapes))
print(refusal(b"hello", shapes))
print(refusal(model("Relu"), {}))
print(refusal(model("Relu"), {"x": ((4, 4, 4), (2, 4, 4), (1, 4, 4))}))
"""


def test_the_real_parser_and_builder_take_the_calls_and_their_refusals_are_sentences() -> None:
    need_rtx()
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, check=True)
    for line in (
        r"^True$",
        r"^TensorRT \S+ cannot take the model:$",
        r"^  - node here \(Det\): ",
        r"^  - it found no outputs; the file is no ONNX model$",
        r"^input 'x' has free dims and no range for them\.$",
        r"^(input 'x' cannot have that range: |TensorRT \S+ refused the range of x:)",
    ):
        assert re.search(line, done.stdout, re.MULTILINE), done.stdout


def test_what_a_version_lacks_is_reported(bindings: Callable[[str], Api]) -> None:
    removed = uses_of("config.set_flag(trt.BuilderFlag.FP16)")
    assert complaints(bindings("10.3.0"), removed) == []
    assert complaints(bindings("11.4.0.106"), removed) == [
        "line 1: BuilderFlag.FP16 does not exist"
    ]


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("builder.create_network(1, 2)", r"Builder.create_network is called with 2 and \(\)"),
        ("builder.create_network(flag=1)", r"is called with 0 and \('flag',\)"),
        ("builder.build_serialized_network(network)", r"is called with 1 and"),
        ("trt.Builder()", r"trt.Builder is called with 0"),
        ("parser.num_errors()", r"OnnxParser.num_errors is no method and is called"),
        ("error.desc", r"ParserError.desc is a method and is not called"),
        ("self._context.execute_async_v9(1)", r"IExecutionContext.execute_async_v9 does not exist"),
        ("trt.OnnxParserFlags.X", r"trt.OnnxParserFlags does not exist"),
    ],
)
def test_a_call_that_does_not_fit_is_reported(
    bindings: Callable[[str], Api], code: str, complaint: str
) -> None:
    assert re.search(complaint, "\n".join(complaints(bindings("10.3.0"), uses_of(code))))


@pytest.mark.parametrize(
    "code",
    [
        "builder.create_network()",
        "builder.create_network(flags=1)",
        "trt.Builder(logger)",
        "parser.parse(content, path=None)",
        "if hasattr(trt, 'ComputeCapability'):\n    config.num_compute_capabilities = 1",
    ],
)
def test_a_call_that_fits_is_not_reported(bindings: Callable[[str], Api], code: str) -> None:
    assert complaints(bindings("10.3.0"), uses_of(code)) == []


def test_what_the_script_uses_is_found_in_its_text() -> None:
    owners = {use.owner for use in uses_of(inspect.getsource(script))}
    assert {*RECEIVERS.values()} <= owners
    assert ("", "Builder") in {(use.owner, use.name) for use in wanted()}


def test_the_tool_fetches_what_is_tested() -> None:
    text = (ROOT / "tools" / "fetch_tensorrt_bindings.py").read_text()
    assert tuple(re.findall(r'^    "([\d.]+)": "', text, re.MULTILINE)) == VERSIONS
