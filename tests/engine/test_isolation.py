"""No other tenant changes: bit-exact neighbors, vLLM's CPU leak, and no vector at gain zero.

"Bit" means bit: log-probabilities are compared with ==.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from reference_engine import Completion, Request, engine

from safegene_vllm.tiny_model import make_model, write_family, write_tenant

pytestmark = pytest.mark.engine

LONG = [3 + (7 * i) % 300 for i in range(48)]


@pytest.fixture(scope="module")
def setup_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("isolation")
    model = make_model("llama", root / "model")
    family = write_family(model, root / "family")
    for name, row in {"a": [0.5, 1.0], "a_other": [2.0, 0.3], "a_zero": [0.0, 0.0]}.items():
        write_tenant(model, root / name, family, row, seed=3)
    for name, row in {"b": [1.5, 0.2], "b_zero": [0.0, 0.0]}.items():
        write_tenant(model, root / name, family, row, seed=4)
    write_tenant(model, root / "p", family, [0.7, 0.9], adapter=False)
    write_tenant(model, root / "p_zero", family, [0.0, 0.0], adapter=False)
    write_tenant(model, root / "plain_a", None, None, seed=3)
    write_tenant(model, root / "plain_b", None, None, seed=4)
    return root


def batch(setup_dir: Path, tenants: list[str | None], length: int = 5) -> list[Request]:
    return [
        Request([*LONG[: length - 1], 200 + i], setup_dir / t if t else None)
        for i, t in enumerate(tenants)
    ]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_profile_changes_its_own_tenant_and_no_other(setup_dir: Path, compiled: bool) -> None:
    settings = {"family": str(setup_dir / "family")}
    mixes: dict[str, list[str | None]] = {
        "distinct": ["a", "b", "p", None],
        "identical": ["a", "a", "a", None],
        "skewed": ["a", "a", "a", "a", "a", "b", None, None],
    }
    with engine(setup_dir / "model", settings, enforce_eager=not compiled) as e:
        for length in (5, 48):  # few tokens and many take different paths
            for name, mix in mixes.items():
                protected = e.generate(batch(setup_dir, mix, length))
                zero = e.generate(batch(setup_dir, [t and f"{t}_zero" for t in mix], length))
                other = e.generate(
                    batch(setup_dir, ["a_other" if t == "a" else t for t in mix], length)
                )
                for t, p, z, o in zip(mix, protected, zero, other, strict=True):
                    where = f"{name}, {length} tokens, {t}"
                    assert (p == z) == (t is None), where
                    assert (p == o) == (t != "a"), where


def test_gain_zero_is_the_same_engine_without_a_vector(setup_dir: Path) -> None:
    zero = ["a_zero", "b_zero", None, "p_zero"]
    with engine(setup_dir / "model", {"family": str(setup_dir / "family")}) as e:
        found = e.generate(batch(setup_dir, zero))
    bare = {"family": None, "missing_profile": "serve_unprotected"}
    with engine(setup_dir / "model", bare) as e:
        expected = e.generate(batch(setup_dir, ["plain_a", "plain_b", None, None]))
    assert found == expected


def test_the_base_models_own_row(setup_dir: Path) -> None:
    """safegene.base_profile protects requests without an adapter exactly like a tenant."""
    settings = {"family": str(setup_dir / "family"), "base_profile": str(setup_dir / "p")}
    with engine(setup_dir / "model", settings) as e:
        base, tenant, other = e.generate(
            [
                Request(LONG[:5]),
                Request(LONG[:5], setup_dir / "p"),
                Request(LONG[:5], setup_dir / "p_zero"),
            ]
        )
        receipt = e.receipts()[0]
    assert base == tenant != other
    assert receipt.base_profile == receipt.adapters[0].profile


def test_stock_cpu_lora_leaks_into_base_requests_and_ours_does_not(setup_dir: Path) -> None:
    """When the first half of this test fails, vLLM is fixed and cpu_lora.py can be removed."""
    alone, mixed = (
        batch(setup_dir, [None]),
        [*batch(setup_dir, [None]), Request(LONG[:5], setup_dir / "plain_a")],
    )

    def completions(plugins: str | None, settings: dict | None) -> tuple[Completion, Completion]:
        with engine(setup_dir / "model", settings, plugins=plugins, max_loras=1) as e:
            return e.generate(alone)[0], e.generate(mixed)[0]

    stock_alone, stock_mixed = completions("", None)
    assert stock_alone.tokens != stock_mixed.tokens, "vLLM no longer leaks"
    ours_alone, ours_mixed = completions(
        None, {"family": None, "missing_profile": "serve_unprotected"}
    )
    assert ours_alone.tokens == ours_mixed.tokens == stock_alone.tokens
