"""The serving benchmark's switch in a real worker: arms that share an engine are what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from reference_engine import Completion, Engine, Request, engine

from random_world import World, write_pico

OPEN = {"family": None, "missing_profile": "serve_unprotected"}
SWITCHED = {"worker_extension_cls": "switching.Switch"}
PROMPTS = [[3 + 5 * i + 2 * k for k in range(6 + 30 * i)] for i in range(2)]
"""One of few tokens and one of many: the products take different ways."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    return World(root / "made", write_pico(root / "pico"), 8, 8)


def answers(served: Engine, tenants: list[Path]) -> list[Completion]:
    return served.generate([Request(prompt, tenant) for prompt in PROMPTS for tenant in tenants], 6)


@pytest.fixture(scope="module")
def plain(world: World) -> list[Completion]:
    """Of an engine that has no vector."""
    with engine(world.model, OPEN, enforce_eager=True) as served:
        return answers(served, [world.plain(i) for i in range(2)])


@pytest.fixture(scope="module")
def served(world: World, plain: list[Completion]) -> Iterator[Engine]:
    settings = {"family": str(world.family(100)), "apply": "gain"}
    with engine(world.model, settings, max_loras=2, **SWITCHED) as running:
        yield running


def switch(served: Engine, to: str) -> int:
    (changed,) = served.llm.collective_rpc("switch_safety", args=(to,))
    return int(changed)


def test_a_vector_set_aside_is_an_engine_without_one_and_comes_back(
    served: Engine, world: World, plain: list[Completion]
) -> None:
    tenants = [world.protected(i, 100, i) for i in range(2)]
    before = answers(served, tenants)
    assert before != plain
    assert switch(served, "aside") > 0
    assert answers(served, tenants) == plain
    assert switch(served, "all") == 0
    assert answers(served, tenants) == before


def test_steps_in_turn_are_timed_with_the_vector_and_without(served: Engine, world: World) -> None:
    tenants = [world.protected(i, 100, i) for i in range(2)]
    before = answers(served, tenants)
    served.llm.collective_rpc("take_turns")
    mixed = [
        served.generate(
            [Request([*prompt, 7], tenant) for prompt in PROMPTS for tenant in tenants], 40
        )
        for _ in range(2)
    ]
    (told,) = served.llm.collective_rpc("end_turns")
    assert len(mixed) == 2 and answers(served, tenants) == before
    assert set(told) == {"all", "aside"}
    for found in told.values():
        assert set(found) == {"decode_step_ms", "prompt_token_us"}
        assert all(0 < value < 1e6 for value in found.values())


def test_fewer_profiles_are_gains_that_tenants_share(served: Engine, world: World) -> None:
    own = [world.protected(i, 100, 40 * i) for i in range(2)]
    before = answers(served, own)
    either = [
        answers(served, [world.protected(i, 100, profile) for i in range(2)]) for profile in (0, 40)
    ]
    assert before not in either and either[0] != either[1]
    answers(served, own)  # they take the slots again, in an order of the engine's
    assert switch(served, "1") == 1
    assert answers(served, own) in either
    switch(served, "all")
    assert answers(served, own) == before


def test_an_engine_without_a_vector_refuses_to_be_switched(world: World) -> None:
    with engine(world.model, OPEN, **SWITCHED) as bare, pytest.raises(Exception, match="no vector"):
        switch(bare, "aside")


def test_a_compiled_engine_refuses_to_set_its_vector_aside(served: Engine) -> None:
    config = served.llm.llm_engine.vllm_config.model_config
    config.enforce_eager = False
    try:
        with pytest.raises(Exception, match="--mode eager"):
            switch(served, "aside")
    finally:
        config.enforce_eager = True


def test_weights_read_again_are_those_of_the_path_and_come_back(
    world: World, tmp_path: Path
) -> None:
    family, profile = world.family(100), world.checkpoint_profile(100)
    settings = {"family": str(family), "profile": str(profile), "apply": "weights"}
    bare = [Request(prompt) for prompt in PROMPTS]
    with engine(world.merged(100), None, plugins="", enable_lora=False) as merged:
        expected = merged.generate(bare, 6)
    with engine(world.model, settings, **SWITCHED) as served:
        for to in (str(world.merged(100)), "all", str(world.model), "all"):
            served.llm.collective_rpc("switch_weights", args=(to,))
            assert (served.generate(bare, 6) == expected) == (to != str(world.model))
