"""A bundle opens only when every file is what it was, and is written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle import Bundle, check_destination, open_bundle, write_bundle
from edgekit.errors import DamagedFile, NewerSchema, StorageError, UnknownName, UsageError
from edgekit.evidence import ON_DEVICE, digest_of, open_shipped, write_evidence
from edgekit.files import sha256
from edgekit.gate import TRIED, Attempt
from edgekit.layers import Layer, layer_from_values, layers_to_bytes
from edgekit.manifest import NAME
from edgekit.recipe import INT8
from edgekit.testing import example_bundle, example_reference

REPLAY = "replay-fp32"
FILES = (
    "README.md",
    f"{REPLAY}/proof.json",
    f"{REPLAY}/replay.npz",
    "samples/0000.npz",
    "samples/0001.npz",
    "samples/0002.npz",
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return example_bundle(tmp_path / "bundle")


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make its digest fit, as an attacker would."""
    body = json.loads((folder / NAME).read_bytes())
    del body["digest"]
    change(body)
    (folder / NAME).write_text(json.dumps({**body, "digest": digest_of(body)}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_a_bundle_opens_as_it_was_written(bundle: Bundle) -> None:
    assert open_bundle(bundle.folder) == bundle
    assert open_bundle(str(bundle.folder)) == bundle
    assert listing(bundle.folder) == sorted([*FILES, NAME])
    assert set(bundle.manifest.files) == set(FILES)


def test_the_reference_comes_back_bit_for_bit(bundle: Bundle) -> None:
    found, expected = open_bundle(bundle.folder).reference(), example_reference()
    assert found.source == expected.source
    for index in range(3):
        assert np.array_equal(found.samples[index]["x"], expected.samples[index]["x"])
        assert np.array_equal(found.expected[index]["scores"], expected.expected[index]["scores"])


def test_two_exports_of_the_same_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = example_bundle(tmp_path / "a"), example_bundle(tmp_path / "b")
    for name in (*FILES, NAME):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [flip, cut, extend, empty])
def test_a_changed_byte_in_any_file_is_found(
    bundle: Bundle, name: str, harm: Callable[[Path], None]
) -> None:
    harm(bundle.folder / name)
    with pytest.raises(DamagedFile, match=rf"{name} was altered or cut short: .*Copy the bundle"):
        open_bundle(bundle.folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle: Bundle, name: str) -> None:
    (bundle.folder / name).unlink()
    with pytest.raises(DamagedFile, match=rf"{name} is missing; copy the bundle again") as caught:
        open_bundle(bundle.folder)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_refused_though_its_bytes_fit(
    bundle: Bundle, tmp_path: Path, name: str
) -> None:
    path = bundle.folder / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedFile, match=rf"{name} is a symbolic link; a bundle holds plain"):
        open_bundle(bundle.folder)


def test_a_link_in_place_of_a_folder_is_refused_though_its_bytes_fit(
    bundle: Bundle, tmp_path: Path
) -> None:
    (bundle.folder / "samples").rename(tmp_path / "elsewhere")
    (bundle.folder / "samples").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedFile, match=r"samples/0000\.npz is a symbolic link"):
        open_bundle(bundle.folder)


def test_a_link_that_leads_nowhere_is_refused(bundle: Bundle) -> None:
    (bundle.folder / "README.md").unlink()
    (bundle.folder / "README.md").symlink_to("nowhere")
    with pytest.raises(DamagedFile, match=r"README\.md is a symbolic link"):
        open_bundle(bundle.folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(bundle: Bundle) -> None:
    (bundle.folder / "README.md").unlink()
    os.mkfifo(bundle.folder / "README.md")
    with pytest.raises(DamagedFile, match=r"README\.md is no plain file; a bundle holds nothing"):
        open_bundle(bundle.folder)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("samples", "is no plain file"),
        (".", "is no plain file"),
        ("a" * 300, "cannot be read: File name too long"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("\ud800", "cannot be read: 'utf-8' codec"),
        ("README.md/inner", "cannot be read: Not a directory"),
    ],
)
def test_a_name_that_no_file_can_have_is_damage(bundle: Bundle, name: str, sentence: str) -> None:
    forge(bundle.folder, lambda body: body["files"].update({name: "0" * 64}))
    with pytest.raises(DamagedFile, match=sentence):
        open_bundle(bundle.folder)


def test_an_outside_file_is_not_even_read(bundle: Bundle, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    digest = sha256(secret)
    forge(bundle.folder, lambda body: body["files"].update({"../secret": digest}))
    with pytest.raises(DamagedFile, match=r"'\.\./secret', which lies outside the bundle"):
        open_bundle(bundle.folder)


def test_a_bundle_from_a_newer_edgekit_says_how_to_upgrade(bundle: Bundle) -> None:
    forge(bundle.folder, lambda body: body.update(schema=9))
    with pytest.raises(NewerSchema, match=r"has schema 9 .* pip install --upgrade edgekit-sdk"):
        open_bundle(bundle.folder)


@pytest.mark.parametrize("name", ["none", "a" * 300])
def test_a_folder_that_is_not_there_says_how_to_make_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UsageError, match=r"there is no bundle folder .*edgekit export MODEL -o DIR"
    ):
        open_bundle(tmp_path / name)


def test_an_artifact_is_found_by_its_name_its_target_or_alone(bundle: Bundle) -> None:
    assert bundle.artifacts == (REPLAY,)
    for name in (REPLAY, "replay", None):
        artifact = bundle.artifact(name)
        assert artifact.name == REPLAY
        assert artifact.source == bundle.folder / REPLAY / "replay.npz"
        assert artifact.size == (bundle.folder / REPLAY / "replay.npz").stat().st_size


def test_an_artifact_that_is_not_there_is_answered_with_those_that_are(bundle: Bundle) -> None:
    with pytest.raises(
        UnknownName,
        match=r"unknown artifact 'replay-fp61'; did you mean 'replay-fp32'\? There is: replay-fp32",
    ):
        bundle.artifact("replay-fp61")


def test_the_proof_comes_back_and_a_measurement_only_after_one(bundle: Bundle) -> None:
    assert bundle.proof(REPLAY).passed
    assert bundle.measurement(REPLAY) is None
    for p50 in (1.5, 2.5):
        bundle.write_measurement(REPLAY, {"p50_ms": p50})
        assert open_bundle(bundle.folder).measurement(REPLAY) == {"p50_ms": p50}


@pytest.mark.parametrize("content", ["[1.5]", '{"p50_ms": 1.5}', '{"p50_ms": 1.5, "digest": "a"}'])
def test_a_measurement_that_was_altered_is_damage(bundle: Bundle, content: str) -> None:
    (bundle.folder / REPLAY / "perf.json").write_text(content)
    with pytest.raises(DamagedFile, match=r"perf\.json was altered.*run edgekit profile again"):
        open_bundle(bundle.folder)


def test_a_measurement_is_a_plain_file(bundle: Bundle) -> None:
    (bundle.folder / REPLAY / "perf.json").symlink_to("/etc/hostname")
    with pytest.raises(DamagedFile, match=r"perf\.json is no plain file"):
        open_bundle(bundle.folder)


def test_a_proof_that_is_no_json_is_damage(bundle: Bundle) -> None:
    (bundle.folder / REPLAY / "proof.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"proof\.json cannot be read: "):
        bundle.proof(REPLAY)


def test_a_measurement_leaves_every_other_file_as_it_was(bundle: Bundle) -> None:
    (bundle.folder / "mine.txt").write_text("the user's own")
    before = {name: sha256(bundle.folder / name) for name in listing(bundle.folder)}
    bundle.write_measurement(REPLAY, {})
    after = {name: sha256(bundle.folder / name) for name in listing(bundle.folder)}
    del after[f"{REPLAY}/perf.json"]
    assert before == after


def test_a_second_measurement_that_cannot_be_written_leaves_the_first(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.write_measurement(REPLAY, {"p50_ms": 1.5})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        bundle.write_measurement(REPLAY, {"p50_ms": 2.5})
    assert open_bundle(bundle.folder).measurement(REPLAY) == {"p50_ms": 1.5}
    assert [name for name in listing(bundle.folder) if "partial" in name] == []


def test_what_a_stopped_export_left_is_no_bundle(bundle: Bundle) -> None:
    debris = bundle.folder.rename(bundle.folder.with_name(".bundle.123.partial"))
    with pytest.raises(DamagedFile, match="what a stopped export left, not a bundle; delete it"):
        open_bundle(debris)


def test_a_bundle_can_be_measured_from_inside_and_through_a_link(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(bundle.folder)
    open_bundle(link).write_measurement(REPLAY, {"p50_ms": 1.5})
    monkeypatch.chdir(bundle.folder)
    assert open_bundle(".").measurement(REPLAY) == {"p50_ms": 1.5}
    open_bundle(".").write_measurement(REPLAY, {"p50_ms": 2.5})
    assert open_bundle(link).measurement(REPLAY) == {"p50_ms": 2.5}


def test_a_name_of_any_script_is_written_under_any_locale(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from edgekit.testing import example_bundle;"
        "example_bundle(pathlib.Path(sys.argv[1]), labels=['\\u732b', '\\xe9', 'c', 'd'])"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b")], env={**os.environ, **plain}, check=True
    )
    assert open_bundle(tmp_path / "b").manifest.labels[:2] == ("猫", "é")


def test_a_new_folder_and_an_empty_one_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "deep/er/new"):
        check_destination(tmp_path / name, overwrite=False)
        example_bundle(tmp_path / name)
        open_bundle(tmp_path / name)


def test_a_bundle_is_not_replaced_unless_asked(bundle: Bundle) -> None:
    with pytest.raises(
        UsageError, match=r"exists and holds a bundle; .*replace it with --overwrite"
    ):
        example_bundle(bundle.folder)
    check_destination(bundle.folder, overwrite=True)


def test_overwriting_leaves_no_file_of_the_old_bundle(bundle: Bundle) -> None:
    reference = example_reference(1)
    written = write_bundle(
        bundle.folder,
        replace(bundle.manifest, samples=("samples/0000.npz",), files={}),
        artifacts=[bundle.artifact()],
        proofs=[bundle.proof(REPLAY)],
        reference=reference,
        readme="y\n",
        overwrite=True,
    )
    assert open_bundle(bundle.folder) == written
    assert len(list((bundle.folder / "samples").iterdir())) == 1
    assert [path.name for path in bundle.folder.parent.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_not_touched_even_when_asked(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"is no bundle; nothing in it was touched\. Choose a new"):
        check_destination(tmp_path, overwrite=True)


@pytest.mark.parametrize("name", [".", "..", "/", "out/..", "x.partial"])
def test_a_name_that_cannot_be_renamed_onto_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a bundle's name; give a new folder with -o"):
        check_destination(Path(name), overwrite=True)


def test_a_file_or_a_link_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UsageError, match=f"{name} exists and is no folder; choose another wi"):
            check_destination(tmp_path / name, overwrite=True)
    with pytest.raises(UsageError, match=r"file is a file, so .*out cannot be made; choose anoth"):
        check_destination(tmp_path / "file" / "out", overwrite=False)


def test_a_name_that_is_too_long_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the name is too long; choose a shorter one"):
        check_destination(tmp_path / ("a" * 300), overwrite=False)


@pytest.mark.parametrize("name", ["new", "deep/new"])
def test_a_place_that_is_not_writable_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(StorageError, match=f"{tmp_path} is not writable; choose another folder wi"):
        check_destination(tmp_path / name, overwrite=False)


def test_a_bundle_whose_parent_is_not_writable_cannot_be_replaced(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(StorageError, match="is not writable; choose another folder with -o"):
        check_destination(bundle.folder, overwrite=True)


LAYERS = "layers/model.npz"


def with_layers(bundle: Bundle, layers: list[Layer]) -> Bundle:
    """The same bundle with eager values of these layers."""
    (entry,) = bundle.manifest.artifacts
    return write_bundle(
        bundle.folder,
        replace(bundle.manifest, artifacts=(replace(entry, layers=LAYERS),), files={}),
        artifacts=[bundle.artifact()],
        proofs=[bundle.proof(REPLAY)],
        reference=example_reference(),
        readme="x\n",
        extra={LAYERS: layers_to_bytes(layers)},
        overwrite=True,
    )


def test_layers_come_back_as_they_were_kept(bundle: Bundle) -> None:
    layer = layer_from_values("mul", "aten.mul.Tensor", "head", np.arange(9.0))
    written = with_layers(bundle, [layer])
    assert open_bundle(bundle.folder) == written
    assert LAYERS in written.manifest.files
    (found,) = open_bundle(bundle.folder).layers(REPLAY)
    assert (found.node, found.op, found.module, found.size) == ("mul", "aten.mul.Tensor", "head", 9)
    assert np.array_equal(found.values, layer.values)


def test_a_bundle_made_before_there_were_layers_has_none(bundle: Bundle) -> None:
    assert bundle.layers(REPLAY) == []
    forge(bundle.folder, lambda body: body["artifacts"][0].pop("layers"))
    assert open_bundle(bundle.folder).layers(REPLAY) == []


@pytest.mark.parametrize("harm", [flip, cut, extend, empty])
def test_a_changed_byte_in_the_layers_is_found(
    bundle: Bundle, harm: Callable[[Path], None]
) -> None:
    with_layers(bundle, [])
    harm(bundle.folder / LAYERS)
    with pytest.raises(DamagedFile, match=rf"{LAYERS} was altered or cut short"):
        open_bundle(bundle.folder)


def on_device(bundle: Bundle, *reasons: Sequence[str]) -> None:
    """What a script writes that found these failures, a proof each."""
    shipped = open_shipped(bundle.folder / REPLAY)
    write_evidence(
        shipped.folder,
        [shipped.prove(shipped.expected, {"processor": "Orin"}, failures=why) for why in reasons],
    )


def test_without_a_device_the_proof_of_the_export_stands(bundle: Bundle) -> None:
    assert bundle.device_proofs(REPLAY) == ()
    assert bundle.standing(REPLAY) == "executed"


@pytest.mark.parametrize(
    ("reasons", "standing"),
    [
        ([[]], "on-device"),
        ([[], []], "on-device"),
        ([["No."]], "fails on device"),
        ([[], ["No."]], "fails on device"),
        ([], "executed"),
    ],
)
def test_a_device_has_the_last_word(
    bundle: Bundle, reasons: list[list[str]], standing: str
) -> None:
    on_device(bundle, *reasons)
    found = open_bundle(bundle.folder)
    assert [list(proof.failures) for proof in found.device_proofs(REPLAY)] == reasons
    assert {proof.level for proof in found.device_proofs(REPLAY)} <= {"on-device"}
    assert found.standing(REPLAY) == standing


def test_an_artifact_kept_unproven_is_not_proven_by_a_device(bundle: Bundle) -> None:
    on_device(bundle, [])
    failed = {**bundle.proof(REPLAY).to_json(), "failures": ["It differs."]}
    (bundle.folder / REPLAY / "proof.json").write_text(json.dumps(failed))
    assert bundle.standing(REPLAY) == "not proven"


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [halve, empty])
def test_what_came_after_the_export_and_was_cut_short_says_how_to_make_it_again(
    bundle: Bundle, harm: Callable[[Path], None]
) -> None:
    bundle.write_measurement(REPLAY, {"p50_ms": 1.5})
    on_device(bundle, [])
    for file, remedy in (("perf.json", "profile again"), (ON_DEVICE, "script on the device again")):
        harm(bundle.folder / REPLAY / file)
        with pytest.raises(
            DamagedFile, match=rf"{file} cannot be read: .*\. Delete it and run .* {remedy}\.$"
        ):
            open_bundle(bundle.folder)
        (bundle.folder / REPLAY / file).unlink()


def alter(path: Path) -> None:
    path.write_text(path.read_text().replace("Orin", "Thor"))


def test_what_a_device_found_and_someone_altered_is_damage(bundle: Bundle) -> None:
    on_device(bundle, [])
    alter(bundle.folder / REPLAY / ON_DEVICE)
    with pytest.raises(
        DamagedFile,
        match=r"on-device\.json was altered or cut short; delete it and run the artifact's script "
        r"on the device again\.$",
    ):
        open_bundle(bundle.folder)


@pytest.mark.parametrize("proofs", [[3], [{}], ["text"], [None]])
def test_a_device_that_writes_no_proofs_is_damage(bundle: Bundle, proofs: list[object]) -> None:
    body = {"proofs": proofs}
    text = json.dumps({**body, "digest": digest_of(body)})
    (bundle.folder / REPLAY / ON_DEVICE).write_text(text)
    with pytest.raises(DamagedFile, match="a proof in the bundle is malformed"):
        open_bundle(bundle.folder)


def test_what_a_device_found_is_a_plain_file(bundle: Bundle) -> None:
    (bundle.folder / REPLAY / ON_DEVICE).symlink_to("/etc/hostname")
    with pytest.raises(DamagedFile, match=r"on-device\.json is no plain file"):
        open_bundle(bundle.folder)


def with_tried(bundle: Bundle, content: bytes) -> Path:
    """The bundle with a table of what was tried, hashes right."""
    (bundle.folder / TRIED).write_bytes(content)
    digest = sha256(bundle.folder / TRIED)
    forge(bundle.folder, lambda body: body["files"].update({TRIED: digest}))
    return bundle.folder


def test_what_was_tried_is_in_the_bundle(bundle: Bundle) -> None:
    attempts = [
        Attempt("replay-int8", INT8, sqnr_db=12.5).judged("refused", "it is far off"),
        Attempt("replay-fp32", INT8).judged("chosen", "the fastest"),
    ]
    text = json.dumps([attempt.to_json() for attempt in attempts])
    assert open_bundle(with_tried(bundle, text.encode())).tried() == attempts


def test_a_bundle_for_which_nothing_was_tried_has_no_table(bundle: Bundle) -> None:
    assert bundle.tried() == []
    (bundle.folder / TRIED).write_text("of somebody else, not in the manifest")
    assert open_bundle(bundle.folder).tried() == []


@pytest.mark.parametrize("content", [b"", b"{}", b"7", b"[7]", b'[{"artifact": "x"}]', b"\xff"])
def test_a_table_that_is_none_is_damage(bundle: Bundle, content: bytes) -> None:
    whole = open_bundle(with_tried(bundle, content))
    with pytest.raises(DamagedFile, match=r"cannot be read|is no list|is malformed"):
        whole.tried()


def test_a_table_that_was_altered_is_found_by_its_hash(bundle: Bundle) -> None:
    with_tried(bundle, b"[]")
    (bundle.folder / TRIED).write_bytes(b"[ ]")
    with pytest.raises(DamagedFile, match=r"tried\.json was altered or cut short"):
        open_bundle(bundle.folder)
