"""vLLM plugin: entry point of the workers and of every other vLLM process.

vLLM logs and skips a plugin whose import fails, and then serves without it. So this module imports
only the standard library, and everything that can fail happens inside `register`, where an
exception stops vLLM.
"""


def register() -> None:
    """Check vLLM and install the plugin (entry point `vllm.general_plugins: safegene`).

    Errors: VllmCompatibilityError (unsupported vLLM, or a missing name). Any other exception also
    stops the process: not serving is better than serving unprotected.
    """
    from safegene_vllm.plugin.compat import check_vllm
    from safegene_vllm.plugin.install import install

    check_vllm()
    install()
