"""Bundles on a device that exists only here: a script of a bundle runs as a child process.

The child sees what a device has: numpy and the fakes it is given, and nothing of edgekit or torch.
EDGEKIT_DEVICE_PYTHON names another Python to run it with, one with JetPack's versions for example.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekit.artifact import Artifact
from edgekit.bundle import Bundle, open_bundle, write_bundle
from edgekit.manifest import ArtifactEntry, Manifest
from edgekit.program import Reference
from edgekit.verify import prove

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("EDGEKIT_DEVICE_PYTHON", sys.executable)
_ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Absent())
"""


@dataclass
class Device:
    """A bundle that was copied to a device, and how the device is."""

    bundle: Path
    name: str  # of the artifact
    fakes: Path
    site: Path  # a folder whose sitecustomize the child runs first
    environment: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The artifact's own."""
        return self.bundle / self.name

    def run(
        self, script: str, *arguments: str, before: str = "", absent: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of the bundle; ``before`` is code that makes the device what it is."""
        hidden = ("edgekit", "torch", "cuda", *absent)
        (self.site / "sitecustomize.py").write_text(_ABSENT.format(absent=hidden) + before)
        environment = {**os.environ, "PYTHONPATH": f"{self.site}:{self.fakes}", **self.environment}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # no device sets it; we do not rely on it
        return subprocess.run(
            [PYTHON, str(self.folder / script), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def open(self) -> Bundle:
        """As the one who exported it would, once it is back."""
        return open_bundle(self.bundle)

    def added(self) -> set[str]:
        """Files that the manifest does not list."""
        files = {p.relative_to(self.bundle).as_posix() for p in self.bundle.rglob("*")}
        folders = {p.relative_to(self.bundle).as_posix() for p in self.bundle.rglob("*/")}
        return files - folders - set(self.open().manifest.files) - {"manifest.json", "samples"}


@pytest.fixture
def ship(tmp_path: Path) -> Callable[..., Device]:
    """Write a bundle of one artifact, made and proven as an export would."""

    def write(
        artifact: Artifact,
        reference: Reference,
        *,
        fakes: Path,
        labels: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Device:
        names = tuple(f"samples/{index:04}.npz" for index in range(len(reference.samples)))
        entry = ArtifactEntry(
            artifact.target,
            artifact.recipe,
            artifact.main,
            tuple(artifact.files),
            artifact.provenance,
        )
        manifest = Manifest(
            model="double",
            source="double",
            licence="Apache-2.0",
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            image=None,
            labels=labels,
            artifacts=(entry,),
            samples=names,
            samples_source=reference.source,
            versions={},
        )
        outputs = [spec.name for spec in artifact.outputs]
        proof = prove(artifact, outputs, reference, reference.expected)
        bundle = tmp_path / "bundle"
        write_bundle(
            bundle,
            manifest,
            artifacts=[artifact],
            proofs=[proof],
            reference=reference,
            readme="x\n",
        )
        site = tmp_path / "site"
        site.mkdir()
        return Device(bundle, artifact.name, fakes, site, environment or {})

    return write
