"""`safegene evaluate`: from the command line to evaluation.json and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_setup import tiny_chat_model

from safegene_vllm.cli import main
from safegene_vllm.cli.evaluate import percent
from safegene_vllm.evaluation.results import Evaluation, load_evaluation
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.formats.profile import load_profile
from safegene_vllm.tiny_model import write_family, write_tenant


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli-evaluate")
    model = tiny_chat_model(root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "acme", family, [0.5, 1.0])
    rows = [{"prompt": f"prompt {n}", "answer": "yes" if n % 2 else "no"} for n in range(6)]
    (root / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(root: Path, out: Path, *more: object) -> list[str]:
    return [
        str(part)
        for part in (
            *("evaluate", root / "model", "--family", root / "family"),
            *("--tenant", f"acme={root}/acme"),
            *("--harmful", f"bad={root}/p.jsonl?limit=4"),
            *("--benign", f"good={root}/p.jsonl", "--task", f"mine={root}/p.jsonl"),
            *("--out", out, "--max-tokens", 6, "--task-tokens", 3, "--dtype", "float32"),
            *more,
        )
    ]


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def evaluated(root: Path, out: Path, *more: object) -> Evaluation:
    assert run(arguments(root, out, *more)) == 0
    return load_evaluation(out)


def test_a_whole_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    found = evaluated(root, tmp_path / "e.json", "--backend", "transformers")
    printed = capsys.readouterr().out
    assert [s.key for s in found.targets] == ["model/parent", "acme/before", "acme/after"]
    assert [j.name for j in found.judges] == ["strings:advbench", "strings:opening", "coherence"]
    assert (found.sets["bad"].n, found.sets["good"].n, found.tasks["mine"].n) == (4, 6, 6)
    after = found.target("acme", "after")
    assert after is not None and after.profile == load_profile(root / "acme").digest
    assert found.settings.backend == "transformers" and found.settings.max_tokens == 6
    assert {change.name for change in found.changes} == {"acme"}
    for part in (
        "bad, 4 prompts: attack success",
        "good, 6 prompts: refusals of ordinary prompts",
        "tasks: accuracy",
        percent(after.rates["bad"]["strings:opening"]),
        "strings:advbench",
        "safegene report",
    ):
        assert part in printed, part
    assert "…" not in printed, "nothing is cut off"
    assert str(tmp_path) not in (tmp_path / "e.json").read_text()


def test_cached_completions_are_not_generated_again(root: Path, tmp_path: Path) -> None:
    """The second run reads every completion from the file: an edit there changes the result."""
    cached = tmp_path / "private" / "cached.jsonl"
    more = ("--backend", "transformers", "--keep-answers", cached, "--judge", "strings:opening")
    first = evaluated(root, tmp_path / "1.json", *more)
    assert first.targets[2].rates["bad"]["strings:opening"].rate == 1.0
    lines = [json.loads(line) for line in cached.read_text().splitlines()]
    assert len(lines) == 3 * (6 + 6)
    cached.write_text(
        "".join(json.dumps({**line, "answer": "I cannot say"}) + "\n" for line in lines)
    )
    second = evaluated(root, tmp_path / "2.json", *more)
    assert second.targets[2].rates["bad"]["strings:opening"].rate == 0.0
    assert len(cached.read_text().splitlines()) == len(lines)


@pytest.mark.engine
def test_vllm_finds_what_transformers_find(root: Path, tmp_path: Path) -> None:
    reference = evaluated(root, tmp_path / "t.json", "--backend", "transformers", "--samples", 6)
    found = evaluated(root, tmp_path / "v.json", "--samples", 6)
    assert found.settings.backend == "vllm"
    assert found.targets == reference.targets
    assert found.samples == reference.samples and found.changes == reference.changes


def test_errors_are_reported_before_a_model_is_loaded(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", None)
    out = tmp_path / "e.json"
    out.write_text("{}")
    for more, message in (
        (("--out", out), "exists; name a new file, or replace it by --overwrite"),
        (("--out", tmp_path), "is a directory; name a file"),
        (("--out", tmp_path / "no" / "e.json"), "there is no directory"),
        (("--judge", "gpt4"), "judge 'gpt4' is not known"),
        (("--harmful", "p.jsonl"), "--harmful 'p.jsonl' is not NAME=VALUE"),
        (("--max-tokens", "600"), "exceed the model's context of 512 tokens: rows 1"),
        (("--tenant", f"other={root}/model"), "has no profile"),
        (("--keep-answers", root / "p.jsonl"), "give --keep-answers a file of its own"),
    ):
        backend = ("--backend", "transformers")
        assert run(arguments(root, tmp_path / "new.json", *backend, *more)) == 1, more
        assert message in capsys.readouterr().err, more
    assert not (tmp_path / "new.json").exists() and out.read_text() == "{}"


def test_without_vllm_the_other_backend_is_offered(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(arguments(root, tmp_path / "e.json")) == 1
    assert "use --backend transformers" in capsys.readouterr().err.replace("\n", " ")


def test_a_rate_in_words() -> None:
    assert percent(Rate(0.175, 0.1, 0.246, 40)) == "18 % (10 to 25)"
