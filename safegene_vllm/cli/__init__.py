"""The `safegene` command: assembles the commands and reports errors.

Each command is a module of this package that loads torch or vLLM only when it runs. Every
SafegeneError ends here, as one message on stderr and exit code 1.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from safegene_vllm import __version__
from safegene_vllm.cli.console import clean
from safegene_vllm.cli.options import expand_groups
from safegene_vllm.errors import SafegeneError

COMMANDS = {
    name: f"safegene_vllm.cli.{name}"
    for name in (
        *("inspect", "degrade", "extract", "select", "calibrate", "profile", "export", "verify"),
        *(
            "evaluate",
            "report",
            "plan",
            "serve",
            "config",
            "tenant",
            "family",
            "key",
            "rollout",
            "job",
        ),
        *("probe", "replica", "audit", "usage", "doctor"),
    )
}
"""Modules of the commands, in the order of the help: a function of its own name, or a group."""
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safegene-vllm {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Serve one safety vector per model family with stock vLLM, calibrated per tenant."""


def _group(name: str, help: str | None, *, completion: bool = False) -> typer.Typer:
    return typer.Typer(
        name=name,
        context_settings=HELP_OPTIONS,
        help=help,
        no_args_is_help=True,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def build_app() -> typer.Typer:
    """Build the command line from every command whose module is installed.

    A module may set CONTEXT_SETTINGS (`{"allow_extra_args": True, ...}`) for its command. One that
    has COMMANDS (name -> function) is a group of commands, described by HELP; its CONTEXTS are
    settings by command.
    """
    app = _group("safegene", None, completion=True)
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
            contexts = getattr(loaded, "CONTEXTS", {})
            for command, function in loaded.COMMANDS.items():
                context = {**HELP_OPTIONS, **contexts.get(command, {})}
                group.command(command, context_settings=context)(expand_groups(function))
            app.add_typer(group)
            continue
        settings = {**HELP_OPTIONS, **getattr(loaded, "CONTEXT_SETTINGS", {})}
        app.command(name, context_settings=settings)(expand_groups(getattr(loaded, name)))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line in `arguments` (default: the process's own) and exit."""
    try:
        build_app()(arguments)
    except BrokenPipeError:
        # The reader of our output (head, less) has closed the pipe.
        sys.stderr.close()
        sys.exit(1)
    except (SafegeneError, OSError) as error:
        typer.echo(clean(f"{type(error).__name__}: {error}"), err=True)
        sys.exit(1)
