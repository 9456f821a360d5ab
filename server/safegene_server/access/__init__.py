"""Who may do what: keys, scopes, models and limits, in front of every route of the whole app.

For the API process: pure ASGI, told what it knows through `Catalog`. Reads no registry and no
database, and knows nothing of vLLM but the table of its routes.
"""
