"""Opens the registry's database, and gives the two kinds of transaction there are.

`read` is one consistent view that cannot write. `write` is all or nothing, by a named actor, and
refuses to end without an audit row. SQLite (a file) and PostgreSQL behave alike; what is read or
written is decided elsewhere in this room.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, insert, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    InterfaceError,
    InvalidatePoolError,
    OperationalError,
    StatementError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from safegene_server.registry import tables, validation
from safegene_vllm.errors import ConfigError, RegistryDownError, RegistryError

CHANNEL = "safegene_version"
"""Where PostgreSQL tells listeners of a new version."""

WAIT_S = 10.0
"""How long a writer waits for another one before it is refused."""

PAUSE_S = 30.0
"""How long a writer may hold others up without a word before PostgreSQL hangs up on it."""

_UNWRITABLE = (UnicodeEncodeError, OverflowError)
_NO_TABLE = "42P01"
"""PostgreSQL's code for a table that is not there, as while a registry is being restored."""
_INSTALL = "install the server's dependencies: pip install 'safegene-vllm[server]'"


@dataclass
class Write:
    """One open write: its connection, who writes, and when. Ends with what was audited."""

    connection: Connection
    actor: str
    now: datetime
    accounted: bool = False

    def audit(self, action: str, target: str, **details: Any) -> None:
        """The row without which this write is not kept."""
        self.connection.execute(
            insert(tables.audit).values(
                at=self.now, actor=self.actor, action=action, target=target, details=details
            )
        )
        self.accounted = True

    def unaudited(self) -> None:
        """Nothing changed but a sign of life: no audit row is owed."""
        self.accounted = True

    def bump(self) -> int:
        """The next version, for changes that replicas must follow; they hear of it on commit."""
        row = tables.version
        value = self.connection.execute(
            update(row).values(value=row.c.value + 1).returning(row.c.value)
        ).scalar_one()
        if self.connection.dialect.name == "postgresql":
            self.connection.execute(select(func.pg_notify(CHANNEL, str(value))))
        return int(value)


class Database:
    """The engine behind the registry; everything public is added by the classes built on it."""

    def __init__(self, url: str | Path | URL) -> None:
        self.url = parse_url(url)
        self.is_postgresql = self.url.get_backend_name() == "postgresql"
        if not self.is_postgresql:
            _make_private_file(Path(str(self.url.database)))
        self.engine = _engine(self.url)

    def close(self) -> None:
        """Give every connection back; the object is not used afterwards."""
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view of everything; writing in it is an error.

        Errors: RegistryDownError.
        """
        options: Mapping[str, Any] = {"safegene": "read"}
        if self.is_postgresql:
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self.answering(), self.engine.connect() as connection:
            connection.execution_options(**options)
            with connection.begin():
                yield connection

    @contextmanager
    def write(self, actor: str, *, exclusive: bool = True) -> Iterator[Write]:
        """One transaction by `actor`; an exception undoes all of it.

        Exclusive writers, which are all that replicas follow or that allot numbers, run one after
        the other, so what they read stays true until they commit. The others touch rows of their
        own only. Errors: RegistryError (actor), RegistryDownError.
        """
        validation.line(actor, "actor")
        with self.answering(), self.engine.connect() as connection:
            connection.execution_options(safegene="write")
            with connection.begin():
                now = self._enter(connection, exclusive)
                write = Write(connection, actor, now)
                yield write
                if not write.accounted:
                    raise RuntimeError("a write ended without an audit row; it is undone")
                self._check_place(connection)

    def _enter(self, connection: Connection, exclusive: bool) -> datetime:
        """The clock that all replicas share, once it is this writer's turn."""
        if not self.is_postgresql:
            return clock(connection)
        connection.execute(
            select(
                func.set_config("lock_timeout", f"{WAIT_S:.0f}s", True),
                func.set_config("idle_in_transaction_session_timeout", f"{PAUSE_S:.0f}s", True),
            )
        )
        if exclusive:
            connection.execute(select(tables.version.c.value).with_for_update())
        return clock(connection)

    def _check_place(self, connection: Connection) -> None:
        """Errors: RegistryDownError for a SQLite file that was replaced since the write began."""
        opened = connection.connection.dbapi_connection
        if isinstance(opened, _SqliteConnection) and _is_elsewhere(self.url, opened):
            raise RegistryDownError(
                f"registry file {self.url.database} was replaced or deleted while it was written; "
                "nothing was changed, try again"
            )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """A database that does not answer, in our words and without its password."""
        try:
            yield
        except (DataError, *_UNWRITABLE) as error:
            raise RegistryError(f"a value that no database can hold: {_cause(error)}") from error
        except (StatementError, PoolTimeoutError) as error:
            if isinstance(getattr(error, "orig", None), _UNWRITABLE):
                # A parameter's own type could not write it, before the driver was asked.
                told = f"a value that no database can hold: {_cause(error)}"
                raise RegistryError(told) from error
            down = isinstance(error, OperationalError | InterfaceError | PoolTimeoutError)
            down = down or getattr(error, "connection_invalidated", False)
            if not down and getattr(error.__cause__, "sqlstate", None) != _NO_TABLE:
                raise
            raise RegistryDownError(
                f"the registry at {self.url.render_as_string(hide_password=True)} does not answer "
                f"or is busy ({_cause(error)}); nothing was changed, try again"
            ) from error


def _cause(error: Exception) -> str:
    """The driver's own first line."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


def clock(connection: Connection) -> datetime:
    """Now, by the one clock that all replicas share: PostgreSQL's, or this machine's."""
    if connection.dialect.name != "postgresql":
        return datetime.now(UTC)
    now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    return now.astimezone(UTC)


def parse_url(url: str | Path | URL) -> URL:
    """A file's path, `sqlite:///FILE` or `postgresql://...`, as SQLAlchemy wants it.

    Errors: ConfigError (its message shows no password).
    """
    if isinstance(url, Path) or (isinstance(url, str) and "://" not in url):
        return URL.create("sqlite", database=str(Path(url).expanduser()))
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "registry url cannot be read; expected sqlite:///FILE or "
            "postgresql://USER@HOST/DATABASE"
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    shown = parsed.render_as_string(hide_password=True)
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ConfigError(f"registry url {shown}: expected sqlite:///FILE or postgresql://...")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"registry url {shown} names no file; several processes must share it")
    return parsed


def _make_private_file(path: Path) -> None:
    """An empty file that only we may read, if there is none. Errors: RegistryDownError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise RegistryDownError(
            f"registry file {path} cannot be opened ({error.strerror}); check path and permissions"
        ) from error


def _engine(url: URL) -> Engine:
    dumps = partial(json.dumps, allow_nan=False)
    try:
        if url.get_backend_name() == "postgresql":
            return create_engine(
                url,
                json_serializer=dumps,
                pool_pre_ping=True,
                connect_args={"connect_timeout": 5, "application_name": "safegene"},
            )
        engine = create_engine(url, json_serializer=dumps, creator=partial(_open_sqlite, url))
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; {_INSTALL}") from error
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "checkout", partial(_check_file, url))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


class _SqliteConnection(sqlite3.Connection):
    """Connection with the identity of the file that it has open, whatever the path names by now."""

    file: tuple[int, int] | None = None


def _open_sqlite(url: URL) -> sqlite3.Connection:
    path = os.path.abspath(str(url.database))
    while True:
        before = _file_at(path)
        # Never made here: a file that was taken away is an error, and not an empty registry.
        connection = sqlite3.connect(
            f"file:{quote(path)}?mode=rw",
            uri=True,
            timeout=WAIT_S,
            check_same_thread=False,
            factory=_SqliteConnection,
        )
        connection.file = _file_at(path)
        if connection.file == before:
            return connection
        connection.close()


def _check_file(url: URL, connection: Any, _record: Any, _proxy: Any) -> None:
    """Reject a connection to a file that was replaced or deleted: no other process sees what is
    written there.

    Errors: InvalidatePoolError, upon which the pool opens the file that is there now.
    """
    if _is_elsewhere(url, connection):
        raise InvalidatePoolError(f"registry file {url.database} was replaced or deleted")


def _is_elsewhere(url: URL, connection: _SqliteConnection) -> bool:
    return _file_at(str(url.database)) != connection.file


def _file_at(path: str) -> tuple[int, int] | None:
    """Device and inode; None where no file is."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_dev, about.st_ino


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # Transactions are begun by us: the driver would begin them late, and never for reads.
    connection.isolation_level = None
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("safegene") == "write"
    connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if writes else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
