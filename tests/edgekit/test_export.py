"""The main verb: what it writes, what it refuses, what a stopped run leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgekit
from edgekit.accuracy import Labelled
from edgekit.artifact import Artifact
from edgekit.calibration import Calibration, checked_calibration
from edgekit.contract import Backend, Finding, Inside, Option
from edgekit.errors import (
    BadInput,
    DoesNotPay,
    LoweringFailed,
    MissingRuntime,
    NotProven,
    StorageError,
    UnknownName,
    UnsupportedRecipe,
    UsageError,
)
from edgekit.export import check, export
from edgekit.gate import Budget
from edgekit.model import Model
from edgekit.planning import Quantization, plan
from edgekit.program import Program
from edgekit.recipe import FP16, FP32, INT8, PRECISIONS, Recipe
from edgekit.spec import Array, Arrays, TensorSpec
from edgekit.testing import Outcome, QuantizingBackend, ReplayBackend, ReplaySession

Install = Callable[[Backend], None]


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


EXAMPLE = torch.ones(1, 3)


def test_three_lines_of_python_give_a_proven_bundle(layer: nn.Linear, tmp_path: Path) -> None:
    bundle = edgekit.export(layer, EXAMPLE, targets=["onnxruntime"], out=tmp_path / "b")
    assert bundle.proof("onnxruntime-fp32").passed
    assert edgekit.open_bundle(tmp_path / "b").artifacts == ("onnxruntime-fp32",)


def test_an_artifact_that_drifts_is_refused_and_nothing_is_written(
    layer: nn.Linear, tmp_path: Path
) -> None:
    with pytest.raises(
        NotProven, match=r"replay-fp32 is not proven: Output 'output': maximum relative error is"
    ):
        export(layer, EXAMPLE, targets=[ReplayBackend(drift=0.5)], out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_an_override_keeps_it_and_is_written_into_the_manifest(
    layer: nn.Linear, tmp_path: Path
) -> None:
    bundle = export(
        layer,
        EXAMPLE,
        targets=[ReplayBackend(drift=0.5)],
        out=tmp_path / "b",
        unproven_ok=True,
    )
    assert "replay-fp32 was kept unproven" in bundle.manifest.overrides[0]
    assert not edgekit.open_bundle(tmp_path / "b").proof("replay-fp32").passed
    assert "**no**" in (tmp_path / "b/README.md").read_text()


def test_the_reference_is_the_trained_form_and_not_the_deploy_form(
    layer: nn.Linear, tmp_path: Path
) -> None:
    def wrong(module: nn.Module, form: str, inputs: object) -> nn.Module:
        return nn.Sequential(module, nn.Tanh())

    model = edgekit.source.resolve(layer, EXAMPLE)
    bad = Model(model.module, model.inputs, samples=model.samples, deploy=wrong)
    with pytest.raises(NotProven, match="onnxruntime-fp32 is not proven"):
        export(bad, targets=["onnxruntime"], out=tmp_path / "b")


def test_the_same_export_gives_the_same_bytes(layer: nn.Linear, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(layer, EXAMPLE, targets=["onnxruntime"], out=tmp_path / name)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in files}
        for name in ("one", "two")
        for files in [[p for p in (tmp_path / name).rglob("*") if p.is_file()]]
    )
    assert one == two


def test_an_existing_bundle_is_kept_unless_told(layer: nn.Linear, tmp_path: Path) -> None:
    out = tmp_path / "b"
    export(layer, EXAMPLE, targets=[ReplayBackend()], out=out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match=r"holds a bundle; choose another.*--overwrite"):
        export(layer, EXAMPLE, targets=[ReplayBackend()], out=out)
    assert (out / "manifest.json").read_bytes() == before
    export(layer, torch.ones(2, 3), targets=[ReplayBackend()], out=out, overwrite=True)
    assert edgekit.open_bundle(out).manifest.inputs[0].shape == (2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_of_other_things_is_never_replaced(layer: nn.Linear, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(UsageError, match=r"exists and is no bundle; nothing in it was touched"):
        export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


def test_a_file_in_the_way_is_a_sentence_before_any_work(layer: nn.Linear, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"exists and is no folder"):
        export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path / "file")
    with pytest.raises(UsageError, match=r"file is a file, so .* cannot be made"):
        export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path / "file" / "b")


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, torch, edgekit\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from edgekit.testing import ReplayBackend\n"
        "layer = torch.nn.Linear(300, 200)\n"
        "edgekit.export(layer, torch.ones(50, 300), targets=[ReplayBackend()], out='b')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode
    assert "StorageError: b cannot be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_names_the_remedy(
    layer: nn.Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"the disk is full; free some space"):
        export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


SLOW_EXPORT = """
import signal, sys, time, torch
from pathlib import Path
from edgekit import cli, export
from edgekit.testing import ReplayBackend

plain = Path.write_bytes

# A shell that runs the tests in the background hands its children an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

def slow(path, content):
    plain(path, content)
    print("writing", flush=True)
    time.sleep(60)

Path.write_bytes = slow
layer, example = torch.nn.Linear(3, 2), torch.ones(1, 3)
cli.export = lambda *_, out, **__: export(
    layer, example, targets=[ReplayBackend()], out=out, overwrite=True
)
sys.exit(cli.main(["export", "layer", "--target", "replay", "-o", "b"]))
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_export_leaves_the_old_bundle_and_no_bundle_like_debris(
    layer: nn.Linear, tmp_path: Path, kind: signal.Signals
) -> None:
    export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path / "b")
    before = (tmp_path / "b/manifest.json").read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_EXPORT],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(kind)
    _, errors = process.communicate(timeout=30)
    assert (tmp_path / "b/manifest.json").read_bytes() == before
    edgekit.open_bundle(tmp_path / "b")
    debris = [path for path in tmp_path.iterdir() if path.name != "b"]
    if kind is signal.SIGKILL:
        for path in debris:
            with pytest.raises(edgekit.EdgekitError, match=r"what a stopped export left"):
                edgekit.open_bundle(path)
        export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path / "b", overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["b"]
    else:
        assert process.returncode == 130
        assert errors == "edgekit: stopped; what was there before is unchanged.\n"
        assert debris == []


def test_all_is_every_target_that_is_installed(install: Install) -> None:
    install(ReplayBackend())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekit.registry.find_spec", lambda module: module)  # whatever is missing
        names = {each.backend.name for each in plan(["all"], "auto")}
    assert names == {"coreml", "executorch", "onnxruntime", "replay", "tensorrt"}


def test_auto_takes_the_first_recipe_of_each_target_and_names_may_be_joined() -> None:
    assert [each.recipe for each in plan(["onnxruntime"], "auto")] == [FP32]
    both = plan(["onnxruntime", "executorch"], "fp32,fp16")
    assert [(each.backend.name, each.recipe) for each in both] == [
        ("onnxruntime", FP32),
        ("onnxruntime", FP16),
        ("executorch", FP32),
        ("executorch", FP16),
    ]


def test_names_that_do_not_exist_are_sentences() -> None:
    with pytest.raises(UnknownName, match=r"unknown target 'onxruntime'; did you mean 'onnxrunt"):
        plan(["onxruntime"], "auto")
    with pytest.raises(UnknownName, match=r"unknown precision 'fp61'; did you mean 'fp16'"):
        plan(["onnxruntime"], "fp61")
    with pytest.raises(UnsupportedRecipe, match=r"cannot make palette4.*it can make: fp32"):
        plan(["onnxruntime"], "palette4")


def test_a_missing_runtime_names_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgekit.registry.find_spec", lambda module: None)
    with pytest.raises(MissingRuntime, match=r"pip install 'edgekit-sdk\[onnxruntime\]'"):
        plan(["onnxruntime"], "auto")


def test_check_asks_each_target_before_lowering(layer: nn.Linear) -> None:
    finding = Finding("aten.sort.default", "refused", "net.py:3: x.sort()", "", "do without")
    found = check(layer, EXAMPLE, targets=[ReplayBackend(findings=(finding,))])
    assert found == {"replay-fp32": [finding]}
    assert str(finding) == "aten.sort.default at net.py:3: x.sort() is refused: do without"


def test_the_bundle_says_where_its_samples_come_from(layer: nn.Linear, tmp_path: Path) -> None:
    bundle = export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path / "b")
    assert bundle.reference().source == "the example inputs and 3 random ones, seed 0"
    np.testing.assert_array_equal(bundle.reference().samples[0]["input"], EXAMPLE.numpy())


def test_the_makers_folders_are_not_in_the_bundle(tmp_path: Path) -> None:
    path = tmp_path / "secret_client" / "net.py"
    path.parent.mkdir()
    path.write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 2)\n")
    out = tmp_path / "b"
    export(f"{path}:make", ["input=1x3"], targets=["onnxruntime"], out=out)
    for file in out.rglob("*"):
        assert not file.is_file() or b"secret_client" not in file.read_bytes(), file


def test_steps_are_reported_as_they_start(layer: nn.Linear, tmp_path: Path) -> None:
    steps: list[str] = []
    export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path / "b", report=steps.append)
    assert steps[0] == "running the eager model on its samples"
    assert steps[-1].startswith("writing")


@dataclass
class Tuned(ReplayBackend):
    """A backend with a setting that takes numbers."""

    name: str = "tuned"
    minimum: str = "3"
    options: tuple[Option, ...] = (Option("minimum", "3", "the least"),)

    def with_options(self, values: Mapping[str, str]) -> Tuned:
        if not values["minimum"].isdigit():
            raise UsageError(f"--tuned-minimum {values['minimum']!r} is not a number.")
        return replace(self, minimum=values["minimum"])

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        return replace(super().lower(program, recipe), provenance={"minimum": self.minimum})

    def check(self, program: Program, recipe: Recipe) -> list[Finding]:
        return [Finding("op", "outside", "", "", f"at least {self.minimum}")]


def test_options_reach_the_target_that_they_name(
    layer: nn.Linear, tmp_path: Path, install: Install
) -> None:
    install(Tuned())
    for options, minimum in ((None, "3"), ({}, "3"), ({"tuned-minimum": "5"}, "5")):
        out = tmp_path / f"b{minimum}"
        bundle = export(layer, EXAMPLE, targets=["tuned"], out=out, options=options, overwrite=True)
        assert bundle.manifest.artifacts[0].provenance == {"minimum": minimum}
        found = check(layer, EXAMPLE, targets=["tuned"], options=options)
        assert found["tuned-fp32"][0].remedy == f"at least {minimum}"


def test_an_option_that_does_not_exist_is_answered_with_the_nearest(
    layer: nn.Linear, tmp_path: Path, install: Install
) -> None:
    install(Tuned())
    options = {"tuned-minimun": "5"}
    sentence = (
        r"unknown option 'tuned-minimun'; did you mean 'tuned-minimum'\? There is: .*tuned-min"
    )
    with pytest.raises(UnknownName, match=sentence):
        export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path / "b", options=options)
    with pytest.raises(UnknownName, match=sentence):
        check(layer, EXAMPLE, targets=[ReplayBackend()], options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_an_option_does_not_take_is_said_before_any_work(install: Install) -> None:
    install(Tuned())
    steps: list[str] = []
    with pytest.raises(UsageError, match=r"^--tuned-minimum 'lots' is not a number\.$"):
        check(
            "no_such.py:make",
            targets=["tuned"],
            options={"tuned-minimum": "lots"},
            report=steps.append,
        )
    assert steps == []


def test_an_option_of_a_target_that_was_not_asked_for_is_refused(
    layer: nn.Linear, tmp_path: Path, install: Install
) -> None:
    install(Tuned())
    options = {"tuned-minimum": "5"}
    with pytest.raises(UsageError, match=r"^--tuned-minimum .* asked for: onnxruntime\. Add it to"):
        export(layer, EXAMPLE, targets=["onnxruntime"], out=tmp_path / "b", options=options)
    with pytest.raises(UsageError, match=r"asked for: backends that were passed ready-made"):
        export(layer, EXAMPLE, targets=[ReplayBackend()], out=tmp_path / "b", options=options)
    assert list(tmp_path.iterdir()) == []


class Steps(nn.Module):
    """Two modules in a row, for a first one that differs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        result: Tensor = self.second(hidden)
        return result


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


@pytest.fixture
def steps() -> Steps:
    torch.manual_seed(0)
    return Steps().eval()


def test_eager_values_of_every_layer_are_in_the_bundle(steps: Steps, tmp_path: Path) -> None:
    targets = [ReplayBackend(), ReplayBackend("other")]
    bundle = export(steps, ["x=batch:1..3x3"], targets=targets, out=tmp_path / "b")
    assert {entry.layers for entry in bundle.manifest.artifacts} == {"layers/model.npz"}
    assert [path.name for path in (tmp_path / "b/layers").iterdir()] == ["model.npz"]
    layers = edgekit.open_bundle(tmp_path / "b").layers("other-fp32")
    assert [(each.node, each.module) for each in layers] == [
        ("linear", "first"),
        ("relu", ""),
        ("linear_1", "second"),
    ]
    expected = bundle.reference().expected[0]["output"]
    np.testing.assert_allclose(layers[-1].values, expected.ravel(), atol=1e-6)


@dataclass
class Fast(ReplayBackend):
    """A backend that prefers a form of the model."""

    recipes: tuple[Recipe, ...] = (FP32,)
    form: str = "concat"


def test_each_form_of_the_model_has_layers_of_its_own(steps: Steps, tmp_path: Path) -> None:
    def deploy(module: nn.Module, form: str, inputs: object) -> nn.Module:
        return Wrapped(module) if form == "two-stream" else module

    model = edgekit.source.resolve(steps, ["x=1x3"])
    formed = Model(model.module, model.inputs, samples=model.samples, deploy=deploy)
    targets = [Fast("one"), Fast("two", form="two-stream"), ReplayBackend("three")]
    bundle = export(formed, targets=targets, out=tmp_path / "b")
    assert [entry.layers for entry in bundle.manifest.artifacts] == [
        "layers/concat.npz",
        "layers/two-stream.npz",
        "layers/model.npz",
    ]
    assert bundle.layers("one-fp32")[0].module == "first"
    assert bundle.layers("two-fp32")[0].module == "inner.first"


def test_an_artifact_that_drifts_is_explained_by_its_first_layer_and_the_users_line(
    steps: Steps, tmp_path: Path
) -> None:
    with pytest.raises(
        NotProven,
        match=r"Output 'output': .*It first differs at module 'first', aten\.linear\.default, node "
        r"'linear' \(.*test_export\.py:\d+: hidden = torch\.relu\(self\.first\(x\)\)\), which is "
        r"-?\d+\.\d dB from eager\. In float32 no layer should differ",
    ):
        export(steps, ["x=1x3"], targets=[ReplayBackend(drift=0.5)], out=tmp_path / "b")


class GlassSession(ReplaySession):
    """Shows its layers; all are right but the one it was told."""

    def __init__(self, artifact: Artifact, net: Steps, wrong: str) -> None:
        super().__init__(artifact)
        self._net, self._wrong = net, wrong

    def layers(self, arrays: Arrays) -> dict[str, Array]:
        with torch.no_grad():
            first = self._net.first(torch.from_numpy(arrays["x"]))
            values = {"linear": first, "relu": first.relu()}
            values["linear_1"] = self._net.second(values["relu"])
        found = {name: value.numpy() for name, value in values.items()}
        found[self._wrong] = found[self._wrong] + 1
        return found


@dataclass
class Glass(ReplayBackend):
    net: Steps | None = None
    wrong: str = ""

    def open(self, artifact: Artifact, *, threads: int | None = None) -> GlassSession:
        assert self.net is not None
        return GlassSession(artifact, self.net, self.wrong)

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        assert len(program.outputs) == 1  # it shows its layers and need not be made again
        return super().lower(program, recipe)


@pytest.mark.parametrize(("node", "module"), [("linear_1", "second"), ("linear", "first")])
def test_a_runtime_that_shows_its_layers_is_asked_for_those_of_the_artifact(
    steps: Steps, tmp_path: Path, node: str, module: str
) -> None:
    glass = Glass(drift=0.5, net=steps, wrong=node)
    assert isinstance(GlassSession(Artifact("", FP32, "", {}, (), ()), steps, node), Inside)
    with pytest.raises(NotProven, match=rf"first differs at module '{module}', .* node '{node}' "):
        export(steps, ["x=1x3"], targets=[glass], out=tmp_path / "b")


@dataclass
class Once(ReplayBackend):
    """Lowers the model, and refuses to do so again with its layers shown."""

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        assert program.outputs  # of a model without layers, none is asked for
        if len(program.outputs) > 1:
            raise LoweringFailed("too many outputs")
        return super().lower(program, recipe)


class Twice(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids * 2


@pytest.mark.parametrize(
    ("module", "text"), [(Steps(), "x=1x3"), (Twice(), "ids=1x3:int64")], ids=["refused", "none"]
)
def test_a_search_for_the_layer_that_fails_does_not_hide_the_failure(
    tmp_path: Path, module: nn.Module, text: str
) -> None:
    with pytest.raises(NotProven, match=r"Output 'output': .*the limit is [\d.]+\.$") as caught:
        export(module, [text], targets=[Once(drift=1.0)], out=tmp_path / "b")
    assert "first differs" not in str(caught.value)


FLOAT = Outcome(milliseconds=4.0, size=4000)
GOOD = Outcome(drift=0.01, milliseconds=2.0, size=1000)
DRIFTS = Outcome(drift=0.5, milliseconds=1.0, size=1000)
SLOW = Outcome(drift=0.01, milliseconds=9.0, size=1000)


def quantizing(**outcomes: Outcome) -> QuantizingBackend:
    """Makes what it was told of, by precision, and float32."""
    recipes = tuple(PRECISIONS[name] for name in outcomes if name != "fp32")
    return QuantizingBackend(
        lambda recipe: outcomes.get(recipe.precision, FLOAT), (FP32, *recipes), ops=frozenset()
    )


def drawn(count: int = 8, name: str = "input") -> Calibration:
    generator = np.random.default_rng(0)
    samples = [{name: generator.standard_normal((1, 3), np.float32)} for _ in range(count)]
    return checked_calibration(samples, "drawn")


def quantized(
    layer: nn.Linear, backend: Backend, out: Path, *, precision: str = "int8", **other: bool
) -> edgekit.Bundle:
    return export(
        layer,
        EXAMPLE,
        targets=[backend],
        out=out,
        precision=precision,
        quantization=Quantization(calibration=drawn()),
        **other,  # type: ignore[arg-type]
    )


def test_what_pays_is_written_with_its_table_and_the_hash_of_its_data(
    layer: nn.Linear, tmp_path: Path, races: list[str]
) -> None:
    quantized(layer, quantizing(int8=GOOD), tmp_path / "b")
    bundle = edgekit.open_bundle(tmp_path / "b")
    assert bundle.artifacts == ("quantizing-int8",)
    assert bundle.manifest.calibration == drawn().to_json()
    assert bundle.manifest.overrides == ()
    (attempt,) = bundle.tried()
    assert (attempt.artifact, attempt.verdict) == ("quantizing-int8", "kept")
    assert "tried.json" in bundle.manifest.files
    assert "| quantizing-int8 | kept | " in (tmp_path / "b/README.md").read_text()


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (DRIFTS, "the outputs are "),
        (SLOW, "it is not faster than float here: 9.000 ms against 4.000 ms"),
    ],
)
def test_what_does_not_pay_is_not_written_unless_told_which_the_bundle_records(
    layer: nn.Linear, tmp_path: Path, races: list[str], outcome: Outcome, why: str
) -> None:
    backend = quantizing(int8=outcome)
    with pytest.raises(DoesNotPay, match=rf"quantizing-int8 does not pay: {why}.*--precision fp32"):
        quantized(layer, backend, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    quantized(layer, backend, tmp_path / "b", unproven_ok=True)
    bundle = edgekit.open_bundle(tmp_path / "b")
    (override,) = bundle.manifest.overrides
    assert override.startswith(f"quantizing-int8 was kept although {why}")
    (attempt,) = json.loads((tmp_path / "b/tried.json").read_bytes())
    assert attempt["verdict"] == "kept"
    assert attempt["reason"].startswith(f"although {why}")


def test_auto_writes_what_won_and_the_table_of_all(
    layer: nn.Linear, tmp_path: Path, races: list[str]
) -> None:
    backend = quantizing(fp16=SLOW, int8=GOOD, int4=Outcome(refusal="not here"))
    bundle = quantized(layer, backend, tmp_path / "b", precision="auto")
    assert bundle.artifacts == ("quantizing-int8",)
    verdicts = {each.artifact: each.verdict for each in bundle.tried()}
    assert verdicts == {
        "quantizing-fp16": "refused",
        "quantizing-int4": "not tried",
        "quantizing-fp32": "beaten",
        "quantizing-int8": "chosen",
    }
    assert all(each.reason for each in bundle.tried())


def test_auto_without_data_is_the_float_default_and_has_no_table(
    layer: nn.Linear, tmp_path: Path, races: list[str]
) -> None:
    bundle = export(layer, EXAMPLE, targets=[quantizing(int8=GOOD)], out=tmp_path / "b")
    assert bundle.artifacts == ("quantizing-fp32",)
    assert bundle.tried() == []
    assert bundle.manifest.calibration is None
    assert not (tmp_path / "b/tried.json").exists()
    assert races == []


@pytest.mark.parametrize("precision", ["auto,int8", "int8,auto", "fp32,auto,int8"])
def test_what_auto_finds_and_was_asked_for_too_is_written_once(
    layer: nn.Linear, tmp_path: Path, races: list[str], precision: str
) -> None:
    backend = quantizing(int8=GOOD)
    bundle = quantized(layer, backend, tmp_path / "b", precision=precision)
    assert sorted(bundle.artifacts) == sorted(
        f"quantizing-{name}" for name in precision.split(",") if name != "auto"
    )
    assert edgekit.open_bundle(tmp_path / "b").proof("quantizing-int8").passed


def test_of_several_targets_each_has_its_own_best(
    layer: nn.Linear, tmp_path: Path, races: list[str]
) -> None:
    other = replace(quantizing(int8=SLOW), name="other")
    bundle = export(
        layer,
        EXAMPLE,
        targets=[quantizing(int8=GOOD), other],
        out=tmp_path / "b",
        quantization=Quantization(calibration=drawn()),
    )
    assert bundle.artifacts == ("quantizing-int8", "other-fp32")
    assert {each.artifact for each in bundle.tried() if each.verdict == "chosen"} == set(
        bundle.artifacts
    )


def test_an_override_of_what_auto_found_is_not_recorded_twice(
    layer: nn.Linear, tmp_path: Path, races: list[str]
) -> None:
    backend = quantizing(int8=DRIFTS)
    bundle = quantized(layer, backend, tmp_path / "b", precision="auto,int8,fp32", unproven_ok=True)
    assert bundle.artifacts == ("quantizing-fp32", "quantizing-int8")
    assert len(bundle.manifest.overrides) == 1


def test_what_auto_found_is_not_replaced_by_a_worse_one_of_the_same_name(
    layer: nn.Linear, tmp_path: Path, races: list[str]
) -> None:
    def by_method(recipe: Recipe) -> Outcome:
        if not recipe.quantized:
            return FLOAT
        return GOOD if recipe.method == "percentile" else DRIFTS

    backend = QuantizingBackend(by_method)
    bundle = quantized(layer, backend, tmp_path / "b", precision="auto,int8", unproven_ok=True)
    assert bundle.artifact("quantizing-int8").recipe.method == "percentile"
    assert bundle.proof("quantizing-int8").passed
    assert bundle.manifest.overrides == ()


def test_data_passed_from_python_is_held_to_the_models_inputs(
    layer: nn.Linear, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="there is no input 'x'; the model takes: input=1x3"):
        export(
            layer,
            EXAMPLE,
            targets=[quantizing(int8=GOOD)],
            out=tmp_path / "b",
            quantization=Quantization(calibration=drawn(name="x")),
        )
    truth = np.arange(300) % 2
    samples = tuple({"x": np.zeros((1, 3), np.float32)} for _ in truth)
    with pytest.raises(BadInput, match="there is no input 'x'; the model takes: input=1x3"):
        export(
            layer,
            EXAMPLE,
            targets=[quantizing(int8=GOOD)],
            out=tmp_path / "b",
            quantization=Quantization(drawn(), Labelled(samples, truth, "val")),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"metric": "bleu"}, r"unknown metric 'bleu'\. There is: auto, top1, sqnr"),
        ({"budget": Budget(prefer="speed")}, r"unknown preference 'speed'"),  # type: ignore[arg-type]
        ({"method": "max"}, r"unknown calibration method 'max'"),
        ({"cpu": "sse"}, r"unknown processor 'sse'"),
    ],
)
def test_a_choice_that_does_not_exist_is_answered_with_those_there_are(
    layer: nn.Linear, tmp_path: Path, wanted: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UnknownName, match=sentence):
        export(
            layer,
            EXAMPLE,
            targets=[quantizing(int8=GOOD)],
            out=tmp_path / "b",
            quantization=Quantization(calibration=drawn(), **wanted),  # type: ignore[arg-type]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_layer_to_keep_float_that_does_not_exist_is_named(
    layer: nn.Linear, tmp_path: Path
) -> None:
    wanted = Quantization(calibration=drawn(), keep_float=("haed",))
    with pytest.raises(UnknownName, match=r"unknown layer to keep in float 'haed'"):
        export(
            layer,
            EXAMPLE,
            targets=["onnxruntime"],
            out=tmp_path / "b",
            precision="int8",
            quantization=wanted,
        )
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_never_called_accurate(layer: nn.Linear, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    samples = tuple({"input": generator.standard_normal((1, 3), np.float32)} for _ in range(400))
    labelled = Labelled(samples, generator.integers(0, 2, 400), "val.npz")
    with pytest.raises(
        NotProven, match=r"the float model gets .* guessing 50\.0%: it is untrained"
    ):
        export(
            layer,
            EXAMPLE,
            targets=[quantizing(int8=GOOD)],
            out=tmp_path / "b",
            precision="int8",
            quantization=Quantization(drawn(), labelled),
        )
    assert list(tmp_path.iterdir()) == []


def test_to_judge_by_distance_needs_no_labels_and_reads_none(
    layer: nn.Linear, tmp_path: Path, races: list[str]
) -> None:
    wanted = Quantization(drawn(), tmp_path / "there is no such file.npz", metric="sqnr")
    bundle = export(
        layer,
        EXAMPLE,
        targets=[quantizing(int8=GOOD)],
        out=tmp_path / "b",
        precision="int8",
        quantization=wanted,
    )
    assert bundle.tried()[0].accuracy is None


def test_a_recipe_of_integers_is_checked_without_data(layer: nn.Linear) -> None:
    found = check(layer, EXAMPLE, targets=[quantizing(int8=GOOD)], precision="int8")
    assert found == {"quantizing-int8": []}


def test_ranges_come_from_real_samples_where_no_data_is_given(
    layer: nn.Linear, tmp_path: Path, races: list[str]
) -> None:
    model = Model(
        layer.eval(),
        (TensorSpec("input", (1, 3), "float32"),),
        samples=drawn(9).samples,
        samples_source="photos",
    )
    bundle = export(model, targets=[quantizing(int8=GOOD)], out=tmp_path / "b", precision="int8")
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration["source"] == "the model's own samples: photos"
    assert bundle.artifact("quantizing-int8").recipe == INT8
