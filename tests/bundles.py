"""Whether two builds made the same bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: What is measured anew by every build, or says how it was run: times, what was taken from the cache, and the hash of
#: the manifest, which is over those as well.
MEASURED = frozenset({"seconds", "build_seconds", "steps", "manifest_sha256"})


def content(bundle: Path) -> dict[str, Any]:
    """By file its bytes; of the manifest all but what is ``MEASURED``."""
    found: dict[str, Any] = {
        path.relative_to(bundle).as_posix(): path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()
    }
    found["manifest.json"] = _without(json.loads(found["manifest.json"]))
    return found


def assert_same(one: Path, other: Path) -> None:
    """Every file of two bundles is the same to the bit."""
    first, second = content(one), content(other)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        # a build's ``steps`` are a list; the denoising steps of a sampler are a number
        return {
            key: _without(part)
            for key, part in value.items()
            if key not in MEASURED or (key == "steps" and not isinstance(part, list))
        }
    return [_without(part) for part in value] if isinstance(value, list) else value
