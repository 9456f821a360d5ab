"""The `safegene` command: puts the commands together and tells errors.

Each command lives in its own module here, which loads torch or vLLM only once it runs. Every
refusal of the library ends here, as one line on stderr and exit code 1.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from safegene_vllm import __version__
from safegene_vllm.cli.console import clean
from safegene_vllm.errors import SafegeneError

COMMANDS = {
    "inspect": "safegene_vllm.cli.inspect",
    "degrade": "safegene_vllm.cli.degrade",
    "extract": "safegene_vllm.cli.extract",
    "select": "safegene_vllm.cli.select",
    "calibrate": "safegene_vllm.cli.calibrate",
    "profile": "safegene_vllm.cli.profile",
    "export": "safegene_vllm.cli.export",
    "verify": "safegene_vllm.cli.verify",
    "evaluate": "safegene_vllm.cli.evaluate",
    "report": "safegene_vllm.cli.report",
    "plan": "safegene_vllm.cli.plan",
    "serve": "safegene_vllm.cli.serve",
    "tenant": "safegene_vllm.cli.tenant",
    "family": "safegene_vllm.cli.family",
    "key": "safegene_vllm.cli.key",
    "rollout": "safegene_vllm.cli.rollout",
    "job": "safegene_vllm.cli.job",
    "probe": "safegene_vllm.cli.probe",
    "replica": "safegene_vllm.cli.replica",
    "audit": "safegene_vllm.cli.audit",
}
"""Where each command is, in the order of the help: a function of its own name, or a group."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safegene-vllm {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Tell the version."),
    ] = False,
) -> None:
    """Safety vectors for a model family, calibrated per tenant, served by stock vLLM."""


def _group(name: str, help: str | None) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def build_app() -> typer.Typer:
    """The command line with every command whose module is there.

    A module may set CONTEXT_SETTINGS (`{"allow_extra_args": True, ...}`) for its command. One that
    has COMMANDS (name -> function) is a group of commands, told about in HELP.
    """
    app = _group("safegene", None)
    app.callback()(_options)
    for name, module in COMMANDS.items():
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            continue
        if hasattr(loaded, "COMMANDS"):
            group = _group(name, loaded.HELP)
            for command, function in loaded.COMMANDS.items():
                group.command(command)(function)
            app.add_typer(group)
            continue
        settings = getattr(loaded, "CONTEXT_SETTINGS", None)
        app.command(name, context_settings=settings)(getattr(loaded, name))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line in `arguments` (default: the process's own) and exit."""
    try:
        build_app()(arguments)
    except BrokenPipeError:
        # Whoever read our output (head, less) has seen enough.
        sys.stderr.close()
        sys.exit(1)
    except (SafegeneError, OSError) as error:
        typer.echo(clean(f"{type(error).__name__}: {error}"), err=True)
        sys.exit(1)
