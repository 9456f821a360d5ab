"""Long steps that survive a restart: queued, claimed by one owner at a time, watched, ended.

An owner holds a job by a lease that its progress renews; when it dies, the lease runs out and
another owner claims the job, once. What a job does is its handler's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, and_, insert, or_, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database, Write
from safegene_server.registry.records import Job
from safegene_server.registry.revisions import find_revision_by_id
from safegene_server.registry.tenants import find_tenant
from safegene_vllm.client.schemas import JobState
from safegene_vllm.errors import ConflictError, NotFoundError, RegistryError

_T = tables.jobs
LEASE_S = 30.0
PRIVATE = "private"
"""A key of `params` for what nobody may find later: the row forgets it when the job ends."""
MAX_ATTEMPTS = 2
"""How often a job is begun. One that takes its owner down would take down one server after the
other; a server that died for another reason costs a job one attempt. A server that stops in good
order releases its jobs, which costs none."""


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
        """A job that waits for an owner; `revision` is an id.

        Errors: RegistryError, NotFoundError.
        """
        validation.line(kind, "job kind", 64)
        given = validation.plain(params or {}, "params")
        with self._database.write(actor, exclusive=False) as write:
            owner = find_tenant(write.connection, tenant)
            if revision is not None:
                found = find_revision_by_id(write.connection, revision)
                if found.tenant != tenant:
                    raise NotFoundError(f"{found.served_name} is no revision of tenant {tenant!r}")
            added = write.connection.execute(
                insert(_T)
                .values(
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
                .returning(_T.c.id)
            ).scalar_one()
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
        """The oldest job that nobody holds, now held by `owner`; None if there is none.

        `family`: only jobs of its tenants, for an owner that serves no other.

        A job whose lease ran out is claimed again, unless it was to be cancelled or has been begun
        MAX_ATTEMPTS times; then it ends here.
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
                    write.unaudited()
                    return None
                found = find_job(write.connection, row.id)
                if not _ended_here(write, found):
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
        """How far it is (0 to 1), and a new lease; look at `cancel_requested` of the answer.

        Audited when the message changes. Errors: RegistryError, NotFoundError; ConflictError if
        `owner` does not hold the job any more: stop working on it.
        """
        if not 0.0 <= progress <= 1.0:
            raise RegistryError(f"progress {progress!r}: expected a number from 0 to 1")
        with self._database.write(actor, exclusive=False) as write:
            found = _held(write, job, owner)
            message = validation.text(message)
            lease_until = write.now + timedelta(seconds=lease_s)
            _set(write, found, progress=float(progress), message=message, lease_until=lease_until)
            if message == found.message:
                write.unaudited()
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
        """The end of a job, by the owner that holds it.

        Errors: RegistryError, NotFoundError; ConflictError if `owner` does not hold it any more.
        """
        if state not in ("done", "failed", "cancelled"):
            raise RegistryError(f"job state {state!r}: expected done, failed or cancelled")
        message = validation.text(message)
        given = None if result is None else validation.plain(result, "result")
        with self._database.write(actor, exclusive=False) as write:
            found = _held(write, job, owner)
            values: dict[str, Any] = {"progress": 1.0} if state == "done" else {}
            _set(write, found, state=state, message=message, result=given, **values)
            write.audit(f"job.{state}", _target(job), owner=owner, message=message)
            return find_job(write.connection, job)

    def release(self, job: int, owner: str, *, actor: str) -> Job:
        """Back into the queue, unfinished, by an owner that stops in good order: as if it had not
        been begun.

        Errors: NotFoundError; ConflictError if `owner` does not hold it any more.
        """
        with self._database.write(actor, exclusive=False) as write:
            found = _held(write, job, owner)
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
        """A waiting job ends at once; of a running one it is asked, and its owner ends it.

        Errors: NotFoundError; ConflictError if it has ended.
        """
        with self._database.write(actor, exclusive=False) as write:
            found = find_job(write.connection, job, lock=True)
            if found.state == "queued":
                _set(write, found, state="cancelled", message="cancelled before it began")
            elif found.state == "running":
                _set(write, found, cancel_requested=True)
            else:
                raise ConflictError(f"job {job} is {found.state}; there is nothing to cancel")
            write.audit("job.cancel", _target(job), before=found.state)
            return find_job(write.connection, job)

    def get(self, job: int) -> Job:
        """Errors: NotFoundError."""
        with self._database.read() as connection:
            return find_job(connection, job)

    def list(
        self, *, tenant: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> tuple[Job, ...]:
        """The newest first."""
        query = _query().order_by(_T.c.id.desc()).limit(limit)
        if tenant is not None:
            query = query.where(tables.tenants.c.name == tenant)
        if state is not None:
            query = query.where(_T.c.state == state)
        with self._database.read() as connection:
            return tuple(_job(row) for row in connection.execute(query))


def find_job(connection: Connection, job: int, *, lock: bool = False) -> Job:
    """The job; with `lock` nobody else changes it until this write ends. Errors: NotFoundError."""
    query = _query().where(_T.c.id == job)
    if lock:
        query = query.with_for_update(of=_T)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"no job {job!r:.40} in the registry")
    return _job(row)


def _held(write: Write, job: int, owner: str) -> Job:
    found = find_job(write.connection, job, lock=True)
    if found.state != "running" or found.owner != owner:
        held = f" by {found.owner!r}" if found.state == "running" else ""
        raise ConflictError(f"job {job} is {found.state}{held}, not held by {owner!r}; stop it")
    return found


def _ended_here(write: Write, job: Job) -> bool:
    """Whether a job that nobody holds ends instead of being begun again."""
    if job.cancel_requested:
        _set(write, job, state="cancelled", message="cancelled; its owner was gone")
        write.audit("job.cancelled", _target(job.id), owner=job.owner)
        return True
    if job.attempts >= MAX_ATTEMPTS:
        message = (
            f"begun {job.attempts} times, and each time its server died, or lost its engine or the "
            "registry; it is not begun again, for it may be what takes servers down. Read the log "
            f"of the last one, {job.owner}, then send the request again; the content of a new "
            f"tenant by `safegene tenant update {job.tenant}`"
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
    return Job(
        id=row.id,
        kind=row.kind,
        tenant=row.tenant,
        revision=row.revision_id,
        params=row.params,
        state=row.state,
        progress=row.progress,
        message=row.message,
        result=row.result,
        attempts=row.attempts,
        owner=row.owner,
        lease_until=row.lease_until,
        cancel_requested=row.cancel_requested,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
