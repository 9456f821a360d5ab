"""One server process as a follower of the registry: its engine and its catalog keep up with it.

Decides nothing: what is published is decided in the registry, what may be loaded in the workers.
"""

from safegene_server.replica.internal_client import CaptureApp, InternalClient
from safegene_server.replica.reconciler import Reconciler

__all__ = ["CaptureApp", "InternalClient", "Reconciler"]
