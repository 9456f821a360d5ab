"""Python client for the administration of a SafeGene server: tenants, keys, rollouts, jobs.

`Client` has a method for every route under /v1/safegene. For completions use the openai client.
Loads httpx, nothing heavier.
"""

from safegene_vllm.client.client import Client
from safegene_vllm.errors import ApiError

__all__ = ["ApiError", "Client"]
