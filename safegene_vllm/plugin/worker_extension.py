"""Worker extension that makes the plugin mandatory.

Start vLLM with `--worker-extension-cls safegene_vllm.plugin.worker_extension.RequirePlugin`. vLLM
only logs a plugin that cannot be imported, or that VLLM_PLUGINS leaves out; a worker extension that
cannot be imported stops the worker, and this module fails to import unless the plugin is installed
in the process.
"""

from __future__ import annotations

from safegene_vllm.errors import VllmCompatibilityError
from safegene_vllm.plugin import compat

if not hasattr(compat.resolve("WorkerBase"), "safegene_receipt"):
    raise VllmCompatibilityError(
        "the SafeGene plugin is not loaded in this worker: found VLLM_PLUGINS without `safegene` "
        "or a failed import earlier in this log; expected the entry point "
        "vllm.general_plugins: safegene. Add `safegene` to VLLM_PLUGINS or repair the installation."
    )


class RequirePlugin:
    """Empty: importing this module is the check."""
