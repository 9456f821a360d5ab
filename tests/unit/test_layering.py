"""Imports run one way, proved over the source text and by importing in a fresh process.

The order of the library's packages is read from the import-linter contract in pyproject.toml, so a
new package is named in one place. Packages that do not exist yet are ignored.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "safegene_vllm"
SERVER = "safegene_server"
FOLDERS = {LIBRARY: ROOT / LIBRARY, SERVER: ROOT / "server" / SERVER}

TORCH_PACKAGES = {"composition", "recipe", "evaluation", "plugin", "offline", "tiny_model"}
SERVER_MAY_IMPORT = {"dataset", "errors", "formats", "settings"}
SERVER_MAY_IMPORT_FROM = (
    "safegene_vllm.client.schemas",
    "safegene_vllm.evaluation.judges.",
    "safegene_vllm.plugin.api_process.",
)
"""Torch-free modules of packages that are not."""
HEAVY = {"vllm", "torch", "fastapi", "transformers", "peft"}


@dataclass(frozen=True)
class Module:
    """One source file under its dotted name."""

    name: str
    path: Path

    @property
    def package(self) -> str:
        return self.name if self.path.stem == "__init__" else self.name.rpartition(".")[0]

    @property
    def top_package(self) -> str:
        """First name below the root package; "" for the root package itself."""
        return [*self.name.split("."), ""][1]


@dataclass(frozen=True)
class Import:
    """One imported dotted name; `on_load` is False inside functions and TYPE_CHECKING blocks."""

    target: str
    line: int
    on_load: bool

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


def modules(package: str) -> list[Module]:
    folder = FOLDERS[package]
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found.append(Module(".".join((package, *parts)), path))
    return found


def imports_in(source: str, package: str) -> list[Import]:
    return list(_walk(ast.parse(source), package, on_load=True))


def _walk(node: ast.AST, package: str, on_load: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, on_load) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
        yield from (Import(f"{base}.{alias.name}", node.lineno, on_load) for alias in node.names)
    elif isinstance(node, ast.Call) and (name := _name_in_import_call(node)):
        yield Import(name, node.lineno, on_load)

    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        on_load = False
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, package, on_load and not (typing_only and name == "body"))


def _name_in_import_call(call: ast.Call) -> str | None:
    importers = {"__import__", "import_module", "importlib.import_module"}
    match call.args:
        case [ast.Constant(value=str(name)), *_] if ast.unparse(call.func) in importers:
            return name
    return None


def package_ranks() -> dict[str, int]:
    """Package -> height of its layer, lowest = 0, from the layers contract in pyproject.toml."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = config["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    return {
        top_package.strip(" ()"): height
        for height, layer in enumerate(reversed(layers))
        for top_package in layer.replace("|", ":").split(":")
    }


RANKS = package_ranks()


def violations(package: str, is_violation: Callable[[Module, Import], bool]) -> list[str]:
    """`file:line imports name` for every import of the package that is a violation."""
    return [
        f"{module.path.relative_to(ROOT)}:{item.line} imports {item.target}"
        for module in modules(package)
        for item in imports_in(module.path.read_text(encoding="utf-8"), module.package)
        if is_violation(module, item)
    ]


def library_package(target: str) -> str | None:
    """The library package that a dotted name lies in; None for other packages and the root."""
    parts = target.split(".")
    return parts[1] if parts[0] == LIBRARY and len(parts) > 1 and parts[1] in RANKS else None


def loaded_by(names: list[str]) -> set[str]:
    """Which of HEAVY a fresh interpreter has loaded after importing `names`."""
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "server")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_library_package_is_in_the_layers_contract() -> None:
    unnamed = {m.top_package for m in modules(LIBRARY)} - {""} - set(RANKS)
    assert not unnamed, f"add to the layers in pyproject.toml: {sorted(unnamed)}"


def test_imports_run_one_way() -> None:
    def points_up(module: Module, item: Import) -> bool:
        target = library_package(item.target)
        return target is not None and RANKS[target] > RANKS.get(module.top_package, len(RANKS))

    assert violations(LIBRARY, points_up) == []


@pytest.mark.parametrize("package", FOLDERS)
def test_only_the_plugin_package_imports_vllm(package: str) -> None:
    def is_violation(module: Module, item: Import) -> bool:
        in_plugin = package == LIBRARY and module.top_package == "plugin"
        return item.top == "vllm" and not in_plugin

    assert violations(package, is_violation) == []


def test_only_tensor_packages_import_torch_on_load() -> None:
    def is_violation(module: Module, item: Import) -> bool:
        return item.top == "torch" and item.on_load and module.top_package not in TORCH_PACKAGES

    assert violations(LIBRARY, is_violation) == []


def test_the_plugin_entry_module_loads_only_the_standard_library() -> None:
    """vLLM logs a plugin whose import fails and serves on without it: nothing here may fail."""
    allowed = sys.stdlib_module_names

    def is_violation(module: Module, item: Import) -> bool:
        entry = module.name in {LIBRARY, f"{LIBRARY}.plugin"}
        return entry and item.on_load and item.top not in allowed

    assert violations(LIBRARY, is_violation) == []


def test_the_server_imports_only_torch_free_packages() -> None:
    def is_violation(module: Module, item: Import) -> bool:
        top_package = library_package(item.target)
        allowed = top_package is None or top_package in SERVER_MAY_IMPORT
        return item.top == "torch" or not (
            allowed or item.target.startswith(SERVER_MAY_IMPORT_FROM)
        )

    assert violations(SERVER, is_violation) == []


def test_only_the_cli_imports_the_server() -> None:
    def is_violation(module: Module, item: Import) -> bool:
        return item.top == SERVER and (module.top_package != "cli" or item.on_load)

    assert violations(LIBRARY, is_violation) == []


def test_importing_the_library_loads_no_heavy_package() -> None:
    light = [m.name for m in modules(LIBRARY) if m.top_package not in TORCH_PACKAGES | {"__main__"}]
    assert loaded_by(light) == set()


def test_importing_the_server_loads_neither_torch_nor_vllm() -> None:
    # Alembic runs its environment as a script, in a context of its own.
    scripts = ("__main__", ".migrations.env")
    names = [m.name for m in modules(SERVER) if not m.name.endswith(scripts)]
    assert loaded_by(names) - {"fastapi"} == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", [("torch.nn", True)]),
        ("from . import family", [("pkg.sub.family", True)]),
        ("from ..errors import X", [("pkg.errors.X", True)]),
        ("def f():\n    import vllm", [("vllm", False)]),
        (
            "if TYPE_CHECKING:\n    import torch\nelse:\n    import json",
            [("torch", False), ("json", True)],
        ),
        ("try:\n    import torch\nexcept ImportError:\n    pass", [("torch", True)]),
        ("class A:\n    import torch", [("torch", True)]),
        ("importlib.import_module('vllm.config')", [("vllm.config", True)]),
    ],
)
def test_the_reader_of_imports(source: str, expected: list[tuple[str, bool]]) -> None:
    assert [(i.target, i.on_load) for i in imports_in(source, "pkg.sub")] == expected
