"""The page of a report, from figures made up for the purpose; ``tests/cli/test_report.py`` has a real bundle."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calibration.shared_scales import shared_scales
from mtu_compile import bundle, report
from mtu_compile.accuracy.calls import GuidanceMetrics, StepMetrics
from mtu_compile.accuracy.thresholds import Thresholds
from mtu_compile.bundle.plan import PlanRecord
from mtu_compile.bundle.quantisation import CompressionRecord, QuantisationRecord
from mtu_compile.core.errors import BundleError
from mtu_compile.core.routing import Routing
from mtu_compile.core.schema import conform
from mtu_compile.core.tasks import Task
from mtu_compile.report.data import Amount, Fact, Network, PicturePair, Report, RoutingForms, TaskReport
from mtu_compile.report.gather import read_mixed
from mtu_compile.report.metrics import bounds, metric_lines
from mtu_compile.report.pictures import AMPLIFIED, LONGEST, data_uri, difference
from mtu_compile.report.render import render
from mtu_compile.report.routing import compare_forms
from tests.report_checks import Page, decode, markup_problems

STEPS = 5
SCRIPT = "<script>alert(1)</script>"


def picture(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def calls(sqnr: float, guided: bool) -> tuple[StepMetrics, ...]:
    deltas = (GuidanceMetrics("text", 0.98, 0.99, 1.0, 0.96, 0.04),) if guided else ()
    return tuple(StepMetrics(999.0 - 200 * i, sqnr - i, 0.999, 0.1, 0.01, deltas) for i in range(STEPS))


MIXED = {
    "criteria": {"sqnr_db": 25.0, "guidance_ratio": 0.97, "slowdown": 0.1},
    "met": True,
    "calls": 8,
    "check_calls": 40,
    "layers": [
        {"name": "conv1/Conv", "members": ["conv1/Conv"], "op": "Conv", "sqnr_db": 45.0, "worst_sqnr_db": 44.0}
        | {"guidance_db": 30.0, "float_ms": 0.3, "int8_ms": 0.2, "kept": None},
        {
            "name": "q/MatMul",
            "members": ["q/MatMul", "k/MatMul"],
            "op": "MatMul",
            "sqnr_db": 21.5,
            "worst_sqnr_db": 19.0,
        }
        | {"guidance_db": None, "float_ms": 0.2, "int8_ms": 0.1, "kept": "accuracy"},
        {"name": "out/Gemm", "members": ["out/Gemm"], "op": "Gemm", "sqnr_db": 50.0, "worst_sqnr_db": 49.0}
        | {"guidance_db": None, "float_ms": 0.1, "int8_ms": 0.15, "kept": "slower"},
    ],
    "costs": {"source": "a stopwatch", "measured": True},
    "all_int8": {"worst_sqnr_db": 20.0, "mean_sqnr_db": 24.0, "guidance_ratio": [0.8, 1.1]},
    "chosen": {"worst_sqnr_db": 26.0, "mean_sqnr_db": 29.0, "guidance_ratio": [0.98, 1.01]},
}

SUMMARY = {
    "pictures": 2,
    "worst_sqnr_db": 26.0,
    "mean_sqnr_db": 28.0,
    "worst_cosine": 0.999,
    "guidance_ratio": [0.9, 1.2],
    "guidance": {"text": {"ratio": 0.98, "worst_ratio": 1.2, "cosine": 0.99, "sqnr_db": 14.0}},
    "image_psnr_db": 31.25,
    "ssim": None,
    "truth_drop_db": 1.5,
    "region": None,
    "a_new_metric": 0.4321,
    "reasons": {"ssim": "not measured: scikit-image is not installed here"},
    "passed": True,
}


def make_task(name: str, *, guided: bool = True, mixed: Any = None, prompt: str = "a cat", **more: Any) -> TaskReport:
    task = Task(name, () if guided else ("image",), "text" if guided else "none", 3.0)
    quantisation = {
        "layers": {"Conv": [1, 2]},
        "samples": 8,
        "tool": "nncf",
        "float_layers": ["x/Conv"],
        "mixed": mixed,
    }
    quantisation |= {"bytes_before": 4_000_000, "bytes_after": 1_000_000}
    engine = bundle.EngineRef("openvino", f"{name}/model.xml", {"device": "CPU"}, state=bundle.EngineState.MEASURED)
    entry = bundle.TaskEntry(
        task=task,
        task_id=0,
        engine=engine,
        default_steps=STEPS,
        passes=(bundle.PassRecord("mtu::bind-task", True, 2),),
        calibration="ab" * 32,
        accuracy_reason="not checked",
        provenance=bundle.TaskProvenance(quantisation=conform(QuantisationRecord, quantisation)),
    )
    thresholds = Thresholds.default("int8")
    pair = PicturePair(prompt, 7, None if guided else picture(3, 4), None, None, picture(1), picture(2), {}, ())
    pairs = tuple(
        replace(pair, seed=i, metrics={"PSNR dB": 30.0 + i, "SSIM": None}, calls=calls(30.0 + i, guided))
        for i in range(2)
    )
    made = TaskReport(
        entry=entry,
        metrics=metric_lines(SUMMARY, None, thresholds),
        thresholds=thresholds,
        failures=(),
        pictures=pairs,
        steps=STEPS,
        producer="torch, float32",
        mixed=read_mixed(entry),
    )
    return replace(made, **more)


def plan(routing: Routing = "static") -> PlanRecord:
    """Two tasks of 9 MB of weights each, one engine for both, and a decoder."""
    engine = {"precision": "int8", "weights_bytes": 9_000_000, "activation_bytes": 1_000_000}
    networks = [{"name": name, "kind": "task", **engine} for name in ("t2i", "sr")]
    networks.append({"name": "vae_decoder", "kind": "part", **engine, "weights_bytes": 1_000_000})
    together = {"static": 22_000_000, "shared": 12_500_000}
    record: PlanRecord = conform(
        PlanRecord,
        {"method": "estimated from shapes", "networks": networks, "tasks": {"t2i": 12_000_000, "sr": 12_000_000}}
        | {"together_bytes": together[routing], "available_bytes": 10**9, "fits": True, "routing": routing}
        | {"static_bytes": together["static"], "shared_bytes": together["shared"]}
        | {"disk_bytes": {"static": 12_000_000, "shared": 9_500_000}}
        | {"shared": {"name": "all tasks", "kind": "shared", **engine, "weights_bytes": 9_500_000}}
        | {"recommendation": {"routing": "shared", "reason": "one engine takes less"}},
    )
    return record


def with_forms(report: Report, routing: Routing) -> Report:
    """``report`` of a bundle that was planned, in one form of routing."""
    provenance = bundle.BuildProvenance(plan=plan(routing))
    manifest = replace(report.manifest, routing=routing, provenance=provenance)
    other = "shared" if routing == "static" else "static"
    forms = RoutingForms(
        {"static": Amount(22_000_000, "estimate"), "shared": Amount(12_500_000, "estimate")},
        {routing: Amount(18_000_000, "measured"), other: Amount(9_500_000, "estimate")},  # type: ignore[dict-item]
        "shared",
        "one engine takes less",
    )
    return replace(report, manifest=manifest, forms=forms)


def make_report(*tasks: TaskReport, ranges: Any = None, device_here: bool = True) -> Report:
    part = bundle.EngineRef("openvino", "text/model.xml", {}, None, bundle.EngineState.BUILT, "no such device here")
    manifest = bundle.Manifest(
        tools={"mtu-compile": "0.1.0", "openvino": "2026.4"},
        source=bundle.Source("tiny", "cd" * 32),
        target="cpu",
        precision="int8",
        image_size=(16, 16),
        latent_channels=4,
        vae_scale=4,
        scaling_factor=1.0,
        text=bundle.TextPart("tokenizer.json", 16, 0, part),
        vae_encoder=None,
        vae_decoder=part,
        scheduler={},
        tasks={task.name: task.entry for task in tasks},
    )
    return Report(
        path=Path("/bundles/tiny-cpu"),
        manifest=manifest,
        made_at="2026-01-02T03:04:05+00:00",
        made_by="0.1.0",
        machine="a processor",
        measured_with="openvino on CPU",
        device="Some NPU",
        device_here=device_here,
        tasks=tasks,
        networks=(Network("text encoder", part, ("text/model.xml",), 123_456),),
        other_files={"reference": 2_000_000},
        ranges=shared_scales(ranges or {}),
        facts=(Fact("latency", "a report times nothing", "not measured"),),
        commands=(("build it", "mtu-compile build tiny"),),
    )


@pytest.fixture(scope="module")
def full() -> str:
    """A page with everything on it."""
    failing = make_task("t2i", mixed=MIXED, prompt=SCRIPT, failures=("sqnr_db below 12 at 3 of 10 calls",))
    ranges = {"t2i": {"conv1/Conv": 4.0, "out/Gemm": 1.0}, "sr": {"conv1/Conv": 16.0, "out/Gemm": 1.0}}
    report = make_report(failing, make_task("sr", guided=False), ranges=ranges, device_here=False)
    return render(with_forms(report, "static"))


def test_a_page_is_whole_alone_and_accessible(full: str) -> None:
    assert markup_problems(full) == []
    assert "http:" not in full and "https:" not in full
    policy = next(a["content"] for a in Page(full).of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (("</table>", ""), "closes nothing"),
        (("<main>", '<main><img src="https://x.invalid/a.png" alt="a">'), "src leads to https"),
        (("<main>", '<main><a href="#nowhere">x</a>'), "href leads to #nowhere"),
        (("<main>", '<main><p id="verdict">'), "is there 2 times"),
        (("<main>", "<main><script></script>"), "<script>"),
        (("<style>", "<style>@import 'a.css';"), "a style loads"),
        ((' role="img"', ""), "a figure says nothing"),
        ((' alt="', ' title="'), "a picture says nothing"),
        ((' scope="row"', ""), "a table header has no scope"),
        (("<h4>", "<h6>"), "headings are of levels"),
    ],
)
def test_the_checker_sees_what_is_wrong(full: str, harm: tuple[str, str], said: str) -> None:
    assert harm[0] in full
    assert any(said in problem for problem in markup_problems(full.replace(*harm)))


def test_what_a_user_wrote_is_text(full: str) -> None:
    page = Page(full)
    assert not page.of("script") and SCRIPT in page.text
    assert all(SCRIPT not in str(task.entry) for task in [make_task("sr")])
    assert any(f"prompt “{SCRIPT}”" in str(a["alt"]) for a in page.of("img"))


def test_names_in_a_bundle_are_text_in_figures_too() -> None:
    evil = {**MIXED, "layers": [{**layer, "name": f'"><svg onload=x>{SCRIPT}'} for layer in MIXED["layers"]]}  # type: ignore[attr-defined]
    text = render(make_report(make_task("t2i", mixed=evil)))
    page = Page(text)
    assert markup_problems(text) == []
    assert not page.of("script") and not any("onload" in attributes for _, attributes in page.tags)


def test_figures_take_their_colours_from_the_page(full: str) -> None:
    """Or they could not be read in the dark: no colour of matplotlib's own is left in them."""
    figures = re.findall(r"<svg.*?</svg>", full, re.DOTALL)
    assert len(figures) == 2 + 2 + 1 + 1  # t2i: SQNR, guidance, two of the layers; sr: SQNR; one engine or two
    for figure in figures:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", figure)
        assert "var(--ink)" in figure and "DejaVu" not in figure
    style = full[full.index("<style>") : full.index("</style>")]
    for name in set(re.findall(r"var\(--([\w-]+)\)", "".join(figures))):
        assert len(re.findall(rf"--{name}:", style)) == 3, f"--{name} for light, dark and print"


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        if len(colour) == 4:
            colour = "#" + "".join(c * 2 for c in colour[1:])
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_in_dark() -> None:
    assert contrast("#fff", "#000") == pytest.approx(21)
    style = (Path(report.__file__).parent / "style.css").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(schemes) == 3  # light, dark, print
    for colours in schemes:
        for text in ("ink", "muted", "link", "pass", "fail", "estimate"):
            for ground in ("page", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for line in ("series-a", "series-b", "series-c", "limit"):  # graphics: 3 is enough
            assert contrast(colours[line], colours["card"]) >= 3, line


def test_a_failed_task_is_named_with_its_failures(full: str) -> None:
    page = Page(full)
    assert "1 of 2 tasks is below a threshold: t2i." in " ".join(page.text.split())
    assert page.text.count("sqnr_db below 12 at 3 of 10 calls") == 2  # in the verdict and in its section
    passed = Page(render(make_report(make_task("sr")))).text
    assert "The task meets every threshold." in " ".join(passed.split())


def test_what_was_not_measured_is_said(full: str) -> None:
    text = " ".join(Page(full).text.split())
    assert "Not measured on the device. There is no Some NPU in this machine" in text
    assert "Not measured: no mixed-precision search ran for this bundle." in text  # sr
    assert "Not measured: the bundle has no such table." in text  # backends
    assert "not measured: scikit-image is not installed here" in text
    assert "At the build: not measured, not checked." in text
    assert "built, not run: no such device here" in text
    here = " ".join(Page(render(make_report(make_task("sr", guided=False)))).text.split())
    assert "Not measured on the device" not in here
    assert "Not measured: the bundle records no ranges of two tasks." in here


def test_layers_kept_in_float_are_listed_with_the_reason(full: str) -> None:
    text = " ".join(Page(full).text.split())
    assert "3 groups of layers" in text and "2 stayed float; run as a whole over 40 calls, the choice meets" in text
    assert re.search(r"q/MatMul and 1 more ?MatMul ?21\.5 dB ?19\.0 dB ?– ?0\.200 ?0\.100 ?accuracy", text)
    assert "out/Gemm (Gemm): 50.0 dB, saves -0.050 ms; float: INT8 slower" in text  # the figure's own words
    assert "UNet SQNR, worst call≥ 25 dB20.0 dB26.0 dB" in text.replace(" <", "<")


def test_ranges_are_compared_between_the_tasks(full: str) -> None:
    text = " ".join(Page(full).text.split())
    assert "1 layer costs some task more than 6 dB" in text
    assert re.search(r"conv1/Conv ?4 ?−12\.0 dB ?16 ?largest", text)


ALIGNMENT = {
    "settings": {"limit_bits": 0.5, "powers_of_two": True},
    "layers": {
        "quiet/Conv": {"factors": {"t2i": 1, "sr": 2}, "before": {"t2i": 0, "sr": 0.9}, "after": {"t2i": 0.1, "sr": 0}},
        "loud/Conv": {"factors": {"t2i": 1, "sr": 4}, "before": {"t2i": 0, "sr": 2.4}, "after": {"t2i": 0, "sr": 0.4}},
    },
    "left": {"out/Conv": "its bias is no constant"},
    "measured": 12,
    "worst_before": {"t2i": 0.3, "sr": 2.4},
    "worst_after": {"t2i": 0.3, "sr": 0.4},
}


def test_one_engine_shows_what_its_tasks_lose_to_one_scale_and_names_the_pass_where_it_ran() -> None:
    """Its layers have one range each, so there is nothing to compare between tasks but what was measured of each."""

    def shown(**quantisation: Any) -> str:
        record = conform(QuantisationRecord, {"ranges": {"loud/Conv": 4.0}, **quantisation})
        tasks = [make_task(name) for name in ("t2i", "sr")]
        for index, task in enumerate(tasks):
            entry = replace(task.entry, provenance=bundle.TaskProvenance(quantisation=record))
            tasks[index] = replace(task, entry=entry)
        report = make_report(*tasks, ranges={task: {"loud/Conv": 4.0} for task in ("t2i", "sr")})
        page = render(with_forms(report, "shared"))
        assert not markup_problems(page)
        return " ".join(Page(page).text.split())

    text = shown(alignment=ALIGNMENT)
    assert "Of 12 layers, 2 would have cost some task more than 0.5 of its 8 bits" in text and "mtu::align" in text
    assert re.search(r"loud/Conv ?0\.0 → 0\.0 ?× 1 ?2\.4 → 0\.4 ?× 4 ?quiet/Conv", text)
    assert "Left as they are: out/Conv, as its bias is no constant." in text and "dB, one of its 8 bits" not in text
    text = shown()
    assert "Not measured: the ranges of its tasks were not aligned." in text and "mtu::align" not in text


def test_numbers_nobody_has_named_yet_are_shown() -> None:
    rows = {row.key: row for row in metric_lines(SUMMARY, {"image_psnr_db": 30.0}, Thresholds.default("int8"))}
    assert rows["a_new_metric"].label == "a new metric" and rows["a_new_metric"].passed is None
    assert rows["guidance.text.sqnr_db"].unit == "dB"
    assert rows["image_psnr_db"].recorded == 30.0 and rows["image_psnr_db"].passed is True
    assert "region" not in rows and "pictures" not in rows
    assert rows["ssim"].passed is False  # asked for, and not measured
    assert "0.4321" in render(make_report(make_task("sr")))


def test_a_metric_is_judged_on_the_right_side() -> None:
    asked = Thresholds.default("int8").changed(
        {"truth_drop_db": 1.0, "guidance_ratio": 0.6, "pooled_guidance_ratio": 0.85, "guidance_cosine": 0.7}
    )
    rows = {row.key: row for row in metric_lines(SUMMARY, None, asked)}
    assert rows["truth_drop_db"].bounds == (None, 1.0) and rows["truth_drop_db"].passed is False
    low, high = rows["guidance_ratio"].bounds or (None, None)
    assert low == 0.6 and high == pytest.approx(1 / 0.6) and rows["guidance_ratio"].passed is True
    assert rows["guidance.text.ratio"].bounds == (0.85, 1 / 0.85)
    assert bounds("mean_sqnr_db", {"sqnr_db": 12.0}) is None


def test_pictures_are_carried_pixel_for_pixel(full: str) -> None:
    task = make_task("t2i")
    carried = [decode(str(a["src"])) for a in Page(full).of("img")]
    for wanted in (task.pictures[0].reference, task.pictures[0].made):
        assert any(np.array_equal(np.asarray(wanted), one) for one in carried)


def test_a_difference_is_amplified_and_equal_pictures_are_black() -> None:
    one, other = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 100, np.uint8)
    other[0, 0], other[1, 1] = (97, 100, 103), (200, 0, 100)
    shown = np.asarray(difference(Image.fromarray(one), Image.fromarray(other)))
    assert tuple(shown[0, 0]) == (3 * AMPLIFIED, 0, 3 * AMPLIFIED)
    assert tuple(shown[1, 1]) == (255, 255, 0)
    assert shown.sum() == 6 * AMPLIFIED + 510


def test_a_bundle_that_is_not_quantised_has_a_page_too() -> None:
    task = make_task("t2i")
    plain = replace(task, entry=replace(task.entry, calibration=None, provenance=bundle.TaskProvenance()))
    text = render(make_report(plain))
    assert markup_problems(text) == []
    assert "Not measured: nothing is quantised in this task." in text
    assert "Nothing is quantised with a calibration set." in text


def test_compressed_weights_are_told_of() -> None:
    told: Any = {
        "layers": {"Conv": {"int8": 50}},
        "bytes_before": 4_000_000,
        "bytes_after": 1_000_000,
        "tool": "nncf 3.4",
    }
    task = make_task("t2i")
    told = bundle.TaskProvenance(compression=conform(CompressionRecord, told))
    text = render(make_report(replace(task, entry=replace(task.entry, provenance=told))))
    assert markup_problems(text) == []
    assert "Conv int8 50" in Page(text).text.replace("\xa0", " ") and "4.0 MB → 1.0 MB" in text


def test_one_engine_is_drawn_against_one_a_task(full: str) -> None:
    section = full[full.index('<section id="routing">') : full.index('<section id="measured">')]
    assert (
        "Each of the 2 tasks has an engine of its own" in section and "is one for all: one engine takes less" in section
    )
    for words in ("22.0 MB, estimate", "12.5 MB, estimate", "18.0 MB", "9.5 MB, estimate"):
        assert f">{words}</text>" in section
    shared = render(with_forms(make_report(make_task("t2i"), make_task("sr", guided=False)), "shared"))
    memory = shared[shared.index('<section id="memory">') : shared.index('<section id="routing">')]
    assert "UNet of all tasks" in memory and "vae decoder" in memory and ">t2i<" not in memory
    assert "All 2 tasks run in one engine" in shared and markup_problems(shared) == []
    assert "Does not apply: the bundle has one task" in render(make_report(make_task("t2i")))


def test_forms_are_measured_where_they_were_built_and_estimated_where_not(tmp_path: Path) -> None:
    report = with_forms(make_report(make_task("t2i"), make_task("sr", guided=False)), "static")
    for name in ("t2i.xml", "sr.xml", "weights.bin"):
        (tmp_path / name).write_bytes(bytes(1000))
    common = {"weights": "weights.bin", "weights_bytes": 900}  # of both tasks, counted once
    tasks = {
        name: replace(entry, engine=replace(entry.engine, path=f"{name}.xml", **common))
        for name, entry in report.manifest.tasks.items()
    }
    manifest = replace(report.manifest, tasks=tasks)
    unets = [Network(name, tasks[name].engine, (f"{name}.xml",), 1000) for name in tasks]
    part = Network("vae decoder", report.manifest.vae_decoder, ("t2i.xml",), 1000)
    found = compare_forms(tmp_path, manifest, (*unets, part))
    assert found is not None and found.recommended == "shared"
    assert found.disk == {"static": Amount(3000, "measured"), "shared": Amount(9_500_000, "estimate")}
    assert found.memory["static"] == Amount(22_000_000, "estimate")
    alone = replace(manifest, tasks={"t2i": tasks["t2i"]})
    unplanned = replace(manifest, provenance=bundle.BuildProvenance())
    assert compare_forms(tmp_path, alone, unets) is None and compare_forms(tmp_path, unplanned, unets) is None


def test_large_pictures_are_scaled_down_and_the_page_says_so(full: str) -> None:
    assert decode(data_uri(picture(0, LONGEST))).shape == (LONGEST, LONGEST, 3)
    assert decode(data_uri(picture(0, 2 * LONGEST))).shape == (LONGEST, LONGEST, 3)
    task = make_task("sr")
    large = tuple(replace(one, reference=picture(0, 512), made=picture(1, 512)) for one in task.pictures)
    assert "scaled down" in render(make_report(replace(task, pictures=large)))
    assert "scaled down" not in full


def test_a_search_of_another_version_is_an_error_that_says_so() -> None:
    raw = make_report(make_task("t2i", mixed=MIXED)).manifest.to_json()
    raw["scheduler"] = {"_class_name": "DDIMScheduler"}
    raw["tasks"]["t2i"]["provenance"]["quantisation"]["mixed"]["layers"] = [{"name": "a"}]
    with pytest.raises(BundleError, match=r"t2i\.provenance\.quantisation\.mixed\.layers\[0\]\.members is missing"):
        bundle.Manifest.from_json(raw)


def test_the_json_has_the_figures_and_no_pictures() -> None:
    found = json.loads(json.dumps(make_report(make_task("t2i", mixed=MIXED)).to_json(), allow_nan=False))
    assert found["passed"] is True
    assert found["tasks"][0]["mixed"]["layers"][1]["kept"] == "accuracy"
    assert len(found["tasks"][0]["pictures"][0]["calls"]) == STEPS
    assert "made" not in found["tasks"][0]["pictures"][0]
