"""`python -m safegene_vllm` is the `safegene` command."""

from safegene_vllm.cli import main

if __name__ == "__main__":
    main()
