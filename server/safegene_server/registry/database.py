"""Registry database: connections, and the two kinds of transaction.

`read` is one consistent view that cannot write. `write` is all or nothing, by a named actor, and
fails without an audit entry. SQLite (a file) and PostgreSQL behave alike.
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

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)
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
"""PostgreSQL channel on which new versions are announced."""

LOCK_TIMEOUT_S = 10.0
"""A writer that waits longer for another one fails."""

IDLE_TIMEOUT_S = 30.0
"""PostgreSQL disconnects a writer that is idle in its transaction for longer."""

_UNWRITABLE = (UnicodeEncodeError, OverflowError)
_NO_TABLE = "42P01"
"""PostgreSQL's code for a missing table, as while a registry is being restored."""
_INSTALL = "install the server's dependencies: pip install 'safegene-vllm[server]'"


@dataclass
class Write:
    """An open write transaction: its connection, actor and time."""

    connection: Connection
    actor: str
    now: datetime
    audited: bool = False

    def audit(self, action: str, target: str, **details: Any) -> None:
        """Add the audit entry without which this write is rolled back."""
        who = {"at": self.now, "actor": self.actor}
        self.insert(tables.audit, **who, action=action, target=target, details=details)
        self.audited = True

    def insert(self, table: Table, **values: Any) -> Any:
        """Insert a row; return the first column of its primary key."""
        key = self.connection.execute(insert(table).values(**values)).inserted_primary_key
        return None if key is None else key[0]

    def skip_audit(self) -> None:
        """Allow this write without an audit entry: it changes only timestamps or counts."""
        self.audited = True

    def bump(self) -> int:
        """Raise the version, which replicas must follow; they are notified on commit."""
        row = tables.version
        value = self.connection.execute(
            update(row).values(value=row.c.value + 1).returning(row.c.value)
        ).scalar_one()
        if self.connection.dialect.name == "postgresql":
            self.connection.execute(select(func.pg_notify(CHANNEL, str(value))))
        return int(value)


class Database:
    """Connection pool of the registry, with its transactions."""

    def __init__(self, url: str | Path | URL) -> None:
        self.url = parse_url(url)
        self.is_postgresql = self.url.get_backend_name() == "postgresql"
        if not self.is_postgresql:
            _make_private_file(Path(str(self.url.database)))
        self.engine = _engine(self.url)

    def close(self) -> None:
        """Close every connection. The database must not be used afterwards."""
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Begin a transaction with one consistent view, in which writing is an error.

        Errors: RegistryDownError.
        """
        options: Mapping[str, Any] = {"safegene": "read"}
        if self.is_postgresql:
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self.translate_errors(), self.engine.connect() as connection:
            connection.execution_options(**options)
            with connection.begin():
                yield connection

    @contextmanager
    def write(self, actor: str, *, exclusive: bool = True) -> Iterator[Write]:
        """Begin a transaction by `actor`; an exception rolls it back.

        Exclusive writers run one after the other, so that what they read stays true until they
        commit: all that change what replicas follow or assign numbers. The others change only rows
        that they own. Errors: RegistryError (actor), RegistryDownError.
        """
        validation.line(actor, "actor")
        with self.translate_errors(), self.engine.connect() as connection:
            connection.execution_options(safegene="write")
            with connection.begin():
                now = self._lock(connection, exclusive)
                write = Write(connection, actor, now)
                yield write
                if not write.audited:
                    raise RuntimeError("a write ended without an audit entry; it is rolled back")
                self._check_not_replaced(connection)

    def _lock(self, connection: Connection, exclusive: bool) -> datetime:
        """Wait for this writer's turn; return the time then, by the shared clock."""
        if not self.is_postgresql:
            return clock(connection)
        connection.execute(
            select(
                func.set_config("lock_timeout", f"{LOCK_TIMEOUT_S:.0f}s", True),
                func.set_config(
                    "idle_in_transaction_session_timeout", f"{IDLE_TIMEOUT_S:.0f}s", True
                ),
            )
        )
        if exclusive:
            connection.execute(select(tables.version.c.value).with_for_update())
        return clock(connection)

    def _check_not_replaced(self, connection: Connection) -> None:
        """Check the SQLite file. Errors: RegistryDownError if replaced since the write began."""
        opened = connection.connection.dbapi_connection
        if isinstance(opened, _SqliteConnection) and _is_replaced(self.url, opened):
            raise RegistryDownError(
                f"registry file {self.url.database} was replaced or deleted while it was written; "
                "nothing was changed, try again"
            )

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Translate errors of the database, without its password in the message."""
        try:
            yield
        except (DataError, *_UNWRITABLE) as error:
            raise RegistryError(f"a value that no database can hold: {_cause(error)}") from error
        except (StatementError, PoolTimeoutError) as error:
            if isinstance(getattr(error, "orig", None), _UNWRITABLE):
                # The parameter's type failed to bind it, before the driver was called.
                message = f"a value that no database can hold: {_cause(error)}"
                raise RegistryError(message) from error
            down = isinstance(error, OperationalError | InterfaceError | PoolTimeoutError)
            down = down or getattr(error, "connection_invalidated", False)
            if not down and getattr(error.__cause__, "sqlstate", None) != _NO_TABLE:
                raise
            raise RegistryDownError(
                f"the registry at {self.url.render_as_string(hide_password=True)} does not respond "
                f"or is busy ({_cause(error)}); nothing was changed, try again"
            ) from error


def _cause(error: Exception) -> str:
    """First line of the driver's message."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


def clock(connection: Connection) -> datetime:
    """Read the clock that all replicas share: PostgreSQL's, or this machine's for a file."""
    if connection.dialect.name != "postgresql":
        return datetime.now(UTC)
    now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    return now.astimezone(UTC)


def parse_url(url: str | Path | URL) -> URL:
    """Parse a file's path, `sqlite:///FILE` or `postgresql://...` for SQLAlchemy.

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
    """Create an empty file that only its owner may read, if missing. Errors: RegistryDownError."""
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
    """Connection with the identity of its open file, which the path may no longer name."""

    file: tuple[int, int] | None = None


def _open_sqlite(url: URL) -> sqlite3.Connection:
    path = os.path.abspath(str(url.database))
    while True:
        before = _file_identity(path)
        # Mode rw does not create the file: a missing one is an error, not an empty registry.
        connection = sqlite3.connect(
            f"file:{quote(path)}?mode=rw",
            uri=True,
            timeout=LOCK_TIMEOUT_S,
            check_same_thread=False,
            factory=_SqliteConnection,
        )
        connection.file = _file_identity(path)
        if connection.file == before:
            return connection
        connection.close()


def _check_file(url: URL, connection: Any, _record: Any, _proxy: Any) -> None:
    """Reject a connection to a file that was replaced or deleted.

    No other process would see what is written there. Errors: InvalidatePoolError, after which the
    pool opens the file that the path names now.
    """
    if _is_replaced(url, connection):
        raise InvalidatePoolError(f"registry file {url.database} was replaced or deleted")


def _is_replaced(url: URL, connection: _SqliteConnection) -> bool:
    return _file_identity(str(url.database)) != connection.file


def _file_identity(path: str) -> tuple[int, int] | None:
    """Device and inode of a file, None if missing."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # _begin_sqlite begins transactions: the driver would begin them late, and never for reads.
    connection.isolation_level = None
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("safegene") == "write"
    connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if writes else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
