"""The command line. Commands are loaded when they are asked for, so that ``--help`` does not wait for torch."""

from __future__ import annotations

import errno
import sys
from importlib import import_module

import click

from mtu_compile.cli.signals import Stopped, catch_signals
from mtu_compile.core.errors import EXIT_OTHER, MtuError
from mtu_compile.core.version import __version__

#: Command name → module under ``mtu_compile.cli`` whose ``command`` it is, in the order ``--help`` lists them.
COMMANDS = {
    "build": "build",
    "plan": "plan",
    "calibrate": "calibrate",
    "check": "check",
    "report": "report",
    "run": "run",
    "serve": "serve",
    "inspect": "inspect",
    "export-static": "export_static",
    "board": "board",
    "deploy": "deploy",
    "boards": "boards",
    "key": "key",
    "sign": "sign",
    "verify": "verify",
    "pack": "pack",
    "unpack": "unpack",
    "targets": "targets",
    "cache": "cache",
    "upcycle": "upcycle",
    "train": "train",
}

DEFAULT = "build"


class LazyGroup(click.Group):
    """A group whose first word may be left out: ``mtu-compile --target cpu`` is ``mtu-compile build --target cpu``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"mtu_compile.cli.{COMMANDS[cmd_name]}").command
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version", "--debug"}
        position = next((i for i, arg in enumerate(args) if arg != "--debug"), len(args))
        if position == len(args) or (args[position] not in COMMANDS and args[position] not in own):
            args = [*args[:position], DEFAULT, *args[position:]]
        return super().parse_args(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mtu-compile")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Compile multi-task upcycled diffusion UNets for edge devices.

    Without a command, `build` is meant: `mtu-compile --target cpu --int8`.

    Exit codes: 0 done, 2 usage, 3 below the accuracy threshold, 4 a toolchain is missing, 5 bad or tampered input,
    1 anything else; 130 interrupted, 143 terminated.
    """
    ctx.obj = {"debug": debug}


def main() -> None:
    """Entry point of ``mtu-compile``: errors become a message, a hint and an exit code."""
    debug = "--debug" in sys.argv
    catch_signals()
    try:
        # click gives back the code of whatever ended early, and raises nothing
        if code := cli(standalone_mode=False):
            sys.exit(code)
    except Stopped as stop:
        _fail(stop.word, "nothing was left half-written", stop.code)
    except click.Abort:
        _fail("interrupted", None, 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", "nothing was left half-written", 130)
    except MtuError as error:
        if debug:
            raise
        _fail(error.message, error.hint, error.exit_code)
    except BrokenPipeError:
        sys.exit(EXIT_OTHER)
    except OSError as error:
        if debug:
            raise
        hint = "free some space, or choose another folder" if error.errno == errno.ENOSPC else None
        _fail(f"{error.filename or 'i/o'}: {error.strerror or error}", hint, EXIT_OTHER)
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}", "run again with --debug for the traceback", EXIT_OTHER)


def _fail(message: str, hint: str | None, code: int) -> None:
    click.echo(f"error: {_harmless(message)}", err=True)
    if hint:
        click.echo(f"hint: {_harmless(hint)}", err=True)
    sys.exit(code)


def _harmless(text: str) -> str:
    """``text`` without what a terminal obeys or cannot show: messages quote files that somebody else wrote."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)
