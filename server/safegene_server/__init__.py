"""SafeGene inside vLLM's own API server: routes, and receipts checked before anything is served.

For the API process alone. Never imports torch or vLLM: it works with the objects vLLM hands in.
"""
