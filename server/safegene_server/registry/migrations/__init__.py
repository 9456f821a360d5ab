"""Migrations of the registry's tables: Alembic's script directory, run by schema.py."""
