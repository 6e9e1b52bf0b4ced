"""OpenVINO as a Polygraphy runner: ``polygraphy run unet.onnx --onnxrt --openvino``.

The entry point group ``polygraphy.run.plugins`` names ``export_argument_groups``; whoever has this package and
Polygraphy installed has the option. The runner can be used from Python too: it is what ``Target.runner`` returns.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from polygraphy import util
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import ModelArgs, OnnxLoadArgs
from polygraphy.tools.args import util as args_util
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from targets.openvino.engine import port_name, reason
from targets.openvino.ir import INSTALL_HINT


class OpenVINORunner(BaseRunner):  # type: ignore[misc]
    """Runs a model with OpenVINO.

    Args:
        model: path of an ONNX file or of an IR's ``.xml``, the bytes of an ONNX file, or a callable returning one.
        device: OpenVINO's device name.
        precision: OpenVINO's ``INFERENCE_PRECISION_HINT``. It is always stated: OpenVINO's own default is bf16 on CPUs
            that have it, which makes a comparison with float32 look like a defect.
        config: more OpenVINO options; an ``INFERENCE_PRECISION_HINT`` in it wins over ``precision``.
        name: Polygraphy's name of the runner.
    """

    def __init__(
        self,
        model: str | bytes | Callable[[], str | bytes],
        *,
        device: str = "CPU",
        precision: str = "f32",
        config: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, prefix="openvino-runner")
        self._model = model
        self._device = device
        self._config = {"INFERENCE_PRECISION_HINT": precision, **(config or {})}

    @util.check_called_by("activate")  # type: ignore[untyped-decorator,unused-ignore]
    def activate_impl(self) -> None:
        """Read and compile the model.

        Raises:
            PolygraphyException: OpenVINO is missing, or cannot read or compile the model.
        """
        try:
            import openvino
        except ImportError:
            G_LOGGER.critical(f"OpenVINO is not installed: {INSTALL_HINT}")
        source, _ = util.invoke_if_callable(self._model)
        try:
            core = openvino.Core()
            model = core.read_model(model=source) if isinstance(source, bytes) else core.read_model(str(source))
            self._names = [port_name(port) for port in model.outputs]
            compiled = core.compile_model(model, self._device, self._config)
        except RuntimeError as error:
            G_LOGGER.critical(f"OpenVINO cannot run the model on {self._device}: {reason(error)}")
        self._inputs = list(model.inputs)
        self._request = compiled.create_infer_request()

    @util.check_called_by("get_input_metadata")  # type: ignore[untyped-decorator,unused-ignore]
    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs; dynamic dimensions are ``None``."""
        metadata = TensorMetadata()
        for port in self._inputs:
            shape = [None if dim.is_dynamic else dim.get_length() for dim in port.partial_shape]
            dtype = DataType.from_dtype(port.element_type.to_dtype(), "numpy")
            metadata.add(port_name(port), dtype=dtype, shape=shape)
        return metadata

    @util.check_called_by("infer")  # type: ignore[untyped-decorator,unused-ignore]
    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """One inference; arrays (or torch tensors) by input name → new arrays by output name."""
        feed = {name: util.array.to_numpy(array) for name, array in feed_dict.items()}
        start = time.perf_counter()
        results = self._request.infer(feed)
        self.inference_time = time.perf_counter() - start
        return OrderedDict((name, results[index].copy()) for index, name in enumerate(self._names))

    @util.check_called_by("deactivate")  # type: ignore[untyped-decorator,unused-ignore]
    def deactivate_impl(self) -> None:
        del self._request, self._inputs, self._names


class OpenVINORunnerArgs(BaseRunnerArgs):  # type: ignore[misc]
    """
    OpenVINO Inference: running inference with OpenVINO.

    Depends on:

        - OnnxLoadArgs
        - ModelArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "OpenVINO", "openvino"

    def get_extra_help_text_impl(self) -> str:
        return "The model may be ONNX or an OpenVINO IR (.xml)."

    def add_parser_args_impl(self) -> None:
        self.group.add_argument("--openvino-device", help="OpenVINO device. Defaults to CPU", default="CPU")
        self.group.add_argument(
            "--openvino-precision",
            help="Type that floating-point layers run in. Defaults to f32 (OpenVINO's own default may be lower)",
            choices=["f32", "bf16", "f16"],
            default="f32",
        )
        self.group.add_argument(
            "--openvino-model",
            help="Another model for OpenVINO to run: an ONNX file, or the .xml of an IR. "
            "Defaults to the model the other runners use",
            default=None,
        )
        self.group.add_argument(
            "--openvino-config",
            help="OpenVINO options. Format: --openvino-config <name>=<value>. "
            "For example: --openvino-config NUM_STREAMS=1 INFERENCE_NUM_THREADS=4",
            nargs="+",
            default=None,
        )

    def parse_impl(self, args: Any) -> None:
        """Read the options.

        Attributes:
            device, precision, model: as given.
            config: OpenVINO options by name.
        """
        self.device = args_util.get(args, "openvino_device")
        self.precision = args_util.get(args, "openvino_precision")
        self.model = args_util.parse_path(args_util.get(args, "openvino_model"), "OpenVINO model")
        self.config = {}
        for option in args_util.get(args, "openvino_config") or []:
            name, equals, value = option.partition("=")
            if not (name and equals):
                G_LOGGER.critical(f"--openvino-config wants <name>=<value>, not {option!r}")
            self.config[name] = value

    def add_to_script_impl(self, script: Any) -> None:
        script.add_import(imports=["OpenVINORunner"], frm="targets.openvino.polygraphy_plugin")
        options = {"device": self.device, "precision": self.precision, "config": self.config or None}
        script.add_runner(make_invocable("OpenVINORunner", self._model(script), **options))

    def _model(self, script: Any) -> Any:
        path = self.model or self.arg_groups[ModelArgs].path
        if self.model or path.endswith(".xml") or not self.arg_groups[OnnxLoadArgs].must_use_onnx_loader():
            return path
        return self.arg_groups[OnnxLoadArgs].add_to_script(script, serialize_model=True)


def export_argument_groups() -> list[BaseRunnerArgs]:
    """Called by ``polygraphy run``: the argument groups of this plugin."""
    # Polygraphy asks for --model-type when it does not know a suffix, and no type it offers is an IR. "onnx" is the one
    # it makes no demands on until a runner reads the file.
    ModelArgs.EXT_MODEL_TYPE_MAPPING.setdefault(".xml", "onnx")
    return [OpenVINORunnerArgs()]
