"""Schema: created, upgraded, and rejected if newer or foreign."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import zipfile
from datetime import date
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from registry_setup import HEADER, ROOT, empty_url, url
from sqlalchemy import inspect, text

from safegene_server.registry import Registry, UsageRow, schema, tables
from safegene_server.registry.database import Database
from safegene_vllm.errors import RegistryDownError, SchemaError

__all__ = ["empty_url", "url"]


def execute(url: str, *statements: str) -> None:
    database = Database(url)
    with database.engine.connect() as connection:
        connection.execution_options(safegene="write")
        with connection.begin():
            for statement in statements:
                connection.execute(text(statement))
    database.close()


def test_an_empty_database_gets_every_table(empty_url: str) -> None:
    registry = Registry(empty_url)
    names = set(inspect(registry.database.engine).get_table_names())
    assert names == {*tables.metadata.tables, schema.SCHEMA_TABLE}
    assert registry.version() == 0
    registry.families.add(HEADER, None, actor="test")
    registry.close()
    again = Registry(empty_url)
    assert again.families.list()[0].header == HEADER
    assert again.version() == 1
    again.close()


def test_the_migrations_create_the_tables_of_tables_py(url: str) -> None:
    database = Database(url)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "version_table": schema.SCHEMA_TABLE,
            },
        )
        assert compare_metadata(context, tables.metadata) == []
        connection.execution_options(safegene="write")
        connection.rollback()
        connection.execute(text("ALTER TABLE keys ADD COLUMN extra INTEGER"))
        assert [difference[0] for difference in compare_metadata(context, tables.metadata)] == [
            "remove_column"
        ]
    database.close()


def test_head_is_the_newest_migration() -> None:
    assert ScriptDirectory(str(schema.MIGRATIONS)).get_heads() == [schema.HEAD]


def add_migration(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Migration 0003 after those of the release, in a script directory below `folder`."""
    scripts = folder / "100% of them"
    shutil.copytree(schema.MIGRATIONS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "v0003_extra.py").write_text(
        "from alembic import op\n"
        "revision, down_revision, branch_labels, depends_on = '0003', '0002', None, None\n"
        f"def upgrade():\n    op.execute('ALTER TABLE keys ADD COLUMN extra INTEGER')\n    {body}\n"
    )
    monkeypatch.setattr(schema, "MIGRATIONS", scripts)
    monkeypatch.setattr(schema, "HEAD", "0003")


def schema_of(url: str) -> tuple[str, bool]:
    """Version of the schema, and whether the column of `add_migration` exists."""
    database = Database(url)
    with database.read() as connection:
        query = text(f"SELECT version_num FROM {schema.SCHEMA_TABLE}")
        number = connection.execute(query).scalar_one()
        columns = {column["name"] for column in inspect(connection).get_columns("keys")}
    database.close()
    return number, "extra" in columns


def test_an_older_database_is_upgraded_with_its_rows(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(url)
    registry.families.add(HEADER, None, actor="test")
    before = registry.families.list(), registry.audit.page(), registry.version()
    registry.close()
    add_migration(tmp_path, monkeypatch, "op.execute('UPDATE version SET value = value + 1')")
    with pytest.raises(SchemaError, match="has schema 0002, this release needs 0003"):
        Registry(url, migrate=False)
    assert schema_of(url) == ("0002", False)
    for _ in range(2):
        registry = Registry(url)
        assert schema_of(url) == ("0003", True)
        after = registry.families.list(), registry.audit.page(), registry.version()
        assert after == (*before[:2], before[2] + 1)
        registry.close()


def test_a_database_of_the_first_schema_gets_usage(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "HEAD", "0001")
        registry = Registry(empty_url)
        assert "usage" not in inspect(registry.database.engine).get_table_names()
        registry.families.add(HEADER, None, actor="test")
        before = registry.families.list(), registry.audit.page(), registry.version()
        registry.close()
    registry = Registry(empty_url)
    assert schema_of(empty_url) == ("0002", False)
    assert (registry.families.list(), registry.audit.page(), registry.version()) == before
    row = UsageRow(date(2031, 5, 1), "acme", "app", 1, 2, 3)
    registry.usage.add([row])
    assert registry.usage.list().rows == (row,)
    registry.close()
    monkeypatch.setattr(schema, "HEAD", "0001")
    with pytest.raises(SchemaError, match="schema 0002, which is newer"):
        Registry(empty_url)


def test_a_migration_that_fails_leaves_the_older_schema(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        add_migration(tmp_path, patch, "raise RuntimeError('half way')")
        with pytest.raises(RuntimeError, match="half way"):
            Registry(url)
        assert schema_of(url) == ("0002", False)
    Registry(url, migrate=False).close()


def test_several_servers_that_start_at_once_migrate_once(empty_url: str) -> None:
    opened: list[Registry] = []
    failed: list[BaseException] = []

    def start() -> None:
        try:
            opened.append(Registry(empty_url))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    assert [registry.version() for registry in opened] == [0] * 4
    for registry in opened:
        registry.close()


def test_a_newer_schema_is_rejected_and_unchanged(url: str) -> None:
    execute(url, f"UPDATE {schema.SCHEMA_TABLE} SET version_num = '0999'")
    for migrate in (True, False):
        with pytest.raises(SchemaError, match=r"schema 0999.*newer.*up to 0002.*newer release"):
            Registry(url, migrate=migrate)
    execute(url, f"UPDATE {schema.SCHEMA_TABLE} SET version_num = '{schema.HEAD}'")
    Registry(url, migrate=False).close()


def test_without_migrate_nothing_is_migrated(empty_url: str) -> None:
    with pytest.raises(SchemaError, match="has schema none, this release needs 0002"):
        Registry(empty_url, migrate=False)
    database = Database(empty_url)
    assert inspect(database.engine).get_table_names() == []
    database.close()


def test_tables_of_another_application_are_rejected(empty_url: str) -> None:
    execute(empty_url, "CREATE TABLE tenants (id INTEGER)")
    with pytest.raises(SchemaError, match=r"another application \(\['tenants'\]\)"):
        Registry(empty_url)
    database = Database(empty_url)
    assert inspect(database.engine).get_table_names() == ["tenants"]
    database.close()


def test_a_file_that_is_no_database_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no database " * 100)
    with pytest.raises(RegistryDownError, match=r"notes\.txt cannot be used.*not a database"):
        Registry(path)
    assert path.read_text() == "no database " * 100


def test_an_installed_wheel_has_the_migrations(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "server", tmp_path / "server", ignore=ignore)
    shutil.copytree(ROOT / "safegene_vllm", tmp_path / "safegene_vllm", ignore=ignore)
    build = "from setuptools import build_meta as b; print(b.build_wheel('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    wheel = next((tmp_path / "dist").glob("*.whl"))
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("v0001_first", "v0002_usage"):
        assert f"safegene_server/registry/migrations/versions/{name}.py" in names
    use = (
        "import sys; sys.path.insert(0, 'installed')\n"
        "import safegene_server.registry as r\n"
        "assert 'installed' in r.__file__, r.__file__\n"
        "print(r.Registry('fresh.db').version())"
    )
    done = subprocess.run(
        [sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
