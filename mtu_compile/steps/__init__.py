"""Steps of a build as pure functions, whose results are kept by what they were made of.

``step`` declares one, ``Steps`` runs calls of them: a result that is kept already is not made again. What a result was
made of, and so where it is kept, is the hash of everything the function was given (files by their content), of our own
code, and of the tools and, where the result depends on it, the CPU that computed it (``steps.key``).
See docs/decisions/0026-cache.md.
"""

from mtu_compile.steps.key import NOT_CONTENT
from mtu_compile.steps.running import Ran, Steps
from mtu_compile.steps.step import Call, Step, Work, step
from mtu_compile.steps.store import Store

__all__ = ["NOT_CONTENT", "Call", "Ran", "Step", "Steps", "Store", "Work", "step"]
