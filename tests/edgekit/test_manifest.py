"""A manifest is read back as written, and nothing else is ever read from one."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import DamagedFile, EdgekitError, NewerSchema
from edgekit.evidence import digest_of
from edgekit.image import ImageInput
from edgekit.manifest import NAME, ArtifactEntry, Manifest, read_manifest
from edgekit.recipe import FP16, FP32
from edgekit.spec import Dim, TensorSpec

quick = settings(deadline=None, max_examples=50, derandomize=True)

WHOLE = Manifest(
    model="été",
    source="net.py:make",
    licence="MIT",
    inputs=(TensorSpec("x", (Dim("batch", 1, 8), 1, 4, 4), "float32"),),
    outputs=(TensorSpec("scores", (Dim("batch", 1, 8), 2), "float32"),),
    image=ImageInput("x", 1, 2, 2, (0.5,), (0.25,), 1),
    labels=("cat", "猫"),
    artifacts=(
        ArtifactEntry(
            "onnxruntime", FP32, "m.onnx", ("m.onnx", "m.data"), {"opset": 20}, "layers/model.npz"
        ),
        ArtifactEntry("executorch", FP16, "m.pte", ("m.pte",), {}),
    ),
    samples=("samples/0000.npz",),
    samples_source="random, seed 0",
    versions={"torch": "2"},
    overrides=("executorch-fp16 was kept unproven: no reason",),
    files=dict.fromkeys(
        (
            "README.md",
            "executorch-fp16/m.pte",
            "executorch-fp16/proof.json",
            "layers/model.npz",
            "onnxruntime-fp32/m.data",
            "onnxruntime-fp32/m.onnx",
            "onnxruntime-fp32/proof.json",
            "samples/0000.npz",
        ),
        "0" * 64,
    ),
)
BODY: dict[str, Any] = {
    key: value for key, value in json.loads(WHOLE.to_text()).items() if key != "digest"
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manifest")


def read(folder: Path, content: bytes) -> Manifest:
    (folder / NAME).write_bytes(content)
    return read_manifest(folder)


def read_forged(folder: Path, body: object) -> Manifest:
    """What an attacker can do: any body, with the digest made to fit."""
    text = json.dumps({**body, "digest": digest_of(body)}) if isinstance(body, dict) else "0"
    return read(folder, text.encode())


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every value inside a JSON value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def at(body: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        body = body[key]
    return body


# What may hold any JSON value of its own: plain values that edgekit hands on unread.
FREE = [path for path in places(BODY) if "provenance" in path[:-1] or path == ("edgekit",)]
FIXED = [path for path in places(BODY) if path not in FREE and path != ("schema",)]
# Without one of a list, or the hash of a file that nothing opens, the rest is a manifest. Bundles
# made before there were layers have no word of them.
NEEDED = [
    path
    for path in FIXED
    if isinstance(path[-1], str)
    and path not in (("versions", "torch"), ("files", "README.md"))
    and path[-1] != "layers"
]


def test_a_manifest_is_read_back_as_written(folder: Path) -> None:
    assert read(folder, WHOLE.to_text().encode()) == WHOLE
    assert read_forged(folder, BODY) == WHOLE


@quick
@given(
    model=st.text(st.characters(exclude_categories=["Cs"])),
    labels=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
    image=st.none() | st.just(WHOLE.image),
    versions=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from(["1", "2"])),
)
def test_any_text_in_a_manifest_survives(
    folder: Path,
    model: str,
    labels: tuple[str, ...],
    image: ImageInput | None,
    versions: dict[str, str],
) -> None:
    changed = Manifest(
        **{**vars(WHOLE), "model": model, "labels": labels, "image": image, "versions": versions}
    )
    assert read(folder, changed.to_text().encode()) == changed


def test_the_same_files_in_another_order_give_the_same_bytes() -> None:
    backwards = dict(sorted(WHOLE.files.items(), reverse=True))
    assert WHOLE.with_files(backwards).to_text() == WHOLE.to_text()


def test_a_manifest_cut_off_anywhere_is_damage(folder: Path) -> None:
    whole = WHOLE.to_text().encode()
    for length in [*range(0, len(whole) - 2, 17), *range(len(whole) - 40, len(whole) - 1)]:
        with pytest.raises(DamagedFile, match=r"manifest\.json .*(Export the model again|damaged)"):
            read(folder, whole[:length])


def test_a_flipped_bit_is_found_or_changes_nothing(folder: Path) -> None:
    whole = WHOLE.to_text().encode()
    generator = random.Random(0)
    for _ in range(300):
        altered = bytearray(whole)
        altered[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        with suppress(EdgekitError):
            assert read(folder, bytes(altered)) == WHOLE


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b"{}",
        b'{"schema": "1"}',
        b'{"schema": true}',
        b'{"schema": 0}',
        b'{"schema": -1}',
        b'{"schema": 1.0}',
        b'{"schema": 1}',
        b'{"schema": 1, "digest": null}',
        b"\xff\xfe",
        b'{"schema": ' + b"9" * 5000 + b"}",
        b"\x00" * 20,
    ],
)
def test_what_is_no_manifest_is_damage(folder: Path, content: bytes) -> None:
    with pytest.raises(DamagedFile, match="Export the model again, or copy the bundle again"):
        read(folder, content)


@pytest.mark.parametrize("depth", [900, 980, 985, 990, 995, 1000, 50_000])
def test_a_manifest_nested_too_deep_is_damage(folder: Path, depth: int) -> None:
    text = '{"schema": 1, "digest": "", "x": ' + "[" * depth + "]" * depth + "}"
    with pytest.raises(DamagedFile, match="Export the model again, or copy the bundle again"):
        read(folder, text.encode())


def test_a_folder_without_a_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"it has no manifest\.json\. Make one with edgekit exp"):
        read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(DamagedFile, match=r"is damaged: .*Is a directory"):
        read_manifest(tmp_path)


def test_a_schema_that_never_was_is_damage(folder: Path) -> None:
    for schema in (0, -1, True, "1", None):
        with pytest.raises(DamagedFile, match="is no edgekit manifest: it has no schema number"):
            read_forged(folder, {**BODY, "schema": schema})


def test_a_newer_schema_is_told_apart_from_damage(folder: Path) -> None:
    with pytest.raises(
        NewerSchema,
        match=r"has schema 4 and this edgekit reads up to 3; run: pip install --upgrade",
    ):
        read_forged(folder, {"schema": 4})


@pytest.mark.parametrize("path", FIXED, ids=lambda path: ".".join(map(str, path)))
def test_a_field_of_the_wrong_type_is_damage(folder: Path, path: tuple[str | int, ...]) -> None:
    right = at(BODY, path)
    for wrong in (None, True, 3, -1, 1.5, "text", [], {}, [None], {"a": None}, [["a", "b"]]):
        if type(wrong) is type(right) and not isinstance(right, list | dict | int):
            continue
        body = copy.deepcopy(BODY)
        at(body, path[:-1])[path[-1]] = wrong
        with suppress(DamagedFile):
            # An empty list of labels, say, is another manifest, but a valid one: read as it is.
            text = read_forged(folder, body).to_text()
            assert json.loads(text) == json.loads((folder / NAME).read_bytes())


@pytest.mark.parametrize("path", NEEDED, ids=lambda path: ".".join(map(str, path)))
def test_a_missing_field_is_damage(folder: Path, path: tuple[str | int, ...]) -> None:
    body = copy.deepcopy(BODY)
    del at(body, path[:-1])[path[-1]]
    with pytest.raises(DamagedFile, match=r"manifest\.json is malformed|gives no hash for"):
        read_forged(folder, body)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../outside",
        "a/../../outside",
        "onnxruntime-fp32/..",
        "..\\outside",
        "C:\\outside",
        "C:outside",
        "//server/share",
    ],
)
def test_a_path_out_of_the_bundle_is_refused_even_with_a_fitting_digest(
    folder: Path, name: str
) -> None:
    body = copy.deepcopy(BODY)
    body["files"][name] = "0" * 64
    with pytest.raises(
        DamagedFile, match=r"lies outside the bundle; it was not opened\. Do not use"
    ):
        read_forged(folder, body)


Change = Callable[[dict[str, Any]], None]


def leave_by_target(body: dict[str, Any]) -> None:
    body["artifacts"][1]["target"] = "../x"
    body["files"] |= {"../x-fp16/m.pte": "0", "../x-fp16/proof.json": "0"}


def leave_by_main(body: dict[str, Any]) -> None:
    body["artifacts"][1] |= {"main": "../../m.pte", "files": ["../../m.pte"]}
    body["files"]["executorch-fp16/../../m.pte"] = "0"


def leave_by_sample(body: dict[str, Any]) -> None:
    body["samples"]["files"] = ["/dev/zero"]
    body["files"]["/dev/zero"] = "0"


def leave_by_layers(body: dict[str, Any]) -> None:
    body["artifacts"][0]["layers"] = "../layers.npz"
    body["files"]["../layers.npz"] = "0"


@pytest.mark.parametrize(
    "change", [leave_by_target, leave_by_main, leave_by_sample, leave_by_layers]
)
def test_no_other_field_leads_out_of_the_bundle(folder: Path, change: Change) -> None:
    body = copy.deepcopy(BODY)
    change(body)
    with pytest.raises(DamagedFile, match="lies outside the bundle; it was not opened"):
        read_forged(folder, body)


@pytest.mark.parametrize(
    "name",
    [
        "samples/0000.npz",
        "onnxruntime-fp32/m.data",
        "executorch-fp16/proof.json",
        "layers/model.npz",
    ],
)
def test_a_file_without_a_hash_is_damage(folder: Path, name: str) -> None:
    body = copy.deepcopy(BODY)
    del body["files"][name]
    with pytest.raises(DamagedFile, match=rf"manifest\.json gives no hash for '{name}'"):
        read_forged(folder, body)


def test_a_main_file_that_is_none_of_the_files_is_damage(folder: Path) -> None:
    body = copy.deepcopy(BODY)
    body["artifacts"][0]["main"] = "proof.json"
    with pytest.raises(DamagedFile, match=r"'proof\.json' is none of the artifact's files"):
        read_forged(folder, body)


def test_a_manifest_made_before_there_were_layers_is_read_without_them(folder: Path) -> None:
    body = copy.deepcopy(BODY)
    for entry in body["artifacts"]:
        del entry["layers"]
    assert [entry.layers for entry in read_forged(folder, body).artifacts] == ["", ""]
    assert [entry.layers for entry in WHOLE.artifacts] == ["layers/model.npz", ""]
