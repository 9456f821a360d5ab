"""Python client for the administration of a SafeGene server: tenants, keys, rollouts, jobs.

`Client` and `AsyncClient` have a method for every route under /v1/safegene. For completions use
the openai client. Loads httpx and pydantic, nothing heavier.
"""

from safegene_vllm.client.client import AsyncClient, Client
from safegene_vllm.errors import ApiError

__all__ = ["ApiError", "AsyncClient", "Client"]
