"""A tiny model that has a tokenizer with a chat template: the smallest thing the recipe runs on."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safegene_vllm.dataset import Dataset, Row, digest_of_rows
from safegene_vllm.tiny_model import make_model

SPECIAL = ("<pad>", "<s>", "<end>")
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'][0] + ':' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a:' }}{% endif %}"
)


def write_tokenizer(directory: Path) -> None:
    """One token per byte, and three special ones: 259 of the tiny models' 320."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: n for n, name in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<end>",
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(directory)


def tiny_chat_model(directory: Path, arch: str = "llama") -> Path:
    make_model(arch, directory)
    write_tokenizer(directory)
    return directory


def dataset(
    *pairs: tuple[str, str | None], name: str = "data", licence: str | None = "MIT"
) -> Dataset:
    rows = tuple(Row(*pair) for pair in pairs)
    return Dataset(name, rows, licence, digest_of_rows(rows), name)


HARM = dataset(*((f"bad {n}", "no, sorry") for n in range(8)), name="harm")
GOOD = dataset(*((f"good {n}", "yes, it is") for n in range(8)), name="good")
TASK = dataset(*((f"task {n}", "label") for n in range(8)), name="task")
