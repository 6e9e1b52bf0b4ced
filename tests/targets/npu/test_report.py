from __future__ import annotations

import json
from pathlib import Path

import pytest

from targets.npu.report import Report, read_report

LOG = """npu_compile: openvino 2026.4.1-22982
\x1b[36m[INFO] 16:37:24.483 [VCLCompilerImpl] Lib VCL Compiler Version: 7.10\x1b[0m
[INFO] 16:37:24.483 [NPU_VCL] Current compiler ID: 2026.5.0-1-a4b1ef7632b
[ERROR] 16:38:01.734 [IE::FrontEnd::importNetwork]   Upper bounds are not specified
[ERROR] 16:38:01.735 [IE::FrontEnd::importNetwork]   Upper bounds are not specified
[INFO] 16:37:55.100 [execution-analysis]   Estimated inference latency: 86695.64 us in dpu frequency 1850.00 MHz
[INFO] 16:37:58.277 [convert-VPUASM-to-NPUReg40XX]   Total number of FPOps: 100
[INFO] 16:37:58.277 [convert-VPUASM-to-NPUReg40XX]   Total number of INTOps: 300
[INFO] 16:37:59.073 [ELF Backend - Export] Blob compatibility string: 'compiler=8.4;npu=4000'
"""
TRACE = """{"traceEvents":[
{"name": "process_name", "ph": "M", "pid":5, "args": {"name" : "Layers"}},
{"name":"b?t_Add/cluster_0", "cat":"DMA", "ph":"X", "ts":0.0, "dur":10.0, "pid":0, "tid":1, "args":{"Source memory:": "DDR"}},
{"name":"a?t_Conv/cluster_0", "cat":"DPU", "ph":"X", "ts":1.0, "dur":4.0, "pid":1, "tid":4, "args":{}},
{"name":"a?t_Conv/cluster_0/variant_0", "cat":"DPU", "ph":"X", "ts":1.0, "dur":4.0, "pid":1, "tid":5, "args":{}},
{"name":"b?t_Add/cluster_1", "cat":"DPU", "ph":"X", "ts":3.0, "dur":2.0, "pid":2, "tid":8, "args":{}},
{"name":"a?t_Conv/tile_0", "cat":"Shave", "ph":"X", "ts":4.0, "dur":3.0, "pid":1, "tid":6, "args":{}},
{"name":"start", "cat":"DMA", "ph":"X", "ts":2.0, "dur":0.0, "pid":0, "tid":0, "args":{}},
{"name":"b", "cat":"Layer", "ph":"X", "ts":0.5, "dur":9.5, "pid":5, "tid":20, "args":{"Layer type": "Add", "DMA time": "5us 444ns"}},
{"name":"start", "cat":"Layer", "ph":"X", "ts":2.0, "dur":0.0, "pid":5, "tid":20, "args":{}},
{"name":"a", "cat":"Layer", "ph":"X", "ts":0.0, "dur":7.0, "pid":5, "tid":20, "args":{"Layer type": "Convolution"}}
],
"taskStatistics": {
"total duration":10.000,
"DMA duration":10.000,
"DPU duration":4.000,
"SW duration":3.000,
"DMA duration without overlaps":4.000,
"Sum of SW task durations":3.0
},
"workpoint": { "freq": 1850.0, "status": "SIM" },
"displayTimeUnit": "ns"
}
"""  # noqa: E501 - one event a line, as the compiler writes it


@pytest.fixture
def report(tmp_path: Path) -> Report:
    trace = tmp_path / "trace.json"
    trace.write_text(TRACE)
    assert json.loads(TRACE)
    return read_report(LOG, trace)


def test_the_log_is_read(report: Report) -> None:
    assert (report.latency_ms, report.dpu_mhz) == (86.69564, 1850.0)
    assert (report.compiler, report.compatibility) == ("2026.5.0-1-a4b1ef7632b", "compiler=8.4;npu=4000")
    assert (report.float_ops, report.int_ops, report.int_share) == (100, 300, 0.75)
    assert report.errors == ("[IE::FrontEnd::importNetwork]   Upper bounds are not specified",)


def test_each_instant_belongs_to_whoever_is_waited_for(report: Report) -> None:
    """The matrix engines first, shared by the tasks on them; data movement only where nothing computes."""
    first, second, mark = report.layers
    assert (first.name, first.type, first.span_us) == ("a", "Convolution", 7.0)
    assert (first.dpu_us, first.shave_us, first.dma_us) == (3.0, 2.0, 0.0)
    assert (second.dpu_us, second.shave_us, second.dma_us) == (1.0, 0.0, 4.0)
    assert (mark.type, mark.dpu_us + mark.shave_us + mark.dma_us) == ("<Unknown>", 0.0)
    assert report.busy is not None
    assert (report.busy.dpu_ms, report.busy.dma_alone_ms) == (0.004, 0.004)


def test_types_are_summed_for_the_manifest(report: Report) -> None:
    summary = report.summary()
    assert summary["ms_by_type"] == {"Convolution": {"dpu": 0.003, "shave": 0.002}, "Add": {"dpu": 0.001, "dma": 0.004}}
    assert summary["busy_ms"] == {"dpu": 0.004, "shave": 0.003, "dma": 0.01, "dma_alone": 0.004}
    assert summary["int8_share_of_operations"] == 0.75
    json.dumps(summary)


def test_a_compiler_that_says_nothing_leaves_nothing_made_up(tmp_path: Path) -> None:
    report = read_report("npu_compile: exported\n", tmp_path / "none")
    assert report == Report()
    assert report.int_share is None and report.summary() == {} and report.ms_by_type() == {}
