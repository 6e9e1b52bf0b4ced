"""``docs/manifest.schema.json``: it is what the dataclasses say, and real manifests hold to it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mtu_compile.bundle import Manifest
from mtu_compile.bundle.files import _sealed
from mtu_compile.bundle.json_schema import manifest_schema
from mtu_compile.core.errors import BundleError

KEPT = Path(__file__).parents[2] / "docs" / "manifest.schema.json"
OLD = Path(__file__).with_name("manifest_version_1.json")


@pytest.fixture(scope="module")
def real() -> Any:
    """A real manifest, as this version writes it."""
    return json.loads(_sealed(Manifest.from_json(json.loads(OLD.read_text())).to_json()))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(KEPT.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_that_is_kept_is_current() -> None:
    assert json.loads(KEPT.read_text()) == json.loads(json.dumps(manifest_schema())), "`make schema` writes it anew"


def test_a_real_manifest_is_valid(real: Any, validator: jsonschema.Draft202012Validator) -> None:
    assert [error.message for error in validator.iter_errors(real)] == []


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda raw: raw.pop("scaling_factor"), "'scaling_factor' is a required property"),
        (lambda raw: raw.update(schema_version=1), "2 was expected"),
        (lambda raw: raw.update(surprise=1), "'surprise' was unexpected"),
        (lambda raw: raw["text"].update(max_length=0), "0 is less than the minimum of 1"),
        (lambda raw: raw["source"].update(sha256="00"), "'00' does not match"),
        (lambda raw: raw.update(image_size=[64]), "[64] is too short"),
        (lambda raw: raw["text"]["engine"].update(state="runs here"), "'runs here' is not one of"),
        (lambda raw: raw["tasks"]["t2i"]["provenance"].update(extra=1), "'extra' was unexpected"),
        (lambda raw: raw["tasks"]["t2i"]["task"].update(condition=["mask"] * 9), "is too long"),
        (lambda raw: raw["scheduler"].update(_class_name=3), "3 is not of type 'string'"),
    ],
)
def test_what_is_wrong_is_found(
    real: Any, validator: jsonschema.Draft202012Validator, harm: Callable[[Any], Any], said: str
) -> None:
    changed = copy.deepcopy(real)
    harm(changed)
    assert any(said in error.message for error in validator.iter_errors(changed))
    with pytest.raises(BundleError):
        Manifest.from_json({key: value for key, value in changed.items() if key != "manifest_sha256"})
