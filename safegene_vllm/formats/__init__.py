"""Files on disk: families, profiles, adapters, checkpoints, safetensors headers, receipts."""
