"""Bundles on disk: written whole, opened only when every file still has its hash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from edgekit.artifact import Artifact
from edgekit.errors import DamagedFile, StorageError, UnknownName, UsageError
from edgekit.evidence import ON_DEVICE, PERFORMANCE, digest_of
from edgekit.files import PARTIAL, sha256, staged_folder, storage_errors, write_whole
from edgekit.gate import TRIED, Attempt
from edgekit.language_reference import LanguageReference
from edgekit.layers import Layer, read_layers
from edgekit.manifest import NAME, LanguageEntry, Manifest, read_manifest
from edgekit.program import Reference
from edgekit.registry import distance
from edgekit.samples import read_npz
from edgekit.spec import Array
from edgekit.verify import Proof

PROOF = "proof.json"
SPECULATION = "speculation.json"


@dataclass(frozen=True)
class Bundle:
    """A folder with a manifest, artifacts, proofs, samples. Get one from ``open_bundle``."""

    folder: Path
    manifest: Manifest

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Artifact names, such as ``onnxruntime-fp32``."""
        return tuple(entry.name for entry in self.manifest.artifacts)

    def artifact(self, name: str | None = None) -> Artifact:
        """The artifact called ``name``, by its own name or its target's. Raises ``UnknownName``.

        Without a name: the first that the vendor's runtime runs here, else the first that an
        interpreter runs, else the first.
        """
        entries = self.manifest.artifacts
        if name is None:
            entries = tuple(sorted(entries, key=lambda entry: distance(entry.target)))
        for entry in entries:
            if name in (None, entry.name, entry.target):
                folder = self.folder / entry.name
                return Artifact(
                    target=entry.target,
                    recipe=entry.recipe,
                    main=entry.main,
                    files={file: folder / file for file in entry.files},
                    inputs=self.manifest.inputs,
                    outputs=self.manifest.outputs,
                    provenance=entry.provenance,
                )
        raise UnknownName("artifact", str(name), self.artifacts)

    def layers(self, name: str) -> list[Layer]:
        """The eager intermediate values that came with the artifact; none in an old bundle."""
        (entry,) = (entry for entry in self.manifest.artifacts if entry.name == name)
        return read_layers(self.folder / entry.layers) if entry.layers else []

    def proof(self, name: str) -> Proof:
        """The proof made when the bundle was."""
        return Proof.from_json(self._json(name, PROOF))

    def measurement(self, name: str) -> dict[str, object] | None:
        """What ``edgekit profile`` last wrote for the artifact, or None. Raises ``DamagedFile``."""
        return self._added(name, PERFORMANCE, "run edgekit profile again")

    def speculation(self, name: str) -> dict[str, object] | None:
        """What ``edgekit spec plan`` last wrote, or None. Raises ``DamagedFile``."""
        return self._added(name, SPECULATION, "run edgekit spec plan again")

    def device_proofs(self, name: str) -> tuple[Proof, ...]:
        """What the artifact's own script proved on devices, or (). Raises ``DamagedFile``."""
        value = self._added(name, ON_DEVICE, "run the artifact's script on the device again")
        proofs = (value or {}).get("proofs")
        return tuple(Proof.from_json(proof) for proof in proofs) if isinstance(proofs, list) else ()

    def standing(self, name: str) -> str:
        """In a word, what is known of the artifact: the level of its strongest proof.

        ``not proven``, or ``fails on device``, where a proof does not hold.
        """
        proof, on_device = self.proof(name), self.device_proofs(name)
        if not proof.passed:
            return "not proven"
        if not on_device:
            return proof.level
        return "on-device" if all(each.passed for each in on_device) else "fails on device"

    def _added(self, name: str, file: str, remedy: str) -> dict[str, object] | None:
        """A file that came after the export and carries its own digest, or None."""
        path = self.folder / name / file
        if not os.path.lexists(path):
            return None
        if path.is_symlink() or not path.is_file():
            raise DamagedFile(f"{path} is no plain file; a bundle holds nothing else.")
        try:
            value = self._json(name, file)
        except DamagedFile as cause:
            raise DamagedFile(f"{cause} Delete it and {remedy}.") from cause
        if not isinstance(value, dict) or value.pop("digest", None) != digest_of(value):
            raise DamagedFile(f"{path} was altered or cut short; delete it and {remedy}.")
        return value

    def write_measurement(self, name: str, value: Mapping[str, object]) -> None:
        """Keep ``value`` as the artifact's measurement, in place of the last one.

        It carries its own digest and the manifest does not list it: a device that measures
        leaves what was exported as it was. Raises ``StorageError``.
        """
        self._add(name, PERFORMANCE, value)

    def write_speculation(self, name: str, value: Mapping[str, object]) -> None:
        """Keep ``value`` as the artifact's plan of speculation, in place of the last one.

        As ``write_measurement``. Raises ``StorageError``.
        """
        self._add(name, SPECULATION, value)

    def _add(self, name: str, file: str, value: Mapping[str, object]) -> None:
        text = _dump({**value, "digest": digest_of(value)})
        write_whole(self.folder / name / file, text.encode())

    def _json(self, name: str, file: str) -> object:
        path = self.folder / name / file
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as cause:
            raise DamagedFile(f"{path} cannot be read: {cause}.") from cause

    def tried(self) -> list[Attempt]:
        """Every candidate that was tried for this bundle and why it was kept or not, or []."""
        if TRIED not in self.manifest.files:
            return []
        path = self.folder / TRIED
        try:
            listed = json.loads(path.read_bytes())
        except (OSError, ValueError) as cause:
            raise DamagedFile(f"{path} cannot be read: {cause}.") from cause
        if not isinstance(listed, list):
            raise DamagedFile(f"{path} is no list of attempts.")
        return [Attempt.from_json(each) for each in listed]

    @property
    def language(self) -> LanguageEntry:
        """What makes text of its tokens. Raises ``UsageError`` where it holds no language model."""
        if self.manifest.language is None:
            raise UsageError(
                f"{self.folder} holds {self.manifest.model}, which is no language model; use "
                "edgekit run for it."
            )
        return self.manifest.language

    def language_reference(self) -> LanguageReference:
        """What eager answered to prompts and to a text."""
        return LanguageReference.from_bytes((self.folder / self.language.reference).read_bytes())

    def reference(self) -> Reference:
        """The samples with the eager outputs."""
        samples, expected = [], []
        for name in self.manifest.samples:
            arrays = read_npz(self.folder / name)
            samples.append(_named(arrays, "input."))
            expected.append(_named(arrays, "output."))
            wanted = [spec.name for spec in (*self.manifest.inputs, *self.manifest.outputs)]
            if [*samples[-1], *expected[-1]] != wanted:
                raise DamagedFile(f"{self.folder / name} does not hold {', '.join(wanted)}.")
        return Reference(tuple(samples), tuple(expected), self.manifest.samples_source)


def _named(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _dump(value: object) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def open_bundle(folder: str | Path) -> Bundle:
    """Open a bundle, every file checked against its hash.

    Raises ``UsageError`` where there is no folder, ``DamagedFile`` where a file is missing,
    altered or a link, ``NewerSchema`` where this edgekit is too old.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # Path.is_dir raises where the name is too long
        raise UsageError(
            f"there is no bundle folder {folder}; make one with edgekit export MODEL -o DIR."
        )
    if folder.name.endswith(PARTIAL):
        raise DamagedFile(
            f"{folder} is what a stopped export left, not a bundle; delete it and export again."
        )
    manifest = read_manifest(folder)
    for name, digest in manifest.files.items():
        _check_file(folder, name, digest)
    bundle = Bundle(folder, manifest)
    for name in bundle.artifacts:
        bundle.measurement(name)
        bundle.speculation(name)
        bundle.device_proofs(name)
    return bundle


def _check_file(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    parents = [folder / parent for parent in PurePosixPath(name).parents if parent.name]
    try:
        if any(part.is_symlink() for part in (path, *parents)):
            raise DamagedFile(f"{path} is a symbolic link; a bundle holds plain files only.")
        if path.exists() and not path.is_file():  # to read a pipe would wait forever
            raise DamagedFile(f"{path} is no plain file; a bundle holds nothing else.")
        found = sha256(path)
    except FileNotFoundError as cause:
        raise DamagedFile(f"{path} is missing; copy the bundle again, whole.") from cause
    except DamagedFile:
        raise
    except (OSError, ValueError) as cause:  # ValueError: no file can have such a name
        reason = getattr(cause, "strerror", None) or cause
        raise DamagedFile(f"{path} cannot be read: {reason}.") from cause
    if found != digest:
        raise DamagedFile(
            f"{path} was altered or cut short: its sha256 is {found[:12]}…, the manifest says "
            f"{digest[:12]}…. Copy the bundle again, or export the model again."
        )


def check_destination(folder: Path, *, overwrite: bool) -> None:
    """Raise ``UsageError`` or ``StorageError`` unless a bundle may be written to ``folder``."""
    with storage_errors(folder):
        _check_destination(folder, overwrite=overwrite)


def _check_destination(folder: Path, *, overwrite: bool) -> None:
    if folder.name in ("", "..") or folder.name.endswith(PARTIAL):
        raise UsageError(f"{folder} cannot be a bundle's name; give a new folder with -o.")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} exists and is no folder; choose another with -o.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / NAME).is_file():
            raise UsageError(
                f"{folder} exists and is no bundle; nothing in it was touched. Choose a new "
                "folder with -o."
            )
        if not overwrite:
            raise UsageError(
                f"{folder} exists and holds a bundle; choose another folder with -o, or replace "
                "it with --overwrite."
            )
    existing = next(part for part in folder.absolute().parents if part.exists())
    if not existing.is_dir():
        raise UsageError(f"{existing} is a file, so {folder} cannot be made; choose another -o.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"{existing} is not writable; choose another folder with -o.")


def write_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    artifacts: Sequence[Artifact],
    proofs: Sequence[Proof],
    reference: Reference,
    readme: str,
    extra: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write all files, ``extra`` among them, beside ``folder``, then rename.

    Raises ``StorageError``.
    """
    check_destination(folder, overwrite=overwrite)
    with staged_folder(folder, replace=overwrite) as temporary:
        _write(temporary / "README.md", readme.encode())
        for name, data in (extra or {}).items():
            _write(temporary / name, data)
        for artifact, proof in zip(artifacts, proofs, strict=True):
            for name, content in artifact.files.items():
                _write(temporary / artifact.name / name, content)
            _write(temporary / artifact.name / PROOF, _dump(proof.to_json()).encode())
        for name, sample, expected in zip(
            manifest.samples, reference.samples, reference.expected, strict=True
        ):
            _write_sample(temporary / name, sample, expected)
        files = {
            path.relative_to(temporary).as_posix(): sha256(path)
            for path in temporary.rglob("*")
            if path.is_file()
        }
        manifest = manifest.with_files(files)
        # Last, so that a folder without a manifest is known to be unfinished.
        _write(temporary / NAME, manifest.to_text().encode())
    return Bundle(folder, manifest)


def _write(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)  # weights may be larger than the memory


def _write_sample(path: Path, sample: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    path.parent.mkdir(exist_ok=True)
    arrays = {f"input.{name}": array for name, array in sample.items()}
    arrays |= {f"output.{name}": array for name, array in expected.items()}
    with storage_errors(path), path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes the flag first
