"""The `grace` command.

A command is a file: `grace/cli/<name>.py` holds a function `<name>` (with its options as typer
annotations), or a `typer.Typer()` named `app` where it has commands of its own. Nothing is
registered by hand: the package is scanned. A file whose name Python reserves ends in an underscore
(`import_.py` is `grace import`), an underscore within a name is a hyphen of the command; a file
whose name begins with one is not a command.

A command file imports typer and the standard library at its top and everything heavy (torch,
transformers) inside its function, so that `grace --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

import typer

from grace.cli._errors import bad_input, one_line

_ORDER = (
    "info",
    "quickstart",
    "train",
    "export",
    "import",
    "verify",
    "generate",
    "chat",
    "evaluate",
)


def command_names() -> list[str]:
    """Names of all commands, those of the usual way through first, the others by alphabet."""
    files = (module.name for module in pkgutil.iter_modules(__path__))
    names = {name.rstrip("_").replace("_", "-") for name in files if not name.startswith("_")}
    first = [name for name in _ORDER if name in names]
    return first + sorted(names.difference(first))


def build_app() -> typer.Typer:
    """The typer application with every command of this package."""
    app = typer.Typer(
        name="grace",
        help="Low-bit vision-language models, trained under a large teacher.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in command_names():
        _register(app, name)
    return app


def _options(
    debug: bool = typer.Option(
        False, "--debug", envvar="GRACE_DEBUG", help="Show the traceback of an error."
    ),
) -> None:
    """Low-bit vision-language models, trained under a large teacher."""  # `main` reads --debug


def _register(app: typer.Typer, name: str) -> None:
    plain = name.replace("-", "_")
    reserved = f"{plain}_"
    known = {module.name for module in pkgutil.iter_modules(__path__)}
    module = importlib.import_module(f"{__name__}.{reserved if reserved in known else plain}")
    if hasattr(module, "app"):
        app.add_typer(module.app, name=name)
        return
    function = getattr(module, reserved, None) or getattr(module, plain)
    app.command(name)(function)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command and leave with its exit code.

    0: done; 1: a fault of the program (with its traceback) or a check that failed; 2: bad input,
    told in one line on stderr (its traceback with `--debug` or GRACE_DEBUG=1); 130: interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in arguments:  # anywhere on the line, also behind a command's name
        arguments.remove("--debug")
        os.environ["GRACE_DEBUG"] = "1"
    sys.exit(_run(arguments or ["--help"]))


def _run(arguments: list[str]) -> int:
    try:
        code = build_app()(arguments, prog_name="grace", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _tell("interrupted", 130)
    except Exception as error:
        if os.environ.get("GRACE_DEBUG", "0") not in ("", "0") or not bad_input(error):
            raise
        return _tell(one_line(error), 2)


def _tell(message: str, code: int) -> int:
    print(f"grace: {message}", file=sys.stderr)
    return code
