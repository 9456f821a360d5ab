"""Cost of replicas for a registry: the real one, under simulated replicas.

Counts statements and seconds of everything a replica does, by the same calls as
server/safegene_server/replica. No engine runs.
"""

from __future__ import annotations

import gc
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import psycopg
from sqlalchemy import event, func, select
from sqlalchemy.engine import make_url

from safegene_server.registry import History, Identity, Registry, tables
from safegene_vllm.formats.adapter import LoRAShape
from safegene_vllm.formats.family import Base, FamilyHeader, SelectedLayer
from safegene_vllm.formats.profile import make_profile
from safegene_vllm.planner import ModelShape

ACTOR = "replica"
OPERATIONS = {
    "join": 10,
    "snapshot": 30,
    "receipts_all": 10,
    "receipts_one": 50,
    "beat": 200,
    "poll": 300,
    "claim": 200,
}
"""What a replica does (join, read all tenants, report all or one, send a heartbeat, poll the
version, claim a job), and how often each is timed."""
CHANGES = 3
"""Changes that replicas follow at once."""


@dataclass
class Cost:
    """Cost of one operation: statements, those that write, median seconds, and CPU seconds.

    The caller's CPU time includes the database for SQLite; `server_cpu_s` is PostgreSQL's.
    """

    statements: float = 0.0
    writes: float = 0.0
    seconds: float = 0.0
    caller_cpu_s: float = 0.0
    server_cpu_s: float = 0.0


@dataclass
class Fleet:
    """`replicas` that follow changes at once: medians or means of one change.

    `propagation_s`: from the publication until all have reported it.
    """

    replicas: int
    receipt_rows: int
    propagation_s: float
    cpu_s: float
    statements: float
    audit_rows: float


@dataclass
class Measured:
    """One database with `tenants` tenants; `connections` of one replica."""

    backend: str
    tenants: int
    costs: dict[str, Cost] = field(default_factory=dict)
    fleets: list[Fleet] = field(default_factory=list)
    connections: int | None = None
    connections_allowed: int | None = None


class Postgres:
    """A PostgreSQL server on this machine, by the URL of one of its databases."""

    def __init__(self, url: str) -> None:
        self.base_url = make_url(url)
        with self._connect() as connection:
            self.postmaster = psutil.Process(connection.info.backend_pid).parent()
        assert self.postmaster is not None

    def url(self, database: str | None = None) -> str:
        url = self.base_url.set(database=database) if database else self.base_url
        return url.render_as_string(hide_password=False)

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(self.url(), autocommit=True)

    def create(self, database: str) -> str:
        """Create an empty database, instead of one of an earlier run; return its URL."""
        with self._connect() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {database}".encode())
            connection.execute(f"CREATE DATABASE {database}".encode())
        return self.url(database)

    def max_connections(self) -> int:
        with self._connect() as connection:
            row = connection.execute("SHOW max_connections").fetchone()
        assert row is not None
        return int(row[0])

    def cpu_s(self) -> float:
        """CPU seconds of all its processes, ended ones included."""
        assert self.postmaster is not None
        total = float(sum(self.postmaster.cpu_times()[:4]))  # with those of its ended children
        for child in self.postmaster.children():
            with suppress(psutil.NoSuchProcess):
                total += sum(child.cpu_times()[:2])
        return total


def header_of(shape: ModelShape) -> FamilyHeader:
    """A family with a vector of rank 16 on every target module of the model; no tensors."""
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


def fill(
    registry: Registry, header: FamilyHeader, tenants: int, progress: Callable[[], Any]
) -> None:
    """Add tenants with a key each, and a second revision for every tenth."""
    registry.families.add(header, "s3://bucket/family", actor=ACTOR)
    for number in range(tenants):
        name = f"tenant-{number:05d}/app"
        registry.tenants.add(name, header.digest, actor=ACTOR)
        for step in range(2 if number % 10 == 0 else 1):
            publish(registry, header, name, step)
        registry.keys.add(f"key-{number}", scopes=["serve"], tenants=[name], actor=ACTOR)
        progress()


class Counting:
    """Counter of statements by kind on one registry's connections."""

    def __init__(self, registry: Registry) -> None:
        self.kinds: Counter[str] = Counter()
        event.listen(registry.database.engine, "after_cursor_execute", self.count)

    def count(self, _c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        self.kinds[statement.lstrip().split(None, 1)[0].upper()] += 1


class Replica:
    """The registry's side of one replica: the calls of server/safegene_server/replica, in order."""

    def __init__(self, url: str, header: FamilyHeader) -> None:
        self.registry = Registry(url, migrate=False)
        self.history = History(self.registry)
        self.contents: dict[int, Identity] = {}
        self.header = header
        self.id, self.version = "", 0

    def join(self) -> None:
        self.id = self.registry.replicas.join("host", 1, actor=ACTOR).id

    def snapshot(self) -> list[int]:
        """Ids of the published revisions."""
        found, _ = self.history.snapshot()
        self.version = found.version
        self.contents = {revision.id: revision.identity for revision in found.revisions}
        return [revision.id for revision in found.revisions]

    def beat(self, new: list[int] | None = None) -> None:
        """A heartbeat, with the receipts of new revisions."""
        receipts = {number: ({"ranks": [_receipt(number)]}, True) for number in new or ()}
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

    def follow(self, new: list[int]) -> None:
        """Follow a change: read all tenants, report new revisions."""
        self.snapshot()
        self.beat(new)

    def close(self) -> None:
        self.registry.close()


def _receipt(number: int) -> dict[str, Any]:
    """A receipt of realistic size."""
    digest = "sha256:" + "ab" * 32
    return {
        **{"rank": 0, "name": f"tenant-{number:05d}/app@1", "lora_int_id": number, "slot": None},
        **{"profile": digest, "gain_digest": digest, "gain_norm": 2.5},
        **{"tenant_sites": 196, "safety_sites": 196},
    }


def cost_of(
    registry: Registry, server: Postgres | None, times: int, run: Callable[[], object]
) -> Cost:
    """Cost of `run` over `times` calls, after an uncounted one."""
    run()
    gc.collect()  # garbage of earlier operations is not this one's cost
    counting, seconds = Counting(registry), list[float]()
    before, own = _server_cpu_s(server), time.process_time()
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    own = time.process_time() - own
    event.remove(registry.database.engine, "after_cursor_execute", counting.count)
    return Cost(
        counting.kinds.total() / times,
        sum(counting.kinds[kind] for kind in ("INSERT", "UPDATE", "DELETE")) / times,
        statistics.median(seconds),
        own / times,
        (_server_cpu_s(server) - before) / times,
    )


def _server_cpu_s(server: Postgres | None) -> float:
    return 0.0 if server is None else server.cpu_s()


def measure(
    url: str,
    shape: ModelShape,
    *,
    tenants: int,
    replicas: tuple[int, ...],
    server: Postgres | None,
    progress: Callable[[], Any],
) -> Measured:
    """Fill the empty database at `url` and run replicas on it."""
    header = header_of(shape)
    with closing(Registry(url)) as registry:
        fill(registry, header, tenants, progress)
        found = Measured("postgresql" if registry.database.is_postgresql else "sqlite", tenants)
        with closing(Replica(url, header)) as one:
            one.join()
            ids = one.snapshot()
            runs: Mapping[str, Callable[[], object]] = {
                "receipts_all": lambda: one.beat(ids),
                "receipts_one": lambda: one.beat(ids[:1]),
            }
            for name, times in OPERATIONS.items():
                run = runs.get(name) or getattr(one, name)
                found.costs[name] = cost_of(one.registry, server, times, run)
            one.registry.replicas.leave(one.id, actor=ACTOR)
        found.fleets = [_follow(registry, url, header, ids, n, server) for n in replicas]
        if server is not None:
            pool: Any = registry.database.engine.pool
            found.connections = pool.size() + 1  # one more listens
            found.connections_allowed = server.max_connections()
    return found


def _follow(
    registry: Registry,
    url: str,
    header: FamilyHeader,
    ids: list[int],
    count: int,
    server: Postgres | None,
) -> Fleet:
    """Let `count` replicas join, report all tenants, and follow each change at once."""
    with ExitStack() as stack:
        fleet = [stack.enter_context(closing(Replica(url, header))) for _ in range(count)]
        pool = stack.enter_context(ThreadPoolExecutor(count))
        list(pool.map(lambda r: (r.join(), r.beat(ids)), fleet))
        receipt_rows, audit_rows = _rows(registry, tables.receipts), _rows(registry, tables.audit)
        counts = [Counting(r.registry) for r in fleet]
        seconds, cpu_s = list[float](), list[float]()
        for change in range(CHANGES):
            new = publish(registry, header, "tenant-00001/app", 10 * count + change)
            started, before = time.perf_counter(), time.process_time() + _server_cpu_s(server)
            list(pool.map(lambda r, new=new: r.follow([new]), fleet))
            seconds.append(time.perf_counter() - started)
            cpu_s.append(time.process_time() + _server_cpu_s(server) - before)
        found = Fleet(
            count,
            receipt_rows,
            statistics.median(seconds),
            statistics.median(cpu_s),
            sum(c.kinds.total() for c in counts) / CHANGES,
            (_rows(registry, tables.audit) - audit_rows) / CHANGES,
        )
        list(pool.map(lambda r: r.registry.replicas.leave(r.id, actor=ACTOR), fleet))
    return found


def _rows(registry: Registry, table: Any) -> int:
    with registry.database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())
