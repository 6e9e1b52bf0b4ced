"""Who takes part, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

#: Environments by name: (directory, what installs it), made by `make bench-peers`.
OURS, PEERS, ONNX = ".venv", ".venv-peers", ".venv-peers-onnx"


def file_name(name: str) -> str:
    """A contender's name as one of a file."""
    return name.replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: as the table has it.
        module: of ``libraries``, what knows the library.
        environment: the virtual environment it runs in.
        options: given to the module's functions.
        shares: name of the contender whose prepared files it uses.
        ours: whether it is what this project makes.
        float_name: of a quantised contender, the one its pictures are compared with, as noise is each library's own.
    """

    name: str
    module: str
    environment: str = PEERS
    options: Mapping[str, str] = field(default_factory=dict)
    shares: str | None = None
    ours: bool = False
    float_name: str | None = None

    @property
    def folder(self) -> str:
        """Name of the folder its files are in."""
        return file_name(self.shares or self.name)


#: The first is what the others are timed beside.
CONTENDERS = (
    Contender(
        "ours, INT8, static", "ours", OURS, {"precision": "int8", "routing": "static"}, None, True, "ours, bf16, static"
    ),
    Contender(
        "ours, INT8, shared", "ours", OURS, {"precision": "int8", "routing": "shared"}, None, True, "ours, bf16, static"
    ),
    Contender(
        "ours, INT8, decoder too",
        "ours",
        OURS,
        {"precision": "int8", "routing": "static", "decoder": "int8"},
        None,
        True,
        "ours, bf16, static",
    ),
    Contender("ours, bf16, static", "ours", OURS, {"precision": "bf16", "routing": "static"}, ours=True),
    Contender("optimum-intel, hybrid INT8", "intel", PEERS, {"weights": "hybrid"}, float_name="optimum-intel, float"),
    Contender("optimum-intel, float", "intel", PEERS, {"weights": "fp16"}),
    Contender(
        "OpenVINO GenAI, hybrid INT8",
        "genai",
        PEERS,
        shares="optimum-intel, hybrid INT8",
        float_name="OpenVINO GenAI, float",
    ),
    Contender("OpenVINO GenAI, float", "genai", PEERS, shares="optimum-intel, float"),
    Contender("stable-diffusion.cpp, f16", "cpp", PEERS, {"type": "f16"}),
    Contender(
        "stable-diffusion.cpp, q8_0",
        "cpp",
        PEERS,
        {"type": "q8_0"},
        float_name="stable-diffusion.cpp, f16",
    ),
    Contender("diffusers, torch.compile, bf16", "eager", PEERS, {"dtype": "bfloat16", "compile": "yes"}),
    Contender("diffusers, bf16", "eager", PEERS, {"dtype": "bfloat16"}),
    Contender("diffusers, fp32", "eager", PEERS, {"dtype": "float32"}),
    Contender("ONNX Runtime (optimum-onnx), fp32", "onnx_pipeline", ONNX),
)


def contenders(which: str) -> tuple[Contender, ...]:
    """Who takes part with a model; what is ours is told where weights are random."""
    if which != "sd15":
        return CONTENDERS
    return tuple(replace(one, options={**one.options, "weights": "random"}) if one.ours else one for one in CONTENDERS)
