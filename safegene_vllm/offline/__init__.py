"""A vLLM engine inside this process: `safegene verify`, evaluation and tests."""
