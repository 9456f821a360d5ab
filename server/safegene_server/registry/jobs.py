"""Jobs: long tasks that survive a restart, queued and claimed by one owner at a time.

An owner holds a job by a lease that its progress renews. When it dies, the lease expires and
another owner claims the job. What a job does is up to its handler.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, and_, or_, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database, Write
from safegene_server.registry.records import Job, from_row
from safegene_server.registry.revisions import find_revision_by_id
from safegene_server.registry.tenants import find_tenant
from safegene_vllm.client.schemas import JobState
from safegene_vllm.errors import ConflictError, NotFoundError, RegistryError

_T = tables.jobs
LEASE_S = 30.0
PRIVATE = "private"
"""Key of `params` for confidential data, which is deleted from the row when the job ends."""
MAX_ATTEMPTS = 2
"""A job that crashes its server is not retried on every other one. A server that shuts down
releases its jobs, which does not count as an attempt."""


class Jobs:
    """Queue of jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def enqueue(
        self,
        kind: str,
        tenant: str,
        *,
        actor: str,
        revision: int | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Job:
        """Add a job to the queue. `revision` is an id. Errors: RegistryError, NotFoundError."""
        validation.line(kind, "job kind", 64)
        given = validation.plain(params or {}, "params")
        with self._database.write(actor, exclusive=False) as write:
            owner = find_tenant(write.connection, tenant)
            if revision is not None:
                found = find_revision_by_id(write.connection, revision)
                if found.tenant != tenant:
                    raise NotFoundError(
                        f"{found.served_name} is not a revision of tenant {tenant!r}"
                    )
            added = write.insert(
                _T,
                kind=kind,
                tenant_id=owner.id,
                revision_id=revision,
                params=given,
                state="queued",
                progress=0.0,
                message="",
                attempts=0,
                cancel_requested=False,
                created_at=write.now,
                updated_at=write.now,
            )
            write.audit("job.enqueue", _target(added), kind=kind, tenant=tenant, revision=revision)
            return find_job(write.connection, added)

    def claim(
        self,
        owner: str,
        *,
        actor: str,
        kinds: Iterable[str] | None = None,
        family: str | None = None,
        lease_s: float = LEASE_S,
    ) -> Job | None:
        """Claim the oldest job without an owner; None if there is none.

        `family` limits it to jobs of that family's tenants. A job whose lease has expired is
        claimed again, unless its cancellation was requested or it has been started MAX_ATTEMPTS
        times; then it ends.
        """
        validation.line(owner, "owner")
        with self._database.write(actor, exclusive=False) as write:
            due = or_(
                _T.c.state == "queued",
                and_(_T.c.state == "running", _T.c.lease_until < write.now),
            )
            query = select(_T.c.id).where(due).order_by(_T.c.id).limit(1)
            if kinds is not None:
                query = query.where(_T.c.kind.in_(list(kinds)))
            if family is not None:
                of_family = tables.tenants.c.family_digest == family
                members = select(tables.tenants.c.id).where(of_family)
                query = query.where(_T.c.tenant_id.in_(members))
            while True:
                row = write.connection.execute(query.with_for_update(skip_locked=True)).first()
                if row is None:
                    write.skip_audit()
                    return None
                found = find_job(write.connection, row.id)
                if not _end_expired(write, found):
                    break
            attempt = found.attempts + 1
            _set(
                write,
                found,
                state="running",
                owner=owner,
                attempts=attempt,
                lease_until=write.now + timedelta(seconds=lease_s),
            )
            write.audit("job.claim", _target(found.id), owner=owner, attempt=attempt)
            return find_job(write.connection, found.id)

    def progress(
        self,
        job: int,
        owner: str,
        progress: float,
        message: str = "",
        *,
        actor: str,
        lease_s: float = LEASE_S,
    ) -> Job:
        """Record progress (0 to 1) and renew the lease; check the job's `cancel_requested`.

        Audited when the message changes. Errors: RegistryError, NotFoundError; ConflictError if
        `owner` no longer holds the job: stop working on it.
        """
        if not 0.0 <= progress <= 1.0:
            raise RegistryError(f"progress {progress!r}: expected a number from 0 to 1")
        with self._database.write(actor, exclusive=False) as write:
            found = _find_held(write, job, owner)
            message = validation.text(message)
            lease_until = write.now + timedelta(seconds=lease_s)
            _set(write, found, progress=float(progress), message=message, lease_until=lease_until)
            if message == found.message:
                write.skip_audit()
            else:
                write.audit("job.progress", _target(job), progress=progress, message=message)
            return find_job(write.connection, job)

    def finish(
        self,
        job: int,
        owner: str,
        state: Literal["done", "failed", "cancelled"],
        *,
        actor: str,
        message: str = "",
        result: Mapping[str, Any] | None = None,
    ) -> Job:
        """End a job as its owner.

        Errors: RegistryError, NotFoundError; ConflictError if `owner` no longer holds it.
        """
        if state not in ("done", "failed", "cancelled"):
            raise RegistryError(f"job state {state!r}: expected done, failed or cancelled")
        message = validation.text(message)
        given = None if result is None else validation.plain(result, "result")
        with self._database.write(actor, exclusive=False) as write:
            found = _find_held(write, job, owner)
            values: dict[str, Any] = {"progress": 1.0} if state == "done" else {}
            _set(write, found, state=state, message=message, result=given, **values)
            write.audit(f"job.{state}", _target(job), owner=owner, message=message)
            return find_job(write.connection, job)

    def release(self, job: int, owner: str, *, actor: str) -> Job:
        """Return an unfinished job to the queue, without counting the attempt.

        Errors: NotFoundError; ConflictError if `owner` no longer holds it.
        """
        with self._database.write(actor, exclusive=False) as write:
            found = _find_held(write, job, owner)
            _set(
                write,
                found,
                state="queued",
                owner=None,
                lease_until=None,
                attempts=found.attempts - 1,
            )
            write.audit("job.release", _target(job), owner=owner)
            return find_job(write.connection, job)

    def cancel(self, job: int, *, actor: str) -> Job:
        """End a queued job at once, or request that the owner of a running one end it.

        Errors: NotFoundError; ConflictError if it has ended.
        """
        with self._database.write(actor, exclusive=False) as write:
            found = find_job(write.connection, job, lock=True)
            if found.state == "queued":
                _set(write, found, state="cancelled", message="cancelled before it started")
            elif found.state == "running":
                _set(write, found, cancel_requested=True)
            else:
                raise ConflictError(f"job {job} is {found.state}; there is nothing to cancel")
            write.audit("job.cancel", _target(job), before=found.state)
            return find_job(write.connection, job)

    def get(self, job: int) -> Job:
        """Return a job. Errors: NotFoundError."""
        with self._database.read() as connection:
            return find_job(connection, job)

    def list(
        self, *, tenant: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> tuple[Job, ...]:
        """Return jobs, newest first."""
        query = _query().order_by(_T.c.id.desc()).limit(limit)
        if tenant is not None:
            query = query.where(tables.tenants.c.name == tenant)
        if state is not None:
            query = query.where(_T.c.state == state)
        with self._database.read() as connection:
            return tuple(_job(row) for row in connection.execute(query))


def find_job(connection: Connection, job: int, *, lock: bool = False) -> Job:
    """Read a job, with `lock` until the end of the transaction. Errors: NotFoundError."""
    query = _query().where(_T.c.id == job)
    if lock:
        query = query.with_for_update(of=_T)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"no job {job!r:.40} in the registry")
    return _job(row)


def _find_held(write: Write, job: int, owner: str) -> Job:
    found = find_job(write.connection, job, lock=True)
    if found.state != "running" or found.owner != owner:
        held = f" by {found.owner!r}" if found.state == "running" else ""
        raise ConflictError(f"job {job} is {found.state}{held}, not held by {owner!r}; stop it")
    return found


def _end_expired(write: Write, job: Job) -> bool:
    """End a job whose lease has expired if it must not be started again."""
    if job.cancel_requested:
        _set(write, job, state="cancelled", message="cancelled after its owner was lost")
        write.audit("job.cancelled", _target(job.id), owner=job.owner)
        return True
    if job.attempts >= MAX_ATTEMPTS:
        message = (
            f"started {job.attempts} times, and each time its server died, or lost its engine or "
            "the registry; it is not started again because it may crash servers. Read the log of "
            f"the last one, {job.owner}, then send the request again; the content of a new tenant "
            f"by `safegene tenant update {job.tenant}`"
        )
        _set(write, job, state="failed", message=message)
        write.audit("job.failed", _target(job.id), owner=job.owner, message=message)
        return True
    return False


def _set(write: Write, job: Job, **values: Any) -> None:
    if values.get("state") not in (None, "queued", "running"):
        values["lease_until"] = None
        if PRIVATE in job.params:
            values["params"] = {k: v for k, v in job.params.items() if k != PRIVATE}
    change = update(_T).where(_T.c.id == job.id)
    write.connection.execute(change.values(updated_at=write.now, **values))


def _target(job: int) -> str:
    return f"job:{job}"


def _query() -> Select[tuple[Any, ...]]:
    owner = tables.tenants
    return select(_T, owner.c.name.label("tenant")).join(owner, owner.c.id == _T.c.tenant_id)


def _job(row: Row[tuple[Any, ...]]) -> Job:
    return from_row(Job, row, revision=row.revision_id)
