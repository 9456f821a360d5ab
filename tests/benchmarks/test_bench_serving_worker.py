"""The serving benchmark's switch in a real worker: arms that share an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reference_engine import Completion, Engine, Request, engine

from benchmarks.serving import worker_switch
from benchmarks.serving.artifacts import Artifacts, write_tiny_model

OPEN = {"family": None, "missing_profile": "serve_unprotected"}
SWITCHED = {"worker_extension_cls": "benchmarks.serving.worker_switch.Switch"}
PROMPTS = [[3 + 5 * i + 2 * k for k in range(6 + 30 * i)] for i in range(2)]
"""One of few tokens and one of many: two code paths."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    root = tmp_path_factory.mktemp("artifacts")
    return Artifacts(root / "made", write_tiny_model(root / "model"), 8, 8)


def completions(served: Engine, tenants: list[Path]) -> list[Completion]:
    return served.generate([Request(prompt, tenant) for prompt in PROMPTS for tenant in tenants], 6)


@pytest.fixture(scope="module")
def plain(files: Artifacts) -> list[Completion]:
    """Completions of an engine without a vector."""
    with engine(files.model, OPEN, enforce_eager=True) as served:
        return completions(served, [files.plain(i) for i in range(2)])


@pytest.fixture(scope="module")
def served(files: Artifacts, plain: list[Completion]) -> Iterator[Engine]:
    settings = {"family": str(files.family(100)), "apply": "gain"}
    with engine(files.model, settings, max_loras=2, **SWITCHED) as running:
        yield running


def switch(served: Engine, to: str) -> int:
    (changed,) = served.llm.collective_rpc("switch_safety", args=(to,))
    return int(changed)


def test_a_disabled_vector_is_an_engine_without_one_and_can_be_enabled_again(
    served: Engine, files: Artifacts, plain: list[Completion]
) -> None:
    tenants = [files.protected(i, 100, i) for i in range(2)]
    before = completions(served, tenants)
    assert before != plain
    assert switch(served, "aside") > 0
    assert completions(served, tenants) == plain
    assert switch(served, "all") == 0
    assert completions(served, tenants) == before


def test_steps_are_timed_with_the_vector_and_without(served: Engine, files: Artifacts) -> None:
    tenants = [files.protected(i, 100, i) for i in range(2)]
    before = completions(served, tenants)
    served.llm.collective_rpc("start_timed_steps")
    mixed = [
        served.generate(
            [Request([*prompt, 7], tenant) for prompt in PROMPTS for tenant in tenants], 40
        )
        for _ in range(2)
    ]
    (medians,) = served.llm.collective_rpc("end_timed_steps")
    assert len(mixed) == 2 and completions(served, tenants) == before
    assert set(medians) == {"all", "aside"}
    for found in medians.values():
        assert set(found) == {"decode_step_ms", "prompt_token_us"}


def test_medians_are_of_the_commonest_batch_and_per_prompt_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decode steps take 3 s with the vector and 2 s without, a prompt token 0.5 s and 0.25 s."""
    now, states = [0.0], list[str]()
    monkeypatch.setattr(worker_switch.time, "perf_counter", lambda: now[0])
    worker = SimpleNamespace(switch_safety=states.append)

    def execute(scheduled: Any) -> str:
        decode_s, token_s = (3.0, 0.5) if timed.state == "all" else (2.0, 0.25)
        tokens = scheduled.total_num_scheduled_tokens
        now[0] += decode_s if tokens == 2 else token_s * tokens
        return "output"

    timed = worker_switch.TimedSteps(worker, execute)
    for tokens in [2] * 48 + [10, 20, 30, 40]:
        requests = {"a": 1, "b": tokens - 1}
        scheduled = SimpleNamespace(
            total_num_scheduled_tokens=tokens, num_scheduled_tokens=requests
        )
        assert timed(scheduled) == "output"
    assert states[:4] == ["aside", "all", "aside", "all"]
    assert timed.medians() == {
        "all": {"decode_step_ms": 3e3, "prompt_token_us": 0.5e6},
        "aside": {"decode_step_ms": 2e3, "prompt_token_us": 0.25e6},
    }


def test_fewer_profiles_are_gains_that_tenants_share(served: Engine, files: Artifacts) -> None:
    own = [files.protected(i, 100, 40 * i) for i in range(2)]
    before = completions(served, own)
    either = [
        completions(served, [files.protected(i, 100, profile) for i in range(2)])
        for profile in (0, 40)
    ]
    assert before not in either and either[0] != either[1]
    completions(served, own)  # they take the slots again, in an order of the engine's
    assert switch(served, "1") == 1
    assert completions(served, own) in either
    switch(served, "all")
    assert completions(served, own) == before


def test_an_engine_without_a_vector_rejects_a_switch(files: Artifacts) -> None:
    with engine(files.model, OPEN, **SWITCHED) as bare, pytest.raises(Exception, match="no vector"):
        switch(bare, "aside")


def test_a_compiled_engine_rejects_disabling_its_vector(served: Engine) -> None:
    config = served.llm.llm_engine.vllm_config.model_config
    config.enforce_eager = False
    try:
        with pytest.raises(Exception, match="--mode eager"):
            switch(served, "aside")
    finally:
        config.enforce_eager = True


def test_weights_read_again_are_those_of_the_path_and_can_be_restored(
    files: Artifacts, tmp_path: Path
) -> None:
    family, profile = files.family(100), files.checkpoint_profile(100)
    settings = {"family": str(family), "profile": str(profile), "apply": "weights"}
    bare = [Request(prompt) for prompt in PROMPTS]
    with engine(files.merged(100), None, plugins="", enable_lora=False) as merged:
        expected = merged.generate(bare, 6)
    with engine(files.model, settings, **SWITCHED) as served:
        for to in (str(files.merged(100)), "all", str(files.model), "all"):
            served.llm.collective_rpc("switch_weights", args=(to,))
            assert (served.generate(bare, 6) == expected) == (to != str(files.model))
