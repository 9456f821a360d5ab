"""Tenant life: registered, tried out, published, changed, rolled back, retired.

Between the HTTP routes, the registry, the local store and the engine of this process. Knows no HTTP
and keeps nothing itself: what is true is in the registry.
"""

from safegene_server.tenants.context import Replica, TenantContext
from safegene_server.tenants.declared import register_declared
from safegene_server.tenants.jobs import Jobs, Work
from safegene_server.tenants.onboarding import ONBOARD, onboard
from safegene_server.tenants.profiles import Change
from safegene_server.tenants.settings import (
    CalibrationSettings,
    GateSettings,
    TenantSettings,
)
from safegene_server.tenants.smoke_prompts import Prompt, read_prompts
from safegene_server.tenants.smoke_test import Outcome, try_out

__all__ = [
    "ONBOARD",
    "CalibrationSettings",
    "Change",
    "GateSettings",
    "Jobs",
    "Outcome",
    "Prompt",
    "Replica",
    "TenantContext",
    "TenantSettings",
    "Work",
    "onboard",
    "read_prompts",
    "register_declared",
    "try_out",
]
