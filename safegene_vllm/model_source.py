"""Lookup of a MODEL argument: a local directory first, then a model id of the Hugging Face Hub.

Anything that looks like a path is never looked up on the Hub, so a mistyped one fails at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safegene_vllm.errors import ConfigError, MissingFileError, did_you_mean

HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?")
_GGUF_TAG = re.compile(r"(?<=/)([\w.-]+):[\w.-]+$")
_CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_MODEL_FILES = ("config.json", "params.json", "*.gguf")


def local_model(model: str, *, revision: str | None = None) -> Path | None:
    """Local files of a model: its directory, or the Hub's cached snapshot; None without either."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    if looks_like_path(model):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(_hub_id(model), "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def check_model(
    model: str, *, revision: str | None = None, environ: Mapping[str, str] = os.environ
) -> None:
    """Check that a model exists: locally, in the Hub's cache, or on the Hub.

    Raises MissingFileError with what was looked up and the nearest local name, ConfigError for
    something else than a model. URLs (`s3://...`) and ModelScope names are left to vLLM.
    """
    if "://" in model:
        return
    path = Path(model).expanduser()
    if path.is_dir():
        _check_directory(model, path)
    elif path.exists():
        if path.suffix != ".gguf":
            raise ConfigError(f"MODEL {model!r} is a file; expected a model directory.")
    elif looks_like_path(model):
        raise MissingFileError(f"MODEL {model!r}: no such directory{_nearest_path(path)}.")
    elif environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return
    elif local_model(model, revision=revision) is None:
        _look_up_on_hub(model, revision)


def fetch_config(model: str) -> Path:
    """Local path of a model's config.json, downloaded for a model id of the Hub.

    Raises MissingFileError if there is neither a local model nor one on the Hub.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path
    check_model(model)
    found = local_model(model)
    if found is not None:
        return found / "config.json"
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_hub_id(model), "config.json", etag_timeout=HUB_TIMEOUT_S))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"MODEL {model!r}: its config.json cannot be downloaded: {_first_line(error)}."
        ) from error


def fetch_checkpoint(model: str) -> Path:
    """Local directory of a checkpoint, downloaded for a model id of the Hub.

    Raises MissingFileError if there is neither a local directory nor a model on the Hub.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    check_model(model)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            _hub_id(model), allow_patterns=_CHECKPOINT_FILES, etag_timeout=HUB_TIMEOUT_S
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"MODEL {model!r}: it cannot be downloaded: {_first_line(error)}."
        ) from error
    return Path(found)


def looks_like_path(model: str) -> bool:
    """Whether a path is meant, so that nothing is looked up on the Hub."""
    if model.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(_hub_id(model)):
        return True
    return "/" in model and Path(model).parent.is_dir()


def _hub_id(model: str) -> str:
    return _GGUF_TAG.sub(r"\1", model)


def _check_directory(model: str, path: Path) -> None:
    if any(any(path.glob(pattern)) for pattern in _MODEL_FILES):
        return
    if (path / "adapter_config.json").exists():
        raise ConfigError(
            f"MODEL {model!r} is a LoRA adapter, expected the base model; serve the adapter with "
            "--tenant NAME=DIR."
        )
    inner = sorted(child.parent.name for child in path.glob("*/config.json"))
    hint = f" (did you mean {str(path / inner[-1])!r}?)" if inner else ""
    raise ConfigError(f"MODEL {model!r} has no config.json; expected a model directory{hint}.")


def _nearest_path(path: Path) -> str:
    """Deepest directory of `path` that exists, and the nearest name in it."""
    parent, name = path.parent, path.name
    while not parent.exists() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    if not parent.is_dir():
        return ""
    try:
        names = [child.name for child in parent.iterdir() if child.is_dir()]
    except OSError:
        names = []
    missing = "" if parent == path.parent else f": {parent.absolute()} has no {name!r}"
    return missing + did_you_mean(name, names)


def _look_up_on_hub(model: str, revision: str | None) -> None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    neither = f"MODEL {model!r} is neither a local directory nor "
    hint = did_you_mean(model, [child.name for child in Path().iterdir() if child.is_dir()])
    if constants.HF_HUB_OFFLINE:
        raise MissingFileError(
            f"{neither}in the Hub's cache, and HF_HUB_OFFLINE forbids a download{hint}."
        )
    api: Any = HfApi()
    try:
        api.model_info(_hub_id(model), revision=revision, timeout=HUB_TIMEOUT_S)
    except RevisionNotFoundError as error:
        raise MissingFileError(f"MODEL {model!r}: the Hub has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise MissingFileError(
            f"{neither}a model on the Hub (a private one needs HF_TOKEN){hint}."
        ) from error
    except Exception as error:
        # Errors of the connection come from whichever HTTP library huggingface_hub uses.
        raise MissingFileError(
            f"{neither}in the Hub's cache, and the Hub does not respond "
            f"({_first_line(error)}){hint}."
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}".rstrip(": .")
