"""Generation: every prompt once, in chunks, one checkpoint after the other, only missing ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from safegene_vllm.evaluation.generation import generate_all
from safegene_vllm.evaluation.response_cache import ResponseCache
from safegene_vllm.evaluation.targets import Target
from safegene_vllm.tiny_model import make_model


class Echo:
    """Returns the target and prompt of each call; fails at the given call."""

    backend, dtype = "transformers", "float32"

    def __init__(self, model: Path, fail_at: int | None = None) -> None:
        self.model, self.fail_at = model, fail_at
        self.calls: list[tuple[str, int, tuple[str, ...]]] = []

    def generate(self, prompts: Sequence[str], target: Target, max_tokens: int) -> list[str]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((target.key, max_tokens, tuple(prompts)))
        return [f"{target.key}: {prompt}" for prompt in prompts]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("generation") / "model")


A, B = Target("a", "x"), Target("b", "x")
WANTED = {8: ["one", "two", "one", "three"], 4: ["one"]}


def test_every_prompt_once_in_chunks(model: Path) -> None:
    echo = Echo(model)
    seen: list[tuple[int, int]] = []
    found = generate_all(
        [A, B], WANTED, echo, chunk=2, progress=lambda d, t, w: seen.append((d, t))
    )
    assert echo.calls[:3] == [
        ("a/x", 8, ("one", "two")),
        ("a/x", 8, ("three",)),
        ("a/x", 4, ("one",)),
    ]
    assert len(echo.calls) == 6 and found["b/x", 8, "two"] == "b/x: two"
    assert set(found) == {
        (s, t, p) for s in ("a/x", "b/x") for t, texts in WANTED.items() for p in texts
    }
    assert seen[0] == (0, 8) and seen[-1] == (8, 8) and seen == sorted(seen)


def test_checkpoints_are_used_one_after_the_other(model: Path) -> None:
    own = [Target("full", state, model) for state in ("before", "after")]
    echo = Echo(model)
    generate_all([own[0], A, own[1], B], {8: ["p"]}, echo)
    assert [call[0] for call in echo.calls] == ["a/x", "b/x", "full/before", "full/after"]


def test_an_interrupted_run_continues(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    first = Echo(model, fail_at=2)
    with ResponseCache(path) as cache, pytest.raises(KeyboardInterrupt):
        generate_all([A], WANTED, first, cache=cache, chunk=1)
    second = Echo(model)
    with ResponseCache(path) as cache:
        found = generate_all([A], WANTED, second, cache=cache, chunk=1)
    assert [call[1:] for call in second.calls] == [(8, ("three",)), (4, ("one",))]
    assert found == generate_all([A], WANTED, Echo(model))
    third = Echo(model)
    with ResponseCache(path) as cache:
        assert generate_all([A], WANTED, third, cache=cache) == found and third.calls == []
