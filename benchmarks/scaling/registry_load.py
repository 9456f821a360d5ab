"""Cost of replicas for a registry: the real one, under simulated replicas.

Counts statements, rows and seconds of everything a replica does, by the same calls as
server/safegene_server/replica. No engine runs. PostgreSQL is started from this machine's binaries,
with its own defaults (fsync too), if they exist.
"""

from __future__ import annotations

import gc
import os
import pwd
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import event, func, select

from safegene_server.registry import History, Identity, Registry, tables, watch
from safegene_vllm.formats.adapter import LoRAShape
from safegene_vllm.formats.family import Base, FamilyHeader, SelectedLayer
from safegene_vllm.formats.profile import make_profile
from safegene_vllm.planner import ModelShape

ACTOR = "replica"
OPERATIONS = ("join", "snapshot", "receipts_all", "receipts_one", "beat", "poll", "claim")
"""A replica joins, reads all tenants, reports all or one, sends a heartbeat, polls the version,
claims a job."""


@dataclass
class Cost:
    """Cost of one operation: statements, rows, median seconds, and CPU seconds.

    The caller's CPU time includes the database for SQLite; `server_cpu_s` is PostgreSQL's.
    """

    statements: float = 0.0
    writes: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    caller_cpu_s: float = 0.0
    server_cpu_s: float = 0.0


@dataclass
class Measured:
    """One database with `tenants` tenants.

    `costs` per operation; by number of replicas `propagation_s` from a publication until all have
    reported it and the `change_cpu_s` of that; `connections` of one replica.
    """

    backend: str
    tenants: int
    costs: dict[str, Cost] = field(default_factory=dict)
    propagation_s: dict[int, float] = field(default_factory=dict)
    change_cpu_s: dict[int, float] = field(default_factory=dict)
    statements_per_change: dict[int, float] = field(default_factory=dict)
    audit_per_change: dict[int, float] = field(default_factory=dict)
    receipt_rows: dict[int, int] = field(default_factory=dict)
    connections: int | None = None
    connections_allowed: int | None = None


def measured_of(raw: Mapping[str, Any]) -> Measured:
    """Restore a `Measured` from JSON."""

    def by_count(key: str) -> dict[int, Any]:
        return {int(count): value for count, value in raw[key].items()}

    counted = ("propagation_s", "change_cpu_s", "statements_per_change", "audit_per_change")
    return Measured(
        **{
            **raw,
            **{key: by_count(key) for key in (*counted, "receipt_rows")},
            "costs": {name: Cost(**cost) for name, cost in raw["costs"].items()},
        }
    )


class Postgres:
    """A running server in `folder`; `cpu_s` counts all of its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def query(self, statement: str, database: str = "postgres") -> Any:
        """The first value of an SQL statement's result, or None."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            row = cursor.fetchone() if cursor.description else None
            return None if row is None else row[0]

    def cpu_s(self) -> float:
        """CPU seconds that the server has used, ended processes included."""
        pid = int((self.folder / "data" / "postmaster.pid").read_text().split("\n")[0])
        ticks = sum(_ticks(pid, ended=True))
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            try:
                ticks += sum(_ticks(int(child)))
            except FileNotFoundError:
                continue
        return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int, *, ended: bool = False) -> tuple[int, ...]:
    """User and system time of a process, with `ended` also of its ended children."""
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
    """Run a server during the block; None if the machine has no binaries."""
    binaries = _binaries()
    if binaries is None:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="sgpg", dir="/tmp"))
    more: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server does not run as root
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


def header_of(shape: ModelShape) -> FamilyHeader:
    """A family with a vector of rank 16 on every site of the model; no tensors."""
    sites = {}
    for layer in range(shape.layers):
        for linear in shape.linears:
            for name, width in zip(linear.sites, linear.widths, strict=True):
                block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                site = f"model.layers.{layer}.{block}.{name}"
                sites[site] = LoRAShape(site, 16, width, linear.d_in, "BF16")
    return FamilyHeader(
        base=Base("Qwen2ForCausalLM", shape.layers, "sha256:" + "ba" * 32),
        sites=sites,
        layers=tuple(SelectedLayer(layer, 0.1) for layer in range(shape.layers)),
        bounds=(0.0, 3.0),
        recipe={"method": "scaling"},
        name="scaling",
        digest="sha256:" + "fa" * 32,
    )


def publish(registry: Registry, header: FamilyHeader, tenant: str, step: int) -> int:
    """Publish another revision of a tenant; return its id."""
    row = [0.5 + 0.001 * ((step + layer) % 97) for layer in range(header.num_layers)]
    profile = make_profile(header, row, {"method": "scaling"})
    digest = f"sha256:{zlib.crc32(tenant.encode()):08x}" + "0" * 56
    added = registry.revisions.add(
        tenant, profile, actor=ACTOR, adapter_digest=digest, source="s3://bucket/" + tenant
    )
    registry.revisions.set_state(added.id, "ready", actor=ACTOR)
    registry.rollouts.publish(tenant, added.number, actor=ACTOR)
    return added.id


def fill(url: str, header: FamilyHeader, tenants: int, track: Callable[[int], Any]) -> None:
    """Add tenants with a key each, and a second revision for every tenth.

    Commits do not wait for the disk here; those that are measured do.
    """
    if url.startswith("postgresql"):
        registry = Registry(url + "&options=-csynchronous_commit%3Doff")
    else:
        registry = Registry(url)
        event.listen(
            registry.database.engine, "connect", lambda c, _: c.execute("PRAGMA synchronous = OFF")
        )
        registry.database.engine.dispose()
    registry.families.add(header, "s3://bucket/family", actor=ACTOR)
    for number in range(tenants):
        name = f"tenant-{number:05d}/app"
        registry.tenants.add(name, header.digest, actor=ACTOR)
        publish(registry, header, name, 0)
        if number % 10 == 0:
            publish(registry, header, name, 1)
        registry.keys.add(f"key-{number}", scopes=["serve"], tenants=[name], actor=ACTOR)
        track(number)
    registry.close()


class Counting:
    """Counter of statements and rows of one registry's connections."""

    def __init__(self, registry: Registry) -> None:
        self.kinds: Counter[str] = Counter()
        self.rows = 0
        event.listen(registry.database.engine, "after_cursor_execute", self._count)

    def _count(self, _c: Any, cursor: Any, statement: str, *_rest: Any) -> None:
        self.kinds[statement.lstrip().split(None, 1)[0].upper()] += 1
        self.rows += max(getattr(cursor, "rowcount", 0) or 0, 0)

    @property
    def statements(self) -> int:
        return sum(self.kinds.values())

    @property
    def writes(self) -> int:
        return sum(self.kinds[kind] for kind in ("INSERT", "UPDATE", "DELETE"))


class Replica:
    """The registry's side of one replica: the calls of server/safegene_server/replica, in order."""

    def __init__(self, url: str, header: FamilyHeader) -> None:
        self.registry = Registry(url, migrate=False)
        self.history = History(self.registry)
        self.contents: dict[int, Identity] = {}
        self.header = header
        self.id = ""
        self.version = 0

    def join(self) -> None:
        self.id = self.registry.replicas.join("host", 1, actor=ACTOR).id

    def snapshot(self) -> list[int]:
        """Ids of the published revisions."""
        found, _ = self.history.snapshot()
        self.version = found.version
        self.contents = {revision.id: revision.identity for revision in found.revisions}
        return [revision.id for revision in found.revisions]

    def beat(self, fresh: list[int] | None = None) -> None:
        """A heartbeat, with the receipts of new revisions."""
        receipts = {number: ({"ranks": [_receipt(number)]}, True) for number in fresh or ()}
        self.registry.replicas.heartbeat(
            self.id,
            applied_version=self.version,
            receipts=receipts,
            contents=[self.contents[number] for number in receipts if number in self.contents],
            seen=self.history.position,
            actor=ACTOR,
        )

    def poll(self) -> None:
        self.history.poll()

    def claim(self) -> None:
        self.registry.jobs.claim(
            self.id, actor=self.id, kinds=["onboard"], family=self.header.digest
        )

    def follow(self, fresh: list[int]) -> None:
        """Follow a change: read all tenants, report new revisions."""
        self.snapshot()
        self.beat(fresh)

    def close(self) -> None:
        self.registry.close()


def _receipt(number: int) -> dict[str, Any]:
    """A receipt of realistic size."""
    digest = "sha256:" + "ab" * 32
    return {
        "rank": 0,
        "name": f"tenant-{number:05d}/app@1",
        "lora_int_id": number,
        "slot": None,
        "profile": digest,
        "gain_digest": digest,
        "tenant_sites": 196,
        "safety_sites": 196,
        "gain_norm": 2.5,
    }


def cost_of(
    registry: Registry, server: Postgres | None, times: int, do: Callable[[], object]
) -> Cost:
    """Cost of `do` over `times` calls, after an uncounted one."""
    do()
    gc.collect()  # garbage of earlier operations is not this one's cost
    counting = Counting(registry)
    cpu = 0.0 if server is None else server.cpu_s()
    took, mine = [], time.process_time()
    for _ in range(times):
        started = time.perf_counter()
        do()
        took.append(time.perf_counter() - started)
    mine = time.process_time() - mine
    event.remove(registry.database.engine, "after_cursor_execute", counting._count)
    cpu = 0.0 if server is None else server.cpu_s() - cpu
    return Cost(
        counting.statements / times,
        counting.writes / times,
        counting.rows / times,
        statistics.median(took),
        mine / times,
        cpu / times,
    )


def measure(
    url: str,
    shape: ModelShape,
    *,
    tenants: int,
    replicas: tuple[int, ...],
    server: Postgres | None,
    track: Callable[[int], Any],
) -> Measured:
    """Fill the empty database at `url` and run replicas on it."""
    header = header_of(shape)
    fill(url, header, tenants, track)
    registry = Registry(url)
    found = Measured("postgresql" if registry.database.is_postgresql else "sqlite", tenants)
    one = Replica(url, header)
    one.join()
    ids = one.snapshot()
    work: Mapping[str, tuple[int, Callable[[], object]]] = {
        "join": (10, one.join),
        "snapshot": (30, one.snapshot),
        "receipts_all": (10, lambda: one.beat(ids)),
        "receipts_one": (50, lambda: one.beat(ids[:1])),
        "beat": (200, one.beat),
        "poll": (300, one.poll),
        "claim": (200, one.claim),
    }
    for name in OPERATIONS:
        times, do = work[name]
        found.costs[name] = cost_of(one.registry, server, times, do)
    one.registry.replicas.leave(one.id, actor=ACTOR)
    one.close()
    for count in replicas:
        _run_together(registry, url, header, ids, count, found, server)
    if server is not None:
        found.connections = _connections(url, header, server)
        found.connections_allowed = int(server.query("SHOW max_connections"))
    registry.close()
    return found


def _run_together(
    registry: Registry,
    url: str,
    header: FamilyHeader,
    ids: list[int],
    count: int,
    found: Measured,
    server: Postgres | None,
) -> None:
    """Let `count` replicas join and report all tenants, then follow three changes at once."""
    with _replicas(url, header, count) as fleet, ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda r: (r.join(), r.beat(ids)), fleet))
        found.receipt_rows[count] = _rows(registry, tables.receipts)
        counts = [Counting(r.registry) for r in fleet]
        audit, took, cpu_s = _rows(registry, tables.audit), [], []
        for change in range(3):
            fresh = publish(registry, header, "tenant-00001/app", 10 * count + change)
            started, before = time.perf_counter(), _cpu_s(server)
            list(pool.map(lambda r, new=fresh: r.follow([new]), fleet))
            took.append(time.perf_counter() - started)
            cpu_s.append(_cpu_s(server) - before)
        found.propagation_s[count] = statistics.median(took)
        found.change_cpu_s[count] = statistics.median(cpu_s)
        found.statements_per_change[count] = sum(c.statements for c in counts) / 3
        found.audit_per_change[count] = (_rows(registry, tables.audit) - audit) / 3
        list(pool.map(lambda r: r.registry.replicas.leave(r.id, actor=ACTOR), fleet))


def _cpu_s(server: Postgres | None) -> float:
    """CPU seconds of this process and the server."""
    return time.process_time() + (0.0 if server is None else server.cpu_s())


@contextmanager
def _replicas(url: str, header: FamilyHeader, count: int) -> Iterator[list[Replica]]:
    fleet = [Replica(url, header) for _ in range(count)]
    try:
        yield fleet
    finally:
        for replica in fleet:
            replica.close()


def _rows(registry: Registry, table: Any) -> int:
    with registry.database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def _connections(url: str, header: FamilyHeader, server: Postgres) -> int:
    """Connections of one replica that watches, sends heartbeats, follows and claims jobs twice.

    Each in a thread of its own, for a few seconds.
    """
    before = int(server.query(_OURS))
    stop = threading.Event()
    with _replicas(url, header, 1) as (replica,):
        replica.join()

        def again(do: Callable[[], object]) -> None:
            while not stop.wait(0.02):
                do()

        def listen() -> None:
            for _ in watch(replica.history, stop):
                pass

        loops = [lambda: again(replica.beat), lambda: again(replica.snapshot), listen]
        loops += [lambda: again(replica.claim)] * 2
        threads = [threading.Thread(target=loop) for loop in loops]
        for thread in threads:
            thread.start()
        time.sleep(3.0)
        held = int(server.query(_OURS)) - before
        stop.set()
        for thread in threads:
            thread.join()
        replica.registry.replicas.leave(replica.id, actor=ACTOR)
    return held


_OURS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'safegene'"
