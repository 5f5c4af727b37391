"""What is particular to ExecuTorch: delegates, what stays outside, the process's stderr."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgekit
from edgekit.capture import capture, reference_from
from edgekit.errors import RuntimeFailed, UnsupportedModel
from edgekit.graph import quiet
from edgekit.program import Program
from edgekit.recipe import FP16, FP32
from edgekit.source import resolve
from edgekit_executorch.lower import REMEDIES, _failed

with quiet():
    from executorch.exir._serialize._program import deserialize_pte_binary


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, 1)
        y: Tensor = self.second(left * right)
        return y


class Slices(Chunks):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z: Tensor = self.second(y[:, :4] * y[:, 4:])
        return z


class Mixed(nn.Module):
    """Multiplies a matrix made in float32, whatever the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.eye(4, dtype=torch.float32) @ self.weight


def program(module: nn.Module, *inputs: str) -> Program:
    model = resolve(module, list(inputs))
    return capture(model, reference_from(model))


def lowered(module: nn.Module, *inputs: str) -> edgekit.Artifact:
    return edgekit.backend("executorch").lower(program(module, *inputs), FP32)


def delegates(artifact: edgekit.Artifact) -> tuple[int, list[str]]:
    """Delegate calls and portable ops of a program, read from the file itself."""
    content = artifact.source
    assert isinstance(content, bytes)
    (plan,) = deserialize_pte_binary(content).program.execution_plan
    return len(plan.delegates), [operator.name for operator in plan.operators]


def test_the_remedy_in_the_findings_makes_one_delegate_of_two() -> None:
    backend = edgekit.backend("executorch")
    (finding,) = backend.check(program(Chunks(), "x=1x3x8x8"), FP32)
    assert (finding.op, finding.effect) == ("aten.split_with_sizes_copy.default", "outside")
    assert "left, right = self.first(x).chunk(2, 1)" in finding.source
    assert finding.remedy == REMEDIES["split_with_sizes_copy"]
    assert delegates(lowered(Chunks(), "x=1x3x8x8"))[0] == 2
    assert backend.check(program(Slices(), "x=1x3x8x8"), FP32) == []
    assert delegates(lowered(Slices(), "x=1x3x8x8")) == (1, [])


def test_the_provenance_counts_what_the_file_holds() -> None:
    artifact = lowered(Chunks(), "x=1x3x8x8")
    assert artifact.provenance["delegates"] == delegates(artifact)[0]
    assert artifact.provenance["outside"] == {"aten.split_with_sizes_copy.default": 1}


def test_the_deploy_form_of_partialnet_is_one_delegate() -> None:
    model = resolve("partialnet-nano")
    backend = edgekit.backend("executorch")
    captured = capture(model, reference_from(model), form="two-stream")
    artifact = backend.lower(captured, FP32)
    assert delegates(artifact) == (1, [])
    assert edgekit.verify(backend, artifact, captured.reference).require().max_rel_error < 1e-4


def test_a_pooling_without_stride_lowers() -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.max_pool2d(x, 2)

    captured = program(Pool(), "x=1x1x8x8")
    backend = edgekit.backend("executorch")
    edgekit.verify(backend, backend.lower(captured, FP32), captured.reference).require()


def test_every_op_without_a_kernel_is_named_at_once() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.special.bessel_j0(x.sort(1)[0])
            return y

    captured = program(Both(), "x=1x4")
    with pytest.raises(UnsupportedModel, match=r"(?s)sort.*no kernel.*bessel_j0.*no kernel"):
        edgekit.backend("executorch").lower(captured, FP32)


def test_a_model_that_insists_on_float32_is_refused_in_half_with_the_remedy(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        RuntimeFailed, match=r"executorch fp16 was made, but .* refuses it: .*Try --precision fp32"
    ):
        edgekit.export(
            Mixed(), ["x=1x4"], targets=["executorch"], precision="fp16", out=tmp_path / "b"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_converter_that_gives_up_says_its_own_first_reason() -> None:
    try:
        raise RuntimeError("pass FuseBatchNorm failed") from IndexError("tuple index out of range")
    except RuntimeError as cause:
        said = str(_failed(cause, FP16))
    assert said == (
        "ExecuTorch could not lower the model to fp16: tuple index out of range "
        "Try --precision fp32."
    )


def test_a_session_opens_a_file_as_well_as_bytes(tmp_path: Path) -> None:
    artifact = lowered(nn.Linear(3, 2), "input=1x3")
    content = artifact.source
    assert isinstance(content, bytes)
    (tmp_path / "model.pte").write_bytes(content)
    on_disk = replace(artifact, files={artifact.main: tmp_path / "model.pte"})
    sample = program(nn.Linear(3, 2), "input=1x3").reference.samples[0]
    backend = edgekit.backend("executorch")
    with backend.open(artifact) as one, backend.open(on_disk) as two:
        assert one.run(sample)["output"].tolist() == two.run(sample)["output"].tolist()


def test_an_error_of_the_runtime_says_its_reason_and_nothing_leaks(
    capfd: pytest.CaptureFixture[str],
) -> None:
    artifact = lowered(nn.Linear(3, 2), "input=1x3")
    content = artifact.source
    assert isinstance(content, bytes)
    cut = replace(artifact, files={artifact.main: content[:200]})
    backend = edgekit.backend("executorch")
    with pytest.raises(RuntimeFailed, match=r"could not load the program: .*0x.*; .*too small"):
        backend.open(cut).__enter__()
    assert capfd.readouterr().err == ""


def test_an_op_whose_kernel_has_no_plain_name_is_left_to_the_converter() -> None:
    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(4) ** 2

    captured = program(Squares(), "x=1x4")
    backend = edgekit.backend("executorch")
    assert all(finding.effect == "outside" for finding in backend.check(captured, FP32))
    edgekit.verify(backend, backend.lower(captured, FP32), captured.reference).require()


def test_a_run_that_fails_is_a_sentence_the_first_time_and_later() -> None:
    class Volumes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv3d(x, torch.ones(1, 1, 1, 2, 2))

    captured = program(Volumes(), "x=1x1x1x4x4")
    backend = edgekit.backend("executorch")
    sample = captured.reference.samples[0]
    with backend.open(backend.lower(captured, FP32)) as session:
        with pytest.raises(RuntimeFailed, match=r"could not run the program: .*0x12; "):
            session.run(sample)
        session._ran = True  # type: ignore[attr-defined]
        with pytest.raises(RuntimeFailed, match=r"could not run the program: .*0x12"):
            session.run(sample)
