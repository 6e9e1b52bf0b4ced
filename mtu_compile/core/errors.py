"""Every error a user can meet, and the exit code it ends the command with."""

from __future__ import annotations

from typing import Any

EXIT_OK = 0
EXIT_OTHER = 1
EXIT_USAGE = 2
EXIT_ACCURACY = 3
EXIT_TOOLCHAIN = 4
EXIT_INPUT = 5


class MtuError(Exception):
    """Root of all errors: what is wrong, and what to do about it.

    ``message`` is lower-case and names the thing that is wrong; ``hint`` says what to type or change.
    """

    exit_code: int = EXIT_OTHER

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it comes back from another process as itself, whatever its ``__init__`` wants."""
        return _again, (type(self), self.args), dict(self.__dict__)


def _again(kind: type[MtuError], args: tuple[Any, ...]) -> MtuError:
    return kind.__new__(kind, *args)


class ConfigError(MtuError):
    """Options that contradict each other or name what does not exist (an unknown task, target or size)."""

    exit_code = EXIT_USAGE


class ModelError(MtuError):
    """A model folder that is missing, damaged, or not a multi-task upcycled UNet."""

    exit_code = EXIT_INPUT


class InputError(MtuError):
    """A file the user handed over is not what it has to be (a picture that is not a picture, say)."""

    exit_code = EXIT_INPUT


class PassError(MtuError):
    """A graph pass met a graph it must not rewrite, or produced one that breaks its contract."""


class CalibrationError(MtuError):
    """Calibration data made for another model or task, random, or damaged."""

    exit_code = EXIT_INPUT


class TargetError(MtuError):
    """A target cannot take this model, or could not build it."""


class ToolchainMissing(TargetError):
    """The vendor toolchain a target needs is not installed; the hint is the command that installs it."""

    exit_code = EXIT_TOOLCHAIN


class BuildError(TargetError):
    """The vendor toolchain refused or failed to build an engine."""


class AccuracyError(MtuError):
    """A task fell below its accuracy threshold."""

    exit_code = EXIT_ACCURACY


class LimitError(AccuracyError):
    """A device is slower with it, or needs more memory, than whoever runs the device allows."""


class NotFiniteError(AccuracyError):
    """A network gave NaN or Inf values: what it computes does not fit its float type.

    Attributes:
        network: ``"unet"``, ``"text_encoder"``, ``"text_encoder_2"``, ``"vae_encoder"`` or ``"vae_decoder"``.
        task: whose UNet; ``None`` for the other networks, which all tasks share.
        step: of the denoising, from 1; ``None`` for what runs once.
    """

    def __init__(
        self, message: str, *, network: str, task: str | None = None, step: int | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.network = network
        self.task = task
        self.step = step


class BundleError(MtuError):
    """A bundle that is incomplete, tampered with, or of another schema version."""

    exit_code = EXIT_INPUT


class DeployError(MtuError):
    """A board that could not be reached, or could not be left with the new bundle; it goes on with the one it had."""


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says first, or else its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
