"""The environment of every test, set before anything under test is imported.

No test may reach a model hub, and vLLM speaks only when something is wrong. Not for fixtures:
those live beside the tests that use them.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
