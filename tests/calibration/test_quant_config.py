"""Quantisation configs: what is written can be read, and what is none is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from calibration import quant_config
from calibration.quant_settings import QuantSettings
from mtu_compile.core.errors import ConfigError


def test_settings_survive_a_round_trip(tmp_path: Path) -> None:
    settings = QuantSettings(smooth_quant_alpha=None, range_estimator="histogram", ignored_scopes=("conv_in.*", "a/b"))
    path = tmp_path / "quant.json"
    path.write_text(json.dumps({"format": quant_config.FORMAT, "tasks": {"t2i": settings.to_json(), "sr": {}}}))
    assert quant_config.load(path) == {"t2i": settings, "sr": QuantSettings()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a quantisation config"),
        ('{"format": "mtu-quant-config-1"}', "has no settings of any task"),
        ('{"format": "mtu-quant-config-1", "tasks": {"t2i": {}}, "task": {}}', "unknown entry 'task'"),
        ('{"format": "mtu-quant-config-1", "tasks": {"t2i": {"alpha": 1}}}', "task 't2i': unknown setting 'alpha'"),
        (
            '{"format": "mtu-quant-config-1", "tasks": {"t2i": {"ignored_scopes": "conv"}}}',
            "'ignored_scopes' is 'conv'",
        ),
        ('{"format": "mtu-quant-config-1", "tasks": {"t2i": {"ignored_scopes": [1]}}}', "'ignored_scopes' is"),
        ('{"format": "mtu-quant-config-1", "tasks": {"t2i": {"subset_size": true}}}', "'subset_size' is True"),
        (
            '{"format": "mtu-quant-config-1", "tasks": {"t2i": {"range_estimator": "best"}}}',
            "no range estimator 'best'",
        ),
    ],
)
def test_configs_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "quant.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        quant_config.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        quant_config.load(tmp_path / "missing.json")


def test_one_network_has_the_settings_that_all_its_tasks_have() -> None:
    shared = QuantSettings(smooth_quant_alpha=None, ignored_scopes=("conv_in.*",))
    given = {"t2i": shared, "edit": replace(shared), "sr": replace(shared, ignored_scopes=("conv_in.*", "ff.up"))}
    assert quant_config.one_for_all(given, ["t2i", "edit"], "bundle") == shared
    assert quant_config.one_for_all(given, ["sr"], "bundle") == given["sr"]
    with pytest.raises(ConfigError, match=r"bundle quantises 't2i' and 'sr' differently \(ignored_scopes\)") as caught:
        quant_config.one_for_all(given, ["t2i", "edit", "sr"], "bundle")
    assert caught.value.exit_code == 2 and "--routing" in str(caught.value.hint)


def test_every_setting_can_be_given() -> None:
    """A setting that is added to the class has to be read from a config, too."""
    everything = replace(QuantSettings(), subset_size=3, smooth_quant_alpha=0.5, weight_bits_fix=True)
    assert QuantSettings.from_json(everything.to_json()) == everything
