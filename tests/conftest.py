"""The environment of every test, set before anything under test is imported.

No test may reach a model hub, and vLLM speaks only when something is wrong. A process among
several computes on one core: threads that wait for each other's cores are ten times slower.
A law that hypothesis tries has no deadline: a busy machine does not fail it.
Fixtures live next to the tests that use them.
"""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

settings.register_profile("patient", settings.default, deadline=None)
settings.load_profile("patient")
