"""SafeGene for vLLM: one safety vector per model family, a profile of coefficients per tenant.

Importing this package loads neither torch nor vllm nor fastapi; take what you need from its
modules: `adapter`, `family`, `profile` (the files on disk) and `compose` (the mathematics).
"""

__version__ = "0.1.0"
