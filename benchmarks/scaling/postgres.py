"""A PostgreSQL server of our own for a benchmark: started from this machine's binaries, or not.

It keeps its own defaults but for where it listens: also fsync stays on. Tells the processor seconds
of its processes, as /proc has them.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg


class Postgres:
    """A running server in a directory of its own; `cpu_s` counts all of its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def ask(self, statement: str, database: str = "postgres") -> Any:
        """The first value that an SQL statement gives, None where it gives none."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            row = cursor.fetchone() if cursor.description else None
            return None if row is None else row[0]

    def cpu_s(self) -> float:
        """Processor seconds that the server has used; of processes that ended, too."""
        pid = int((self.folder / "data" / "postmaster.pid").read_text().split("\n")[0])
        ticks = sum(_ticks(pid, ended=True))
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            try:
                ticks += sum(_ticks(int(child)))
            except FileNotFoundError:
                continue
        return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int, *, ended: bool = False) -> tuple[int, ...]:
    """User and system time of a process, with `ended` also of its children that are gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return tuple(int(value) for value in fields[11 : 15 if ended else 13])


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if found:
        return found[-1].parent
    return None if on_path is None else Path(on_path).parent


@contextmanager
def postgres() -> Iterator[Postgres | None]:
    """A server for as long as the block lasts; None where the machine has no binaries."""
    binaries = _binaries()
    if binaries is None:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="sgpg", dir="/tmp"))
    more: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        names = {account.pw_name for account in pwd.getpwall()}
        account = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        os.chown(folder, account.pw_uid, account.pw_gid)
        more = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def do(program: str, *words: str) -> None:
        command = [str(binaries / program), "-D", str(folder / "data"), *words]
        subprocess.run(
            command, check=True, cwd=folder, timeout=120, stdout=subprocess.DEVNULL, **more
        )

    do("initdb", "-U", "postgres", "-A", "trust", "--no-locale", "-E", "UTF8")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    do("pg_ctl", "-w", "-t", "60", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield Postgres(folder)
    finally:
        do("pg_ctl", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)
