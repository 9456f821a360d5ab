"""Chat prompts as token ids, greedy decoding, stop tokens and context lengths.

Shared by training, evaluation and every backend, so that completions can be compared. torch is
imported inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegene_vllm.errors import ConfigError, SafegeneError, raise_errors
from safegene_vllm.formats.file_io import read_json

if TYPE_CHECKING:
    import torch

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device `name`; `auto`: CUDA if available, else the CPU. Errors: ConfigError."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {error}") from error


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer in `directory`, without a download.

    Errors: ConfigError if there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{directory}: no tokenizer can be read: {error}") from error


def check_template(tokenizer: Any) -> None:
    """Check that the tokenizer has a chat template. Errors: ConfigError."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, so the "
            "prompt format is unknown; set chat_template in its tokenizer_config.json"
        )


def chat_text(tokenizer: Any, prompt: str) -> str:
    """One user turn in the chat template, with the generation prompt."""
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def prompt_tokens(tokenizer: Any, prompts: Iterable[str]) -> list[list[int]]:
    """Token ids of each prompt's `chat_text`, without further special tokens."""
    return [
        list(tokenizer.encode(chat_text(tokenizer, prompt), add_special_tokens=False))
        for prompt in prompts
    ]


def end_of_turn(tokenizer: Any) -> list[int]:
    """Token ids that the template puts after a completion; else the end-of-text token.

    Errors: ConfigError if there is neither.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    head = chat_text(tokenizer, "a") + "b"
    full = str(tokenizer.apply_chat_template(turns, tokenize=False))
    tail = full.removeprefix(head).strip() if full.startswith(head) else ""
    if tail:
        return list(tokenizer.encode(tail, add_special_tokens=False))
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "neither the chat template nor an eos_token says how a completion ends; set "
            "eos_token in the tokenizer_config.json"
        )
    return [tokenizer.eos_token_id]


def pad_token(tokenizer: Any) -> int:
    """Padding token; masked, so the end-of-text token or any other will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def greedy_tokens(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], max_tokens: int, stops: Sequence[int]
) -> list[list[int]]:
    """Greedy completions of rows of token ids by a transformers model, without the stop token.

    Rows are padded on the left. In place: the model's generation_config is replaced, since its
    penalties and other deerrors would apply.
    """
    import torch
    from transformers import GenerationConfig

    pad = pad_token(tokenizer)
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    model.generation_config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
    )
    with torch.inference_mode():
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    return [truncate_at_stop(new, stops) for new in out[:, width:].tolist()]


def truncate_at_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])


def completion_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The decoded completion, stripped, without special tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _token_ids(value: Any) -> set[int]:
    found = value if isinstance(value, list) else [value]
    return {number for number in found if type(number) is int}


def stop_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """Stop tokens of the tokenizer, config.json and generation_config.json."""
    found = _token_ids(tokenizer.eos_token_id)
    for name in ("config.json", "generation_config.json"):
        if (path := Path(directory) / name).exists():
            config = read_json(path)
            text = config.get("text_config")
            found |= _token_ids(config.get("eos_token_id"))
            found |= _token_ids(text.get("eos_token_id")) if isinstance(text, dict) else set()
    return sorted(found)


def model_stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Stop tokens of a model in memory: of the tokenizer and its generation_config."""
    return sorted(
        _token_ids(tokenizer.eos_token_id) | _token_ids(model.generation_config.eos_token_id)
    )


def context_tokens(directory: Path) -> int | None:
    """Context length in tokens by config.json, None if it has none."""
    config = read_json(Path(directory) / "config.json")
    text = config.get("text_config")
    both = {**(text if isinstance(text, dict) else {}), **config}
    return next((both[key] for key in _CONTEXT_KEYS if type(both.get(key)) is int), None)


def check_lengths(
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    completion_tokens: Mapping[str, int],
    context: int | None,
) -> int:
    """The tokens of the longest prompt plus its completion.

    `prompts` and `completion_tokens` by the name of their set. Errors: ConfigError naming each set
    and the rows that exceed `context` tokens.
    """
    longest = 0
    errors: list[SafegeneError] = []
    for name, texts in prompts.items():
        needed = [len(ids) + completion_tokens[name] for ids in prompt_tokens(tokenizer, texts)]
        longest = max(longest, *needed)
        rows = [row for row, tokens in enumerate(needed, 1) if context and tokens > context]
        if rows:
            shown = ", ".join(f"{row} ({needed[row - 1]} tokens)" for row in rows[:5])
            errors.append(
                ConfigError(
                    f"{name}: {len(rows)} prompts plus {completion_tokens[name]} generated tokens "
                    f"exceed the model's context of {context} tokens: rows {shown}; leave them out "
                    "or generate fewer tokens"
                )
            )
    raise_errors(errors)
    return longest
