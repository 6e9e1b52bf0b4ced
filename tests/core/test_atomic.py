"""Files and folders appear whole or not at all. What bundles ask of ``staging`` is tested with the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtu_compile.core.atomic import atomic_file, staging
from mtu_compile.core.errors import ConfigError


def test_a_file_appears_whole_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    with atomic_file(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException], written: bool) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as temporary:
        if written:
            temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_without_a_marker_only_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with staging(tmp_path / "empty", replace=True) as folder:
        (folder / "file").write_text("x")
    (tmp_path / "letter").write_text("x")
    for name in ("empty", "letter"):  # the first is not empty any more
        with pytest.raises(ConfigError, match="already exists"), staging(tmp_path / name, replace=True):
            pytest.fail("the block must not run")
    assert (tmp_path / "empty/file").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "letter"]


def test_an_error_that_is_its_own_cause_ends_the_writing(tmp_path: Path) -> None:
    """Looking through causes for a full disk must come to an end."""
    error = ValueError("first")
    other = RuntimeError("second")
    error.__cause__, other.__cause__ = other, error
    with pytest.raises(ValueError, match="first"), staging(tmp_path / "out"):
        raise error
    assert not (tmp_path / "out").exists()
