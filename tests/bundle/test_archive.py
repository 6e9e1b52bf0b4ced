"""Packed bundles: one archive for each bundle, which every tar reads; whatever is not exactly that is refused."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import lzma
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.bundle import archive, keys, tar
from mtu_compile.bundle.archive import Limits
from mtu_compile.core.errors import EXIT_INPUT, BundleError, ConfigError, MtuError
from tests.bundle.small import CONTENT, write_small


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(file: Path, *words: str, **options: Any) -> BundleError:
    """That it is neither checked nor unpacked, and leaves nothing."""
    before = sorted(path.name for path in file.parent.iterdir())
    with pytest.raises(BundleError) as caught:
        archive.check(file, **options)
    with pytest.raises(BundleError):
        archive.unpack(file, file.parent / "out", **options)
    assert sorted(path.name for path in file.parent.iterdir()) == before
    assert caught.value.exit_code == EXIT_INPUT
    for word in words:
        assert word in caught.value.message
    return caught.value


@pytest.fixture
def packed(signed: Path, tmp_path: Path) -> Path:
    return archive.pack(signed, tmp_path / "bundle.tar")


def test_what_unpacks_is_the_bundle(signed: Path, packed: Path, ours: Any, tmp_path: Path) -> None:
    listed = archive.unpack(packed, tmp_path / "out", trusted=ours)
    assert files_of(tmp_path / "out") == files_of(signed)
    assert listed.signed is not None and listed.signed.release == 7
    assert bundle.read(tmp_path / "out", trusted=ours) == listed.manifest == archive.check(packed).manifest
    assert listed.bytes == sum(map(len, files_of(signed).values()))
    with pytest.raises(ConfigError, match="already exists"):
        archive.unpack(packed, tmp_path / "out")
    archive.unpack(packed, tmp_path / "out", replace=True)


def test_an_unsigned_bundle_packs_too(small: Path, tmp_path: Path, ours: Any) -> None:
    file = archive.pack(small, tmp_path / "bundle.tar")
    assert archive.unpack(file, tmp_path / "out").signed is None
    assert files_of(tmp_path / "out") == files_of(small)
    shutil.rmtree(tmp_path / "out")
    refused(file, "is not signed", trusted=ours)


def test_equal_bundles_are_equal_archives(small: Path, tmp_path: Path) -> None:
    other = write_small(tmp_path / "other")
    for number, path in enumerate(sorted(other.rglob("*"))):
        os.utime(path, (number, number))
        path.chmod(0o777)
    first, second = (archive.pack(one, tmp_path / f"{one.name}.tar").read_bytes() for one in (small, other))
    assert first == second


def test_what_a_board_built_is_not_packed(small: Path, tmp_path: Path) -> None:
    before = archive.pack(small, tmp_path / "before.tar").read_bytes()
    (small / "built").mkdir()
    (small / "built/unet.engine").write_bytes(b"engine")
    assert archive.pack(small, tmp_path / "after.tar").read_bytes() == before


def test_other_tars_read_it(signed: Path, packed: Path, tmp_path: Path) -> None:
    with tarfile.open(packed, "r:") as opened:
        names = opened.getnames()
        opened.extractall(tmp_path / "python", filter="data")
    assert names[:2] == ["manifest.json", "signature.json"] and sorted(names[2:]) == names[2:] == sorted(CONTENT)
    assert files_of(tmp_path / "python") == files_of(signed)
    if shutil.which("tar"):
        (tmp_path / "gnu").mkdir()
        done = subprocess.run(["tar", "-xf", packed, "-C", tmp_path / "gnu"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert files_of(tmp_path / "gnu") == files_of(signed)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1, 8**11, 3 << 40])
@pytest.mark.parametrize("name", ["a", "é/ü", "n" * 100, f"{'d' * 155}/{'n' * 100}", f"a/{'d' * 90}/{'n' * 60}"])
def test_headers_say_to_others_what_they_say_here(name: str, size: int) -> None:
    block = tar.header(tar.Member(name, size))
    assert tar.read_header(block) == tar.Member(name, size)
    info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    assert (info.name, info.size, info.isreg(), info.mode, info.mtime) == (name, size, True, 0o644, 0)
    for position in range(512):
        changed = bytearray(block)
        changed[position] ^= 0x40
        try:
            assert tar.read_header(bytes(changed)) != tar.Member(name, size)
        except BundleError:
            continue
        pytest.fail(f"byte {position}: a header whose checksum is wrong was taken")


@pytest.mark.parametrize("name", ["n" * 101, f"{'d' * 156}/n", f"{'d' * 60}/{'n' * 200}", f"{'d' * 120}/"])
def test_names_that_do_not_fit_are_not_packed(name: str) -> None:
    with pytest.raises(BundleError, match="too long"):
        tar.header(tar.Member(name, 0))


def forged(file: Path, change: Callable[[list[tarfile.TarInfo], dict[str, bytes]], None]) -> Path:
    """The archive written anew after ``change``; what is changed is written as Python's tarfile does it."""
    with tarfile.open(file, "r:") as opened:
        members = opened.getmembers()
        contents = {member.name: opened.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    as_packed = {id(member): tar.header(tar.Member(member.name, member.size)) for member in members}
    change(members, contents)
    pieces = []
    for member in members:
        content = contents.get(member.name, b"") if member.isreg() else b""
        block = as_packed.get(id(member))
        pieces += [block or member.tobuf(tarfile.PAX_FORMAT), content, bytes(-len(content) % 512)]
    file.write_bytes(b"".join(pieces) + tar.END)
    return file


def added(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", at: int = 2) -> Any:
    def change(members: list[tarfile.TarInfo], contents: dict[str, bytes]) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        members.insert(at, info)

    return change


@pytest.mark.parametrize("at", [0, 2, -1])
@pytest.mark.parametrize(
    ("name", "kind", "target", "words"),
    [
        ("../evil", tarfile.REGTYPE, "", "'../evil'"),
        ("unet/../../evil", tarfile.REGTYPE, "", "not a plain path"),
        ("/etc/cron.d/evil", tarfile.REGTYPE, "", "not a plain path"),
        ("C:/evil", tarfile.REGTYPE, "", "not a plain path"),
        ("a\\..\\evil", tarfile.REGTYPE, "", "not a plain path"),
        ("./unet/x", tarfile.REGTYPE, "", "not a plain path"),
        ("unet//x", tarfile.REGTYPE, "", "not a plain path"),
        ("evil", tarfile.SYMTYPE, "/etc/passwd", "a symbolic link"),
        ("unet", tarfile.SYMTYPE, "/tmp", "a symbolic link"),
        ("evil", tarfile.LNKTYPE, "manifest.json", "a hard link"),
        ("evil", tarfile.CHRTYPE, "", "a device"),
        ("evil", tarfile.BLKTYPE, "", "a device"),
        ("evil", tarfile.FIFOTYPE, "", "a pipe"),
        ("unet", tarfile.DIRTYPE, "", "a folder"),
        ("evil", tarfile.GNUTYPE_SPARSE, "", "a sparse file"),
        ("n" * 300, tarfile.REGTYPE, "", "an extension"),
        ("extra.txt", tarfile.REGTYPE, "", "'extra.txt'"),
        ("built/unet.engine", tarfile.REGTYPE, "", "'built/unet.engine'"),
        ("UNET/openvino_model.xml", tarfile.REGTYPE, "", "'UNET/openvino_model.xml'"),
    ],
)
def test_what_no_bundle_holds_is_refused(
    packed: Path, at: int, name: str, kind: bytes, target: str, words: str
) -> None:
    refused(forged(packed, added(name, kind, target, at)), words)
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("name", ["manifest.json", "signature.json", "model_index.json"])
def test_a_file_that_comes_twice_is_refused(packed: Path, name: str) -> None:
    def twice(members: list[tarfile.TarInfo], contents: dict[str, bytes]) -> None:
        members.append(next(one for one in members if one.name == name))

    refused(forged(packed, twice), name, "twice")


def test_a_file_that_is_missing_is_refused(packed: Path) -> None:
    with tarfile.open(packed, "r:") as opened:
        count = len(opened.getmembers())
    whole = packed.read_bytes()
    for position in range(count):

        def without(members: list[tarfile.TarInfo], contents: dict[str, bytes], position: int = position) -> None:
            del members[position]

        packed.write_bytes(whole)
        if position == 1:  # without its signature it is the bundle of before
            assert archive.check(forged(packed, without)).signed is None
        else:
            refused(forged(packed, without))


@pytest.mark.parametrize(
    "change", [{"mode": 0o4755}, {"uid": 1}, {"gid": 1}, {"mtime": 1}, {"uname": "root"}, {"linkname": "x"}]
)
def test_other_owners_modes_and_times_are_refused(packed: Path, change: dict[str, Any]) -> None:
    def altered(members: list[tarfile.TarInfo], contents: dict[str, bytes]) -> None:
        members[3] = copy.copy(members[3])
        for key, value in change.items():
            setattr(members[3], key, value)

    refused(forged(packed, altered), "header")


def test_two_names_for_one_file_are_refused(packed: Path, small: Path) -> None:
    """Where case does not count, or letters are composed; the manifest agrees with the archive."""
    for first, second in (("unet/A", "unet/a"), ("é", "e\u0301"), ("Straße", "STRASSE"), ("x", "x/y"), ("K", "\u212a")):
        body = bundle.encode(bundle.read(small))
        body["files"] |= {first: "0" * 64, second: "0" * 64}
        content = bundle.files._sealed({"schema_version": bundle.SCHEMA_VERSION, **body})
        with pytest.raises(BundleError, match="collides"):
            bundle.files.parse(content)
        packed.write_bytes(tar.header(tar.Member("manifest.json", len(content))) + content + bytes(-len(content) % 512))
        with packed.open("ab") as file:
            file.write(tar.END)
        refused(packed, "collides")


@pytest.mark.parametrize("name", ["manifest.json", "Manifest.JSON", "signature.json", "built/x", "BUILT/x", "built"])
def test_reserved_names_are_refused(small: Path, name: str) -> None:
    body = bundle.encode(bundle.read(small))
    body["files"] |= {name: "0" * 64}
    with pytest.raises(BundleError, match="collides"):
        bundle.files.parse(bundle.files._sealed({"schema_version": bundle.SCHEMA_VERSION, **body}))


def test_any_changed_byte_is_refused(packed: Path, ours: Any) -> None:
    whole = packed.read_bytes()
    for position in range(0, len(whole), 61):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        packed.write_bytes(changed)
        with pytest.raises(BundleError):
            archive.check(packed, trusted=ours)
    packed.write_bytes(whole)
    assert archive.check(packed, trusted=ours).signed is not None


def test_a_truncated_or_longer_archive_is_refused(packed: Path) -> None:
    whole = packed.read_bytes()
    for length in [*range(0, len(whole), 509), len(whole) - 1]:
        packed.write_bytes(whole[:length])
        refused(packed)
    for more in (b"x", b"\0", bytes(512), bytes(9216), whole):
        packed.write_bytes(whole + more)
        refused(packed, "goes on after its end")


@pytest.mark.parametrize("size", [1 << 34, 8**11 - 1, 1 << 62])
def test_a_size_that_is_only_said_costs_nothing(packed: Path, size: int) -> None:
    whole = packed.read_bytes()
    for start in (0, whole.index(b"model_index.json\0")):
        name = "manifest.json" if start == 0 else "model_index.json"
        packed.write_bytes(whole[:start] + tar.header(tar.Member(name, size)) + whole[start + 512 :])
        refused(packed, "truncated")


def test_limits_are_kept(packed: Path) -> None:
    count, total = len(CONTENT), archive.check(packed).bytes
    archive.check(packed, limits=Limits(count, total))
    refused(packed, f"has {count} files", limits=Limits(count - 1, total))
    refused(packed, "more than the", limits=Limits(count, total - 1))


def test_compressed_archives_are_called_by_their_name(packed: Path) -> None:
    whole = packed.read_bytes()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("manifest.json", whole)
    packings = {"gzip": gzip.compress(whole), "bzip2": bz2.compress(whole), "xz": lzma.compress(whole)}
    for kind, content in {**packings, "zip": zipped.getvalue()}.items():
        packed.write_bytes(content.ljust(2048, b"\0"))
        refused(packed, f"compressed ({kind})")
    packed.write_bytes(bytes(2048))
    refused(packed)


def test_what_is_no_plain_file_is_refused(small: Path, tmp_path: Path) -> None:
    place = tmp_path / "files"
    place.mkdir()
    refused(place / "nothing", "there is no packed bundle")
    os.mkfifo(place / "pipe")
    refused(place / "pipe", "not a plain file")
    refused(small, "a folder")


def test_a_full_disk_is_said_before_anything_is_written(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(MtuError, match="are free"):
        archive.unpack(packed, tmp_path / "new/out")
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_before_the_signature_holds(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("written")

    monkeypatch.setattr(archive, "_create", never)
    stranger = keys.PublicKey.of(keys.new_private())
    with pytest.raises(BundleError, match="not among the 1 trusted"):
        archive.unpack(packed, tmp_path / "out", trusted=(stranger,))


def test_packing_refuses_a_place_in_the_bundle_or_that_is_taken(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in the bundle itself"):
        archive.pack(small, small / "bundle.tar")
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ConfigError, match="already exists"):
        archive.pack(small, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "x"
    archive.pack(small, tmp_path / "taken", replace=True)
    assert archive.check(tmp_path / "taken")


def test_a_bundle_that_is_not_whole_is_not_packed(small: Path, tmp_path: Path) -> None:
    (small / "unet/openvino_model.xml").write_bytes(b"<evil/>")
    with pytest.raises(BundleError, match=r"unet/openvino_model\.xml"):
        archive.pack(small, tmp_path / "bundle.tar")
    assert not (tmp_path / "bundle.tar").exists()


def test_a_file_that_changes_while_it_is_packed_is_seen(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = bundle.files.read

    def then_change(path: Path, *arguments: Any, **options: Any) -> Any:
        manifest = read(path, *arguments, **options)
        (path / "unet/openvino_model.xml").write_bytes(b"<evi/>")
        return manifest

    monkeypatch.setattr(archive.files, "read", then_change)
    with pytest.raises(BundleError, match="was changed while"):
        archive.pack(small, tmp_path / "bundle.tar")
    assert not (tmp_path / "bundle.tar").exists()
