"""Registries for tests on a SQLite file and on PostgreSQL, by the same fixture.

PostgreSQL is started once per session, on a socket in a temporary directory, from the machine's
binaries. Not a conftest: tests import what they use by name.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import pwd
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from safegene_server.registry import Registry, Revision
from safegene_vllm.formats.adapter import LoRAShape
from safegene_vllm.formats.family import Base, FamilyHeader, SelectedLayer
from safegene_vllm.formats.profile import Profile, make_profile

ROOT = Path(__file__).parents[2]
BACKENDS = ("sqlite", "postgresql")
ADAPTER = "sha256:" + "ad" * 32
_numbers = itertools.count()


def header(name: str = "tiny", digit: str = "f") -> FamilyHeader:
    """Three layers, vectors in 0 and 2, bounds 0 to 3; no tensors, so the digest is made up."""
    sites = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
    return FamilyHeader(
        base=Base("LlamaForCausalLM", 3, "sha256:" + "ba" * 32),
        sites={site: LoRAShape(site, 2, 4, 3, "F32") for site in sites},
        layers=(SelectedLayer(0, 0.25), SelectedLayer(2, None)),
        bounds=(0.0, 3.0),
        recipe={"method": "contrast", "seed": 7, "learning_rate": 1e-300},
        name=name,
        digest="sha256:" + digit * 64,
    )


HEADER = header()
FAMILY = HEADER.digest


def profile(first: float = 1.0, last: float = 0.5, **calibration: Any) -> Profile:
    return make_profile(HEADER, [first, 0.0, last], calibration)


def add_ready(registry: Registry, tenant: str, first: float = 1.0, **more: Any) -> Revision:
    """A revision that may be published."""
    added = registry.revisions.add(tenant, profile(first), actor="test", **more)
    return registry.revisions.set_state(added.id, "ready", actor="test")


def add_published(registry: Registry, tenant: str, first: float = 1.0, **more: Any) -> Revision:
    added = add_ready(registry, tenant, first, **more)
    registry.rollouts.publish(tenant, added.number, actor="test")
    return registry.revisions.get_by_id(added.id)


class Postgres:
    """A PostgreSQL server; it runs as `user` when the tests run as root, which it rejects."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="sgpg", dir="/tmp"))
        self.user = _account() if os.geteuid() == 0 else None
        if self.user is not None:
            account = pwd.getpwnam(self.user)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        atexit.register(self.stop)
        data = str(self.folder / "data")
        self.run(
            "initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "-A",
            "trust",
            "--no-sync",
            "--no-locale",
            "-E",
            "UTF8",
        )
        options = (
            f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off "
            "-c max_connections=60 -c shared_buffers=16MB"
        )
        log = str(self.folder / "log")
        self.run("pg_ctl", "-D", data, "-w", "-t", "60", "-l", log, "-o", options, "start")
        self.execute("CREATE DATABASE migrated")
        Registry(self.url("migrated")).close()

    def run(self, program: str, *arguments: str) -> None:
        more: dict[str, Any] = {}
        if self.user is not None:
            group = pwd.getpwnam(self.user).pw_gid
            more = {"user": self.user, "group": group, "extra_groups": []}
        done = subprocess.run(
            [str(self.binaries / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            timeout=120,
            **more,
        )
        assert done.returncode == 0, f"{program}: {done.stderr.decode()}"

    def stop(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def create(self, template: str) -> str:
        name = f"t{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def disconnect(self, name: str) -> None:
        """Terminate every connection to a database."""
        self.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _account() -> str:
    """Account of the server when the tests run as root: postgres or nobody."""
    names = {account.pw_name for account in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _initdb() -> Path | None:
    """Path to initdb of the newest PostgreSQL of this machine."""
    found = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    where = found[-1] if found else shutil.which("initdb")
    return None if where is None else Path(where)


def has_postgres() -> bool:
    return _initdb() is not None


@functools.cache
def postgres() -> Postgres:
    """The session's server; skips where the machine has no binaries."""
    initdb = _initdb()
    if initdb is None:
        pytest.skip("no PostgreSQL binaries (initdb, pg_ctl) on this machine")
    return Postgres(initdb.parent)


@functools.cache
def _migrated_sqlite() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sgsqlite"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Registry(folder / "registry.db").close()
    return folder / "registry.db"


@pytest.fixture(params=BACKENDS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'registry.db'}"
        return
    name = postgres().create("template0")
    yield postgres().url(name)
    postgres().drop(name)


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated database without rows."""
    if request.param == "sqlite":
        shutil.copy(_migrated_sqlite(), tmp_path / "registry.db")
        yield f"sqlite:///{tmp_path / 'registry.db'}"
        return
    name = postgres().create("migrated")
    yield postgres().url(name)
    postgres().drop(name)


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    """A registry with one family and one tenant, `acme/support`, that has no revision yet."""
    opened = Registry(url)
    opened.families.add(HEADER, "s3://bucket/family", actor="test")
    opened.tenants.add("acme/support", FAMILY, actor="test", source="/adapters/acme")
    yield opened
    opened.close()


def back_up(registry: Registry) -> Callable[[], None]:
    """Back up a registry as `sqlite3 .backup` or a database template does; return the restore.

    It restores the database while others have it open.
    """
    if registry.database.is_postgresql:
        server, name, copy = postgres(), str(registry.database.url.database), f"b{next(_numbers)}"
        server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        server.disconnect(name)
        server.execute(f"CREATE DATABASE {copy} TEMPLATE {name}")
        server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

        def restore() -> None:
            server.drop(name)
            server.execute(f"CREATE DATABASE {name} TEMPLATE {copy}")

        return restore
    path = str(registry.database.url.database)
    copy = f"{path}.backup{next(_numbers)}"
    copy_sqlite(path, copy)
    return lambda: copy_sqlite(copy, path)


def copy_sqlite(source: str | Path, target: str | Path) -> None:
    """Copy a database that others may have open."""
    with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as write:
        read.backup(write)


def start_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start an interpreter that runs `code`; its output is read from stdout."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "server"), str(ROOT / "tests" / "support")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_line(process: subprocess.Popen[str], word: str) -> None:
    """Wait for a line of the process's stdout."""
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word
