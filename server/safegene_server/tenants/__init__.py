"""Tenant lifecycle: register, smoke-test, publish, change, roll back, retire.

Between the HTTP routes, the registry, the local store and the engine of this process. It is
independent of HTTP, and its only state is in the registry.
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
from safegene_server.tenants.smoke_test import Outcome, run_smoke_test

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
    "run_smoke_test",
]
