"""Checks of an installation and its machine: `safegene doctor`, and the start of `safegene serve`.

Reads package metadata, and the names of libraries in compiled modules. Imports neither torch nor
vLLM, since a broken installation fails at that very import.
"""

from collections.abc import Mapping

from safegene_vllm.doctor.check import Check as Check
from safegene_vllm.doctor.check import Status as Status
from safegene_vllm.doctor.distributions import Distributions
from safegene_vllm.doctor.installation import installation_checks, optional_checks
from safegene_vllm.doctor.machine import machine_checks
from safegene_vllm.errors import ConfigError, raise_errors


def examine(
    environ: Mapping[str, str], distributions: Distributions | None = None
) -> tuple[Check, ...]:
    """Return every check of the installation, its optional extras, and this machine."""
    found = distributions or Distributions()
    return (
        *installation_checks(found, environ),
        *optional_checks(found),
        *machine_checks(found),
    )


def problems(
    environ: Mapping[str, str], distributions: Distributions | None = None
) -> tuple[Check, ...]:
    """Return what is certain to stop or break a server, before one is started.

    Cheap enough for every start: metadata only, no import of torch or vLLM.
    """
    found = distributions or Distributions()
    checks = installation_checks(found, environ)
    return tuple(check for check in checks if check.status is Status.ERROR)


def check_installation(environ: Mapping[str, str]) -> None:
    """Check, before a server starts, that it can. Raises ConfigError with the commands to run."""
    raise_errors([ConfigError(str(problem)) for problem in problems(environ)])
