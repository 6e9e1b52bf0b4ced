"""``python -m mtu_compile.serve BUNDLE``: the same as ``mtu-compile serve``, without the compiler's command line."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from mtu_compile.core.errors import MtuError
from mtu_compile.serve.settings import Settings, options


def parser() -> argparse.ArgumentParser:
    """The command line, made of ``settings.options``."""
    made = argparse.ArgumentParser("python -m mtu_compile.serve", description="Serve BUNDLE by OpenAI's Images API.")
    made.add_argument("bundle", type=Path, metavar="BUNDLE")
    for one in options():
        default = "" if one.default is None or one.many else f" Default: {one.default}."
        if one.kind is bool:
            made.add_argument(one.flag, action="store_true", help=one.text.replace("%", "%%"))
            continue
        kind = one.kind
        made.add_argument(
            one.flag,
            type=kind,
            action="append" if one.many else "store",
            default=[] if one.many else one.default,
            help=(one.text + default).replace("%", "%%"),
        )
    return made


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    given: dict[str, Any] = vars(parser().parse_args())
    values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in given.items()}
    settings = Settings(**values)
    try:
        from mtu_compile.serve.server import serve

        serve(settings, lambda line: print(line, flush=True), lambda line: print(f"note: {line}", file=sys.stderr))
    except MtuError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
