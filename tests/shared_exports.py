"""ONNX exports shared by content: the same module with the same inputs is exported once a test run, whoever asks.

Exporting a tiny UNet takes PyTorch fifteen seconds, most of a tiny build, and dozens of tests export the same few.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

#: Bytes of weights above which an export is not kept: what Stable Diffusion's size takes is not worth a copy on disk.
LARGEST = 256 << 20


def shared_export(folder: Path) -> Callable[..., Path]:
    """What exports every network of ``mtu_compile.model.export``, but takes from ``folder`` what has been exported.

    What an export is made from decides which it is: every module's class and attributes, every tensor, the example
    inputs, the names and the free sizes. A path that a configuration remembers has no part in it.
    """
    from mtu_compile.model import export

    real = export._export
    signature = inspect.signature(real)
    folder.mkdir(parents=True, exist_ok=True)

    def shared(*args: Any, **kwargs: Any) -> Path:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = dict(given.arguments)
        module, out = options.pop("module"), Path(options.pop("out"))
        if sum(tensor.nbytes for tensor in module.state_dict().values()) > LARGEST:
            return real(*args, **kwargs)
        kept = folder / fingerprint(module, options)
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                partial = kept.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                real(module, out=partial, **options)
                partial.rename(kept)
        shutil.copytree(kept, out, dirs_exist_ok=True)
        return out / "model.onnx"

    return shared


def fingerprint(module: Any, options: Mapping[str, Any]) -> str:
    """A digest of a torch module, weights and all, and of what it is exported with."""
    digest = hashlib.sha256(repr(plain(options)).encode())
    for name, part in module.named_modules():
        # the tensors follow; hooks are torch's own affair
        own = {key: value for key, value in vars(part).items() if not (key in TENSORS or key.endswith("_hooks"))}
        digest.update(repr((name, type(part).__qualname__, plain(own))).encode())
    for tensors in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            digest.update(repr((name, plain(tensor))).encode())
    return digest.hexdigest()[:32]


#: Ends of names that have no part in a fingerprint: where a configuration was read from and, in an order that differs
#: from process to process, which options had been left out.
REMEMBERED = ("_path", "_use_default_values")

#: Attributes of a module that hold its tensors and the modules in it.
TENSORS = frozenset({"_parameters", "_buffers", "_modules"})


def plain(value: Any, depth: int = 8) -> Any:
    """A value as nested tuples of text and numbers, the same in every process."""
    import torch

    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b""
        return (str(value.dtype), tuple(value.shape), hashlib.sha256(content).hexdigest())
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, Mapping):
        items = {str(key): each for key, each in value.items() if not str(key).endswith(REMEMBERED)}
        return tuple((key, plain(items[key], depth - 1)) for key in sorted(items)) if depth else "…"
    if isinstance(value, (list, tuple)):
        return tuple(plain(each, depth - 1) for each in value) if depth else "…"
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(repr(plain(each)) for each in value))
    if isinstance(value, torch.nn.Module) or not hasattr(value, "__dict__") or inspect.isroutine(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return (type(value).__qualname__, plain(vars(value), depth - 1) if depth else "…")
