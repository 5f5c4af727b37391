"""The manifest of a bundle: what is in it, checked field by field when read.

JSON with a schema number, the sha256 of every other file, and a digest of itself, so that a
flipped bit anywhere is found. Nothing in it depends on the time or the place of the export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import edgekit
from edgekit.errors import DamagedFile, NewerSchema
from edgekit.evidence import digest_of
from edgekit.image import ImageInput
from edgekit.recipe import Recipe
from edgekit.spec import TensorSpec

# 2: recipes of integers, and the data their ranges come from. 3: language models.
SCHEMA = 3
NAME = "manifest.json"


@dataclass(frozen=True)
class ArtifactEntry:
    """One artifact's place in the bundle; ``files`` are paths inside its folder."""

    target: str
    recipe: Recipe
    main: str
    files: tuple[str, ...]
    provenance: Mapping[str, object]
    layers: str = ""  # the bundle's file of eager intermediate values, or ""

    @property
    def name(self) -> str:
        """The folder: ``onnxruntime-fp32``."""
        return f"{self.target}-{self.recipe.precision}"

    def to_json(self) -> dict[str, object]:
        """All fields as JSON values."""
        return {
            "target": self.target,
            "recipe": self.recipe.to_json(),
            "main": self.main,
            "files": list(self.files),
            "provenance": dict(self.provenance),
            "layers": self.layers,
        }


@dataclass(frozen=True)
class LanguageEntry:
    """What makes text of a bundle's tokens; paths are the bundle's.

    ``context`` is the most tokens of a conversation; ``template`` is the Jinja file or "", and
    ``turns`` the same conversation in fixed pieces of text, where it can be cut so. ``max_rise``
    is what integers were allowed to cost, in percent of perplexity.
    """

    context: int
    stops: tuple[int, ...]
    tokenizer: str
    template: str
    reference: str
    max_rise: float
    turns: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, object]:
        """All fields as JSON values."""
        return {**asdict(self), "stops": list(self.stops)}

    @classmethod
    def from_json(cls, value: object) -> LanguageEntry:
        """Read what ``to_json`` wrote. Raises ``TypeError``, ``KeyError`` or ``DamagedFile``."""
        if not isinstance(value, dict):
            raise TypeError(f"{value!r} should be an object")
        context, stops = value["context"], _list(value["stops"])
        if not all(type(number) is int and number >= 0 for number in (context, *stops)):
            raise TypeError(f"{(context, *stops)} should be whole numbers")
        turns = value.get("turns")
        if turns is not None and not isinstance(turns, dict):
            raise TypeError(f"{turns!r} should be an object")
        paths = {name: _text(value[name]) for name in ("tokenizer", "template", "reference")}
        rise = value["max_rise"]
        if type(rise) not in (int, float):
            raise TypeError(f"{rise!r} should be a number")
        return cls(context=context, stops=tuple(stops), turns=turns, max_rise=rise, **paths)

    @property
    def files(self) -> tuple[str, ...]:
        """Those that must lie in the bundle."""
        return tuple(name for name in (self.tokenizer, self.template, self.reference) if name)


@dataclass(frozen=True)
class Manifest:
    """Everything a device must know to run the bundle, and everything needed to trust it.

    ``overrides`` lists what was kept although a check failed; ``files`` maps each path in the
    bundle to its sha256. ``calibration`` says on what data ranges were measured: the number of
    samples, where they come from, and the sha256 of their values.
    """

    model: str
    source: str
    licence: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    image: ImageInput | None
    labels: tuple[str, ...]
    artifacts: tuple[ArtifactEntry, ...]
    samples: tuple[str, ...]
    samples_source: str
    versions: Mapping[str, str]
    overrides: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, object] | None = None
    language: LanguageEntry | None = None

    def with_files(self, files: Mapping[str, str]) -> Manifest:
        """The same manifest for other file hashes."""
        return replace(self, files=dict(sorted(files.items())))

    def to_text(self) -> str:
        """The file's text, digest included; equal manifests give equal bytes."""
        body = {
            "schema": SCHEMA,
            "edgekit": edgekit.__version__,
            "model": {"name": self.model, "source": self.source, "licence": self.licence},
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "image": self.image.to_json() if self.image else None,
            "labels": list(self.labels),
            "artifacts": [entry.to_json() for entry in self.artifacts],
            "samples": {"files": list(self.samples), "source": self.samples_source},
            "calibration": None if self.calibration is None else dict(self.calibration),
            "language": self.language.to_json() if self.language else None,
            "versions": dict(self.versions),
            "overrides": list(self.overrides),
            "files": dict(self.files),
        }
        return json.dumps({**body, "digest": digest_of(body)}, indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``. Raises ``DamagedFile`` or ``NewerSchema``."""
    path = folder / NAME
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("digest", None) if isinstance(body, dict) else None
        found = digest_of(body)
    except FileNotFoundError as cause:
        raise DamagedFile(
            f"{folder} is no edgekit bundle: it has no {NAME}. Make one with edgekit export."
        ) from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise DamagedFile(f"{path} is damaged: {cause}. {_REMEDY}") from cause
    if not isinstance(body, dict) or type(body.get("schema")) is not int or body["schema"] < 1:
        raise DamagedFile(f"{path} is no edgekit manifest: it has no schema number. {_REMEDY}")
    if body["schema"] > SCHEMA:
        raise NewerSchema(path, body["schema"], SCHEMA)
    if digest != found:
        raise DamagedFile(f"{path} was altered: its digest does not fit its text. {_REMEDY}")
    try:
        manifest = _manifest_from_json(body)
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        reason = cause if isinstance(cause, DamagedFile) else repr(cause)
        raise DamagedFile(f"{path} is malformed: {reason}. {_REMEDY}") from cause
    _refuse_unlisted(path, manifest)
    for name in manifest.files:
        _refuse_escape(path, name)
    return manifest


_REMEDY = "Export the model again, or copy the bundle again from where it was made."


def _manifest_from_json(body: dict[str, Any]) -> Manifest:
    return Manifest(
        model=_text(body["model"]["name"]),
        source=_text(body["model"]["source"]),
        licence=_text(body["model"]["licence"]),
        inputs=tuple(TensorSpec.from_json(spec) for spec in _list(body["inputs"])),
        outputs=tuple(TensorSpec.from_json(spec) for spec in _list(body["outputs"])),
        image=None if body["image"] is None else ImageInput.from_json(body["image"]),
        labels=_texts(body["labels"]),
        artifacts=tuple(_entry_from_json(entry) for entry in _list(body["artifacts"])),
        samples=_texts(body["samples"]["files"]),
        samples_source=_text(body["samples"]["source"]),
        versions={_text(key): _text(value) for key, value in body["versions"].items()},
        overrides=_texts(body["overrides"]),
        files={_text(key): _text(value) for key, value in body["files"].items()},
        calibration=_calibration(body["calibration"] if body["schema"] > 1 else None),
        language=_language(body["language"] if body["schema"] > 2 else None),
    )


def _entry_from_json(value: dict[str, Any]) -> ArtifactEntry:
    if not isinstance(value["provenance"], dict):
        raise TypeError(f"{value['provenance']!r} should be an object")
    if value["main"] not in value["files"]:
        raise DamagedFile(f"{value['main']!r} is none of the artifact's files")
    return ArtifactEntry(
        target=_text(value["target"]),
        recipe=Recipe.from_json(value["recipe"]),
        main=_text(value["main"]),
        files=_texts(value["files"]),
        provenance=value["provenance"],
        layers=_text(value.get("layers", "")),
    )


def _calibration(value: object) -> Mapping[str, object] | None:
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"{value!r} should be an object")
    return value


def _language(value: object) -> LanguageEntry | None:
    return None if value is None else LanguageEntry.from_json(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} should be text")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} should be a list")
    return value


def _texts(value: object) -> tuple[str, ...]:
    return tuple(_text(item) for item in _list(value))


def _refuse_unlisted(path: Path, manifest: Manifest) -> None:
    inside = [
        f"{entry.name}/{name}"
        for entry in manifest.artifacts
        for name in (entry.main, *entry.files, "proof.json")
    ]
    layers = [entry.layers for entry in manifest.artifacts if entry.layers]
    words = manifest.language.files if manifest.language else ()
    listed = [*manifest.samples, *layers, *inside, *words]
    unlisted = [name for name in listed if name not in manifest.files]
    if unlisted:
        raise DamagedFile(f"{path} gives no hash for {unlisted[0]!r}. {_REMEDY}")


def _refuse_escape(path: Path, name: str) -> None:
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
        raise DamagedFile(
            f"{path} names the file {name!r}, which lies outside the bundle; it was not opened. "
            "Do not use this bundle."
        )
