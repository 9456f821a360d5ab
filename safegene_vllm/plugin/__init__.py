"""The guest inside vLLM; this file is its door.

vLLM logs and skips a plugin whose import fails, and then serves on without it. So this module
imports nothing but the standard library, and everything that can fail happens inside `register`,
where an exception stops vLLM.
"""


def register() -> None:
    """Entry point `vllm.general_plugins: safegene`, called in every vLLM process.

    Errors: VllmCompatibilityError (unsupported vLLM, or a name the plugin needs is gone); anything else that
    goes wrong here also stops the process: better not served than served unprotected.
    """
    from safegene_vllm.plugin.compat import check_vllm
    from safegene_vllm.plugin.install import install

    check_vllm()
    install()
