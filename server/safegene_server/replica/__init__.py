"""Replica: keeps the engine and the catalog of one server process in line with the registry.

The registry decides what is published, the workers what may be loaded.
"""

from safegene_server.replica.internal_client import CaptureApp, InternalClient
from safegene_server.replica.reconciler import Reconciler

__all__ = ["CaptureApp", "InternalClient", "Reconciler"]
