"""A quantisation that was chosen once, given back to a later build.

``--quant-config`` takes a bundle, or a JSON file:

    {
      "format": "mtu-quant-config-1",
      "tasks": {"t2i": {"range_estimator": "histogram", "ignored_scopes": ["conv_in.*"]}}
    }

A task's entries are those of ``calibration.quant_settings.QuantSettings``; what is left out has its default. Tasks that
share one network share its settings, too: a bundle with a shared engine says the same of each (``one_for_all``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from calibration.quant_settings import QuantSettings
from mtu_compile import bundle
from mtu_compile.core.errors import ConfigError

FORMAT = "mtu-quant-config-1"


def load(path: Path) -> dict[str, QuantSettings]:
    """By task, the settings of a file or of a bundle.

    Raises:
        BundleError: a damaged bundle.
        ConfigError: no such file, not a quantisation config, or a setting that is unknown or of the wrong kind.
    """
    if path.is_dir():
        data = of_bundle(bundle.read(path))
    else:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
    hint = "mtu-compile inspect BUNDLE --quant-config writes one"
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a quantisation config of this version", hint=hint)
    if unknown := sorted(set(data) - {"format", "tasks"}):
        raise ConfigError(f"{path}: unknown entry {unknown[0]!r}", hint=hint)
    tasks = data.get("tasks")
    if not isinstance(tasks, dict) or not tasks or not all(isinstance(one, dict) for one in tasks.values()):
        raise ConfigError(f"{path} has no settings of any task", hint=hint)
    settings = {}
    for name, one in tasks.items():
        try:
            settings[name] = QuantSettings.from_json(one)
        except ConfigError as error:
            raise ConfigError(f"{path}: task {name!r}: {error.message}", hint=error.hint) from error
    return settings


def one_for_all(settings: Mapping[str, QuantSettings], tasks: Sequence[str], source: str) -> QuantSettings:
    """The settings of the one network that ``tasks`` share: what is said of each of them, which has to be the same.

    Args:
        settings: by task, of ``load``.
        tasks: those that share the network; each has settings.
        source: name of the file or bundle, for the message.

    Raises:
        ConfigError: two tasks are to be quantised differently, as in bundles with a UNet for each task.
    """
    first = settings[tasks[0]]
    for task in tasks[1:]:
        for one in fields(QuantSettings):
            if getattr(settings[task], one.name) != getattr(first, one.name):
                raise ConfigError(
                    f"{source} quantises {tasks[0]!r} and {task!r} differently ({one.name}), and one network for both "
                    "is quantised once",
                    hint="take a bundle built with --routing shared, give the tasks the same settings, or build with "
                    "--routing static",
                )
    return first


def of_bundle(manifest: bundle.Manifest) -> dict[str, Any]:
    """What a bundle was quantised with, as a config; ``ConfigError`` if it was not."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, entry in manifest.tasks.items():
        quantised = entry.provenance.quantisation
        if quantised is not None and quantised.settings is not None:
            found[name] = bundle.encode(quantised.settings)
    if not found:
        raise ConfigError(
            f"the bundle is {manifest.precision}, and was not quantised", hint="take one built with --int8"
        )
    return {"format": FORMAT, "tasks": found}
