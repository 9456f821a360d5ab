"""How the registry's tables came to be: Alembic's script directory, run by schema.py."""
