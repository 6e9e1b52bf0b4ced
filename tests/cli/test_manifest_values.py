"""A manifest whose own hash is right, with any value of it replaced: refused, or a value that may well stand there."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import targets
from calibration.quant_config import of_bundle
from calibration.quant_settings import QuantSettings
from calibration.shared_scales import bundle_ranges, shared_scales
from mtu_compile.bundle import Manifest, read
from mtu_compile.bundle.files import _sealed
from mtu_compile.core import vendors
from mtu_compile.core.errors import EXIT_INPUT, BundleError, ConfigError, TargetError
from mtu_compile.report.gather import _build_facts, _commands
from mtu_compile.runtime import schedulers
from mtu_compile.runtime.builder import Host
from targets.nvidia.board import NvidiaMachine

#: What takes the place of every value.
WRONG: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 0.5, 10**30, -1e300, math.inf, math.nan),
    *("", "/etc/passwd", "\x1b[2J", "\ud800", "7.5"),
    *([], [1], {}, {"a": 1}),
)

#: Where ``null`` is an answer, too: what was not measured or does not apply, and every option of the scheduler.
NULLABLE = re.compile(
    r"scheduler\.(?!_class_name)\w+|vae_encoder|.*\.(calibration|reference|prebuilt|estimate|config|mixed|costs|kept|clip|dependencies)"
    r"|.*\.(region|truth|guidance|guidance_ratio|ssim_reason|subset_size|smooth_quant_alpha|guidance_db|float_ms|int8_ms)"
    r"|.*\.(agreement_db|worst_guidance_ratio|downscale|colour_difference|vif|ssim|reference_ssim|truth_drop_db)"
    r"|.*\.(latent|image|inside|outside|source|reference|reference_source)?_?psnr_db|.*\.thresholds(\.\w+)?"
    r"|.*\.accuracy\.guidance\.\w+\.\w+|.*\.accuracy\.region\.share"
    r"|.*\.class_label|.*\.reason|provenance\.(plan|board|as_task)"
    # what a manifest of an earlier version need not have recorded
    r"|provenance\.plan\.(target|precision|workspace_bytes|reserved_bytes|device_bytes|available_bytes|static_bytes|shared_bytes)"
    r"|provenance\.plan\.(least_bytes|fits|build|shared|routing|recommendation)"
    r"|provenance\.plan\.(networks\[\]|shared)\.(kind|attention_scores_bytes|unknown_shapes)"
    r"|provenance\.plan\.build\.(libraries|weights|scores|features|available)_bytes|provenance\.plan\.build\.(smaller|seconds|fits)"
    r"|provenance\.shared_weights_saved_bytes"
    r"|provenance\.board\.(device|compute_capability|wheels)|provenance\.board\.jetpack\[\]\.(cuda|python|glibc|machine|source)"
    r"|tasks\.\w+\.provenance\.(calibration|quantisation|compression|build_seconds|parity|float16_range)"
    r"|.*\.provenance\.calibration\.(sha256|strategy|pictures|calls|steps|seed|source)"
    r"|.*\.provenance\.quantisation\.(settings|samples|activations|weights|bytes_before|bytes_after|tool|fp8)"
    r"|.*\.provenance\.compression\.settings(\.(ratio|group_size))?|.*\.provenance\.parity\.(task|graph|reference)"
    r"|.*\.notices\[\]\.(prompt|tokens|limit|dropped|pixels|of)|.*\.estimate\.\w+"
    r"|.*\.float16_range\.(\w+\.)?(precision|overflow|overflow_type|overflow_at)"
)
#: Texts that are not free: names, versions, hashes and paths.
STRICT = re.compile(
    r"target|precision|files\..*|.*sha256|fit|.*\.(kind|path|tokenizer|op|strategy|range_estimator)"
    r"|tasks\.\w+\.(reference|calibration)"
    r"|.*\.task\.(name|guidance|condition.*)|scheduler\..*|.*\.kept|provenance\.plan\.(target|precision)|provenance\.plan.*precision"
    r"|.*\.(state|use)|(.*\.)?routing"
)
#: Numbers by their place: least and largest. The first that matches counts.
LIMITS: tuple[tuple[str, float, float], ...] = (
    (r".*_db(\[\]|\.\w+)?", -400, 400),
    (r".*cosine|.*(ssim|vif)", -1.001, 1e6),
    (r".*(share|slowdown|smooth_quant_alpha)|.*criteria\.guidance_ratio", 0, 1),
    (r".*ratio(\[\])?", 0, 1e12),
    (r".*guidance_scale", 0, 1000),
    (r"scheduler\.(beta_start|beta_end)", 1e-9, 1),
    (r"scheduler\.(num_train_timesteps|steps_offset)", 0, 1e5),
    (r"scheduler\..*", 0, 1e6),
    (r"scaling_factor", 1e-6, 1e6),
    (r".*timesteps\[\]", -1, 1e6),
    (r".*(ranges\..*|colour_difference)", 0, 3.5e38),
    (r".*\.class_label", 0, 2**20),
    (r".*(seconds|_ms)", 0, 1e9),
    (r".*(bytes.*|plan\.tasks\..*)", 0, 2**53),
    (r".*(pictures|calls|samples|steps|size\[\]|channels|vae_scale|max_length)", 1, 2**31),
    (r".*", 0, 2**63),
)


WHEELS = {"own": "a.whl", "dependencies": ["b.whl"], "install": "pip install"}
COMPRESSION = {
    "settings": {"mode": "int8", "ignored_scopes": ["a/Conv"]},
    "layers": {"Conv": {"int8": 50}},
    "parameters": {"int8": 1000},
    "rounded_again": 0,
    "bytes_before": 4000,
    "bytes_after": 1000,
    "tool": "nncf 3.4.0",
}
#: A board that has all that is asked for.
BOARD = NvidiaMachine(Host("Orin", "3.10", None), None, None, {"tensorrt": "10.3.0"}, {})
#: Entries that are lists of so many values, none of which can be left out.
PAIRS = ("image_size", "guidance_ratio", "condition", "Conv", "MatMul", "Gemm", "tensorrt", "version")


def trimmed(value: Any, within: str = "") -> Any:
    """The same with one entry in every list, and in every object that has layers or files for keys."""
    if isinstance(value, dict):
        one = within in ("ranges", "layers") and not any(isinstance(item, dict) for item in value.values())
        return {key: trimmed(item, key) for key, item in itertools.islice(value.items(), 1 if one else None)}
    if isinstance(value, list) and within not in PAIRS:
        return [trimmed(item) for item in value[:1]]
    return value


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of everything that has nothing in it."""
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of everything that has something in it, but for the whole."""
    if isinstance(value, (dict, list)) and value:
        if path:
            yield path, value
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(item, (*path, key))


def named(path: tuple[Any, ...]) -> str:
    return ".".join("[]" if isinstance(key, int) else key for key in path).replace(".[]", "[]")


def replaced(raw: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = raw.copy()
    changed[path[0]] = replaced(raw[path[0]] if len(path) > 1 else None, path[1:], value)
    return changed


def legitimate(path: str, was: Any, now: Any) -> bool:
    """Whether ``now`` may stand where ``was`` stood."""
    if now is None:
        return NULLABLE.fullmatch(path) is not None
    if was is None:  # what may be there instead is judged where it is
        return NULLABLE.fullmatch(path) is not None
    if isinstance(was, bool) or isinstance(now, bool):
        return isinstance(was, bool) and isinstance(now, bool)
    if isinstance(was, str):
        free = STRICT.fullmatch(path) is None or (now == "7.5" and "sha256" not in path and "/" not in was)
        return isinstance(now, str) and now.isprintable() and free
    if isinstance(was, (int, float)):
        low, high = next((low, high) for pattern, low, high in LIMITS if re.fullmatch(pattern, path))
        return isinstance(now, (int, float)) and math.isfinite(now) and low <= now <= high
    return type(now) is type(was)


def use(manifest: Manifest) -> None:
    """What is done with a manifest that has been read; refusals may come, and no other error."""
    assert manifest.latent_size[0] >= 1
    for entry in manifest.tasks.values():
        assert entry.task.unet_batch >= 1 and entry.task.condition_channels(manifest.latent_channels) >= 0
    shared_scales(bundle_ranges(manifest))
    json.dumps([*_commands(Path("bundle"), manifest)])
    with suppress(BundleError):  # a search of another version
        json.dumps([*_build_facts(manifest)])
    if requirements := manifest.provenance.board:
        with suppress(ConfigError, TargetError):
            BOARD.check_versions(requirements)
    with suppress(ConfigError):
        for settings in of_bundle(manifest)["tasks"].values():
            QuantSettings.from_json(settings)


def sample(manifest: Manifest) -> None:
    """As ``use``, what is done with the scheduler's options."""
    for name in (None, *schedulers.NAMES):
        with suppress(ConfigError):
            assert len(schedulers.from_config(manifest.scheduler, 7, name).timesteps) >= 1


@pytest.fixture(scope="module")
def raw(tiny_bundle: Path) -> Any:
    """A real manifest, one entry of everything that there is many of, and what bundles for other devices have in it."""
    whole = json.loads((tiny_bundle / "manifest.json").read_text())
    whole.pop("manifest_sha256")
    small = {**trimmed(whole), "files": whole["files"]}
    small["tasks"].pop("t2i")
    small["provenance"]["board"] = json.loads(json.dumps(targets.get("jetson-orin").spec.board_requirements()))
    small["provenance"]["board"]["wheels"] = WHEELS
    small["provenance"] = trimmed(small["provenance"])
    small["vae_decoder"]["estimate"] = {"source": "a compiler", "latency_ms": 1.5, "busy_ms": {"dpu": 0.5}}
    small["tasks"]["inpaint"]["provenance"]["compression"] = COMPRESSION
    small["tasks"]["inpaint"]["thresholds"] = {"sqnr_db": 20.0, "vif": None, "guidance_ratio": 0.7}
    return small


def test_every_value_has_a_type_and_a_range(raw: Any) -> None:
    Manifest.from_json(raw).check()
    tried, refused, wrong = 0, 0, []
    places = [(path, was) for path, was in leaves(raw) if path[0] not in ("schema_version", "files")]
    places += [(("files", name), raw["files"][name]) for name in itertools.islice(raw["files"], 1)]
    for path, was in places:
        for now in WRONG:
            if now == was and type(now) is type(was):
                continue
            tried += 1
            try:
                manifest = Manifest.from_json(replaced(raw, path, now))
                manifest.check()
            except BundleError as error:
                assert error.exit_code == EXIT_INPUT
                refused += 1
                continue
            if not legitimate(named(path), was, now):
                wrong.append((named(path), now))
            use(manifest)
            if path[0] == "scheduler":
                sample(manifest)
    print(f"{tried} changes of {len(places)} values: {refused} refused, {tried - refused} as good as what was there")
    assert wrong == [], "give them a type: mtu_compile/bundle/*.py"
    assert tried > 2500 and refused > 0.8 * tried


def test_every_part_has_a_type(raw: Any) -> None:
    wrong = []
    for path, _ in nodes(raw):
        for now in (None, 0, "x", [], [None], {"a": 1}):
            try:
                manifest = Manifest.from_json(replaced(raw, path, now))
                manifest.check()
            except BundleError:
                continue
            optional = NULLABLE.fullmatch(named(path)) or path[0] == "tools"
            if not (now is None and optional) and not isinstance(now, (list, dict)):
                wrong.append((named(path), now))
            use(manifest)
    assert wrong == []


def test_a_missing_or_foreign_entry_is_refused_by_name(raw: Any) -> None:
    optional = {
        "provenance",
        "fit",
        "estimate",
        "prebuilt",
        "state",
        "reason",
        "config",
        "calibration",
        "accuracy_reason",
        "reference",
        "thresholds",
    }
    optional |= {
        "instruction_sets",
        "routing",
        "family",
        "text_2",
        "zeros_for_empty_prompt",
        "states",
        "pooled",
        "user_passes",
        "weights",
        "weights_bytes",
        "class_label",
        "passes",
        "condition",
        "guidance",
        "guidance_scale",
        "image_guidance_scale",
        "downscale",
        "step_cache",
    }
    for holder in ((), ("text",), ("source",), ("vae_decoder",), ("tasks", "inpaint"), ("tasks", "inpaint", "task")):
        place = raw
        for key in holder:
            place = place[key]
        for key in place.keys() - optional - {"schema_version"}:
            changed = copy.deepcopy(raw)
            there = changed
            for step in holder:
                there = there[step]
            del there[key]
            with pytest.raises(BundleError, match=re.escape(key)):
                Manifest.from_json(changed).check()
        with pytest.raises(BundleError, match="surprise"):
            Manifest.from_json(replaced(raw, (*holder, "surprise"), 1))
    made = ("tasks", "inpaint", "provenance")
    for holder in (
        ("provenance",),
        ("provenance", "plan"),
        made,
        (*made, "quantisation"),
        (*made, "parity", "rows", 0),
    ):
        with pytest.raises(BundleError, match="surprise"):
            Manifest.from_json(replaced(raw, (*holder, "surprise"), 1))


def test_the_command_says_which_value_is_wrong(tiny_bundle: Path, tmp_path: Path, mtu: Any) -> None:
    whole = json.loads((tiny_bundle / "manifest.json").read_text())
    whole["scheduler"]["beta_end"] = "/etc/passwd"
    (tmp_path / "manifest.json").write_bytes(_sealed(whole))
    done = mtu("inspect", tmp_path)
    assert done.code == EXIT_INPUT
    assert done.err.startswith(
        'error: manifest.json: scheduler.beta_end is "/etc/passwd", expected a number from 1e-09'
    )


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999", b"-1e999", b"1" + b"0" * 400])
def test_numbers_that_are_none_are_refused(tiny_bundle: Path, tmp_path: Path, number: bytes) -> None:
    content = (tiny_bundle / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(
        re.sub(rb'"scaling_factor": [0-9.]+', b'"scaling_factor": ' + number, content)
    )
    with pytest.raises(BundleError):
        read(tmp_path, verify=False)


def test_manifests_that_say_nothing_of_fit_are_read(raw: Any) -> None:
    del (old := copy.deepcopy(raw))["fit"]
    assert Manifest.from_json(raw).fit == "crop" and Manifest.from_json(old).fit == "stretch"


def test_every_kind_of_engine_has_a_class() -> None:
    kinds = {"openvino", "openvino-float", "tensorrt", "tensorrt-rtx", "onnxruntime"}
    assert kinds <= set(vendors.engines())
    assert all(isinstance(vendors.load(place), type) for place in vendors.engines().values())
