"""What runs on a board: numpy, Pillow, tokenizers and the vendor's runtime. No torch, nothing of a compiler."""

from mtu_compile.runtime.pipeline import Result, Runtime, load
from mtu_compile.runtime.request import Request

__all__ = ["Request", "Result", "Runtime", "load"]
