"""Access check in front of every route of the whole app: keys, scopes, models and limits.

Pure ASGI; keys and tenants come from `Catalog`, so it needs neither the registry nor vLLM.
"""
