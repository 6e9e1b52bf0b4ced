"""Bundles: what is written can be read, and nothing changed, missing, added or out of place is ever opened."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.bundle import (
    BuildProvenance,
    EngineRef,
    Manifest,
    PassRecord,
    contents,
)
from mtu_compile.bundle.files import _sealed
from mtu_compile.core.errors import EXIT_INPUT, BundleError, ConfigError, MtuError
from tests.bundle import small

CONTENT = {**small.CONTENT, "unet_edit/openvino_model.xml": b"<net/>"}
ACCURACY = {"measured_with": "a test", "worst_sqnr_db": 31.5, "ssim": 0.99, "another": math.inf}


def example() -> Manifest:
    """``small.describe``, with more in it."""
    given = small.describe()
    passes = (PassRecord("mtu::bind-task", True, 3), PassRecord("mtu::drop-experts", False, 0))
    t2i, edit = given.tasks["t2i"], given.tasks["edit"]
    return replace(
        given,
        tools={"mtu-compile": "0.1.0", "openvino": "2026.4.1"},
        scheduler={"_class_name": "DDIMScheduler", "lambda_min_clipped": -math.inf, "trained_betas": None},
        tasks={
            "t2i": replace(t2i, passes=passes, calibration="1" * 64, accuracy=ACCURACY, accuracy_reason=None),
            "edit": replace(edit, accuracy_reason="no Jetson attached"),
        },
        provenance=BuildProvenance(as_task="t2i"),
    )


@pytest.fixture
def made(tmp_path: Path) -> Path:
    with bundle.staging(tmp_path / "made") as folder:
        for name, content in CONTENT.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        bundle.write(folder, example())
    return tmp_path / "made"


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as an attacker would who also recomputes its hash."""
    raw = json.loads((path / "manifest.json").read_text())
    change(raw)
    (path / "manifest.json").write_bytes(_sealed(raw))


def refused(path: Path, *words: str) -> BundleError:
    with pytest.raises(BundleError) as caught:
        bundle.read(path)
    assert caught.value.exit_code == EXIT_INPUT
    for word in words:
        assert word in caught.value.message
    return caught.value


def test_round_trip(made: Path) -> None:
    manifest = bundle.read(made)
    assert set(manifest.files) == set(CONTENT)
    expected = example()
    assert manifest.tasks["edit"] == expected.tasks["edit"]
    assert list(manifest.tasks) == ["t2i", "edit"]
    assert replace(manifest.tasks["t2i"], accuracy=None) == replace(expected.tasks["t2i"], accuracy=None)
    assert manifest.tasks["t2i"].accuracy == {**ACCURACY, "another": "inf"}
    assert manifest.scheduler["lambda_min_clipped"] == "-inf"
    same = {"files": {}, "tasks": {}, "scheduler": {}}
    assert replace(manifest, **same) == replace(expected, **same)
    assert manifest.latent_size == (8, 12)
    json.loads((made / "manifest.json").read_text(), parse_constant=pytest.fail)  # valid JSON for other tools too


@pytest.mark.parametrize("name", [*CONTENT, "manifest.json"])
def test_any_changed_byte_is_refused(made: Path, name: str) -> None:
    content = (made / name).read_bytes()
    step = max(1, len(content) // 40)
    for position in {0, len(content) - 1, *range(0, len(content), step)}:
        changed = bytearray(content)
        changed[position] ^= 1
        (made / name).write_bytes(changed)
        refused(made, name)
    (made / name).write_bytes(content)
    bundle.read(made)


@pytest.mark.parametrize("name", [*CONTENT, "manifest.json"])
def test_truncated_or_longer_files_are_refused(made: Path, name: str) -> None:
    content = (made / name).read_bytes()
    for other in (content[:-1], b"", content + b"\n"):
        (made / name).write_bytes(other)
        refused(made, name)


@pytest.mark.parametrize("name", [*CONTENT, "manifest.json"])
def test_missing_files_are_refused(made: Path, name: str) -> None:
    (made / name).unlink()
    refused(made, name)


@pytest.mark.parametrize("name", ["unet/plugins.xml", "extra.txt", "unet_edit/.hidden", "new/deep/file"])
def test_added_files_are_refused(made: Path, name: str) -> None:
    (made / name).parent.mkdir(parents=True, exist_ok=True)
    (made / name).write_bytes(b"")
    refused(made, name, "does not belong")


def test_links_and_pipes_are_refused_before_they_are_opened(made: Path, tmp_path: Path) -> None:
    weights = made / "unet_edit/openvino_model.bin"
    outside = tmp_path / "outside"
    outside.write_bytes(weights.read_bytes())  # same content: only the link itself can give it away
    weights.unlink()
    weights.symlink_to(outside)
    refused(made, "unet_edit/openvino_model.bin", "symbolic link")
    weights.unlink()
    os.mkfifo(weights)  # opening it would hang
    refused(made, "unet_edit/openvino_model.bin", "not a plain file")
    weights.unlink()
    weights.mkdir()
    refused(made, "unet_edit/openvino_model.bin")


def test_a_linked_folder_is_refused(made: Path, tmp_path: Path) -> None:
    (made / "unet_edit").rename(tmp_path / "elsewhere")
    (made / "unet_edit").symlink_to(tmp_path / "elsewhere")
    refused(made, "unet_edit", "symbolic link")
    with pytest.raises(BundleError, match="symbolic link"):
        bundle.resolve(made, "unet_edit/openvino_model.xml")


def test_a_linked_manifest_is_refused_but_a_linked_bundle_is_not(made: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(made)
    bundle.read(tmp_path / "current")
    (made / "manifest.json").rename(tmp_path / "manifest.json")
    (made / "manifest.json").symlink_to(tmp_path / "manifest.json")
    refused(made, "manifest.json", "symbolic link")


PATHS = ["/etc/passwd", "../made/unet/openvino_model.xml", "unet/../../x", "a\\..\\b", "C:/x", "C:x", "//host/x"]


@pytest.mark.parametrize("path", [*PATHS, "", ".", "./unet/openvino_model.xml", "unet//openvino_model.xml", "a\n/b"])
@pytest.mark.parametrize("verify", [True, False])
def test_paths_that_leave_the_bundle_are_refused(made: Path, path: str, verify: bool) -> None:
    def as_file(raw: dict[str, Any]) -> None:
        raw["files"][path] = "0" * 64

    def as_engine(raw: dict[str, Any]) -> None:
        raw["files"].pop(path)
        raw["tasks"]["edit"]["engine"]["path"] = path

    no_path = "not a plain path inside the bundle"
    for change, says in (
        (as_file, no_path if path.isprintable() else "letters that do not print"),
        (as_engine, no_path),
    ):
        reseal(made, change)
        with pytest.raises(BundleError, match=says):
            bundle.read(made, verify=verify)
    with pytest.raises(BundleError):
        bundle.resolve(made, path)


def test_an_engine_that_is_not_among_the_files_is_refused(made: Path) -> None:
    (made / "unet/other.xml").write_bytes(b"<net/>")
    reseal(made, lambda raw: raw["tasks"]["edit"]["engine"].update(path="unet/other.xml"))
    for verify in (True, False):
        with pytest.raises(BundleError, match=r"tasks\.edit\.engine names 'unet/other\.xml'"):
            bundle.read(made, verify=verify)


@pytest.mark.parametrize("path", [*PATHS, "unet/gone.bin"])
def test_shared_weights_are_a_file_of_the_bundle(made: Path, path: str) -> None:
    reseal(made, lambda raw: raw["tasks"]["edit"]["engine"].update(weights=path, weights_bytes=3))
    for verify in (True, False):
        with pytest.raises(BundleError, match=r"tasks\.edit\.engine\.weights names"):
            bundle.read(made, verify=verify)


def test_shared_weights_say_how_much_is_read_of_them(made: Path) -> None:
    name = "unet_edit/openvino_model.bin"
    reseal(made, lambda raw: raw["tasks"]["t2i"]["engine"].update(weights=name))
    refused(made, "tasks.t2i.engine needs both weights and weights_bytes")
    reseal(made, lambda raw: raw["tasks"]["t2i"]["engine"].update(weights_bytes=3000))
    manifest = bundle.read(made)
    (sharing,) = contents.shared_weights(manifest)[name]
    assert sharing == manifest.tasks["t2i"].engine
    assert contents.graph_files(manifest, sharing) == ("unet/openvino_model.xml",)
    alone = manifest.tasks["edit"].engine
    assert contents.graph_files(manifest, alone) == (name, "unet_edit/openvino_model.xml")
    assert contents.bytes_of(made, contents.graph_files(manifest, alone)) == 5000 + len(b"<net/>")


def shared(raw: dict[str, Any]) -> None:
    raw["routing"] = "shared"
    raw["tasks"]["edit"]["engine"] = raw["tasks"]["t2i"]["engine"]


def test_tasks_that_share_a_unet_have_the_same_one_and_a_row_each(made: Path) -> None:
    assert bundle.read(made).routing == "static"
    reseal(made, shared)
    assert bundle.read(made).routing == "shared"

    def another_recipe(raw: dict[str, Any]) -> None:
        raw["tasks"]["edit"]["engine"] = {**raw["tasks"]["edit"]["engine"], "config": {"device": "GPU"}}

    reseal(made, another_recipe)
    refused(made, "tasks.t2i.engine", "tasks.edit.engine")

    def same_row(raw: dict[str, Any]) -> None:
        shared(raw)
        raw["tasks"]["edit"]["task_id"] = 0

    reseal(made, same_row)
    refused(made, "'t2i'", "'edit'", "task_id 0")


@pytest.mark.parametrize("version", [0, 3, "1", None, True, 1.0])
def test_unknown_schema_versions_are_named(made: Path, version: Any) -> None:
    reseal(made, lambda raw: raw.update(schema_version=version, later={"shape": 1}))
    assert "rebuild" in str(refused(made, f"schema version {version!r}").hint)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.pop("scaling_factor"), "scaling_factor is missing"),
        (lambda raw: raw.update(scaling_factor=0), "scaling_factor"),
        (lambda raw: raw["text"].update(max_length="77"), "text.max_length"),
        (lambda raw: raw["text"].update(max_length=True), "text.max_length"),
        (lambda raw: raw.update(image_size=[64]), "image_size"),
        (lambda raw: raw.update(image_size=[64, 33]), "image_size"),
        (lambda raw: raw.update(surprise=1), "surprise is 1, expected no such key"),
        (lambda raw: raw.update(tasks={}), "no tasks"),
        (lambda raw: raw["tasks"]["edit"].update(default_steps=0), "tasks.edit.default_steps"),
        (lambda raw: raw["tasks"]["edit"]["task"].update(guidance="magic"), "magic"),
        (lambda raw: raw["tasks"]["edit"]["task"].update(name="paint"), "tasks.edit"),
        (lambda raw: raw["tasks"]["edit"].update(accuracy_reason=None), "tasks.edit needs either an accuracy"),
        (lambda raw: raw["tasks"]["t2i"].update(accuracy_reason="none"), "tasks.t2i needs either an accuracy"),
        (lambda raw: raw.update(tasks=[]), "tasks"),
    ],
)
def test_senseless_manifests_are_refused_by_entry(made: Path, change: Any, words: str) -> None:
    reseal(made, change)
    refused(made, "manifest.json", words)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": 2}'])
def test_manifests_that_are_not_manifests_are_refused(made: Path, content: bytes) -> None:
    (made / "manifest.json").write_bytes(content)
    refused(made, "manifest.json")


def test_what_is_not_a_bundle_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "has no manifest.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is not a folder")


def test_without_verification_a_hand_edited_manifest_is_read(made: Path) -> None:
    raw = json.loads((made / "manifest.json").read_text())
    raw["tasks"]["edit"]["default_steps"] = 7
    (made / "manifest.json").write_text(json.dumps(raw))
    refused(made, "manifest.json", "hash")
    assert bundle.read(made, verify=False).tasks["edit"].default_steps == 7


def test_write_refuses_what_read_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"text\.tokenizer names 'tokenizer/tokenizer\.json'"):
        bundle.write(tmp_path, example())
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    wrong = EngineRef("openvino", "vae_decoder/openvino_model.xml", {"NUM_STREAMS": 1})  # type: ignore[dict-item]
    with pytest.raises(BundleError, match="NUM_STREAMS"):
        bundle.write(tmp_path, replace(example(), vae_decoder=wrong))
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / "link").symlink_to("model_index.json")
    with pytest.raises(BundleError, match="link is a symbolic link"):
        bundle.write(tmp_path, example())


# Staging


def test_staging_appears_whole_at_the_end(tmp_path: Path) -> None:
    with bundle.staging(tmp_path / "a/b/out") as folder:
        assert folder.parent == tmp_path / "a/b"  # same file system, so that the rename is atomic
        (folder / "file").write_text("x")
        assert not (tmp_path / "a/b/out").exists()
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == ["out"]
    assert (tmp_path / "a/b/out/file").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_staging_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), bundle.staging(tmp_path / "a/b/out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep/file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_staging_refuses_an_existing_destination(made: Path) -> None:
    before = sorted(made.parent.iterdir())
    with pytest.raises(ConfigError, match="already exists") as caught, bundle.staging(made):
        pytest.fail("the block must not run")
    assert "--force" in str(caught.value.hint)
    assert sorted(made.parent.iterdir()) == before


def test_a_replaced_bundle_survives_until_the_new_one_is_whole(made: Path) -> None:
    with pytest.raises(KeyboardInterrupt), bundle.staging(made, replace=True) as folder:
        (folder / "half").write_text("x")
        assert bundle.read(made).target == "cpu"
        raise KeyboardInterrupt
    assert bundle.read(made).target == "cpu"
    with bundle.staging(made, replace=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert [p.name for p in made.iterdir()] == ["manifest.json"]
    assert [p.name for p in made.parent.iterdir()] == ["made"]


def test_the_old_bundle_comes_back_when_the_rename_fails(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt), bundle.staging(made, replace=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert bundle.read(made).target == "cpu"
    assert [p.name for p in made.parent.iterdir()] == ["made"]


def test_only_our_own_folders_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.png").write_bytes(b"")
    (tmp_path / "letter").write_text("x")
    for name in ("photos", "letter"):
        refusal = pytest.raises(ConfigError, match="not something mtu-compile wrote")
        with refusal, bundle.staging(tmp_path / name, replace=True):
            pytest.fail("the block must not run")
    (tmp_path / "empty").mkdir()
    with bundle.staging(tmp_path / "empty", replace=True) as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "empty/file").exists()


def test_a_linked_destination_keeps_its_link(made: Path) -> None:
    link = made.parent / "current"
    link.symlink_to(made)
    with bundle.staging(link, replace=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert link.is_symlink()
    assert (made / "manifest.json").read_text() == "new"


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MtuError, match="no space left") as caught, bundle.staging(tmp_path / "out") as folder:
        (folder / "weights").symlink_to("/dev/full")
        (folder / "weights").write_bytes(bytes(10_000))
    assert "nothing was left behind" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MtuError, match="no space left"), bundle.staging(tmp_path / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MtuError, match="cannot write in"), bundle.staging(tmp_path / "file/out"):
        pytest.fail("the block must not run")
