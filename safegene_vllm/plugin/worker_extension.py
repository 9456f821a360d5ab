"""`--worker-extension-cls safegene_vllm.plugin.worker_extension.RequirePlugin`: no worker without the plugin.

For closing the one hole a plugin cannot close by itself: a broken import, or a VLLM_PLUGINS that
leaves us out, is only logged by vLLM. A worker extension that cannot be imported stops the worker,
and this one cannot be imported unless the plugin is in place. It adds nothing to the worker.
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
    """Empty on purpose: being importable is all it does."""
