"""Commands for a running server, over a real port: requests, output and exit codes."""

from __future__ import annotations

import json
import re
import shlex
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tenant_server import AT, FAMILY, KEY, SECRET, World, app_of, error, served

from safegene_vllm.cli import client_options, console, main
from safegene_vllm.client import connection

NAME = "acme/support"
GUIDES = Path(__file__).parents[2] / "docs" / "guides"
PROFILE = {"kind": "profile", "coefficients": [0.0, 0.5]}


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a run of the command."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    world = World()
    with served(app_of(world)) as url:
        world.url = url
        yield world


@pytest.fixture
def world(shared_world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """The running server, reset, with one tenant of two revisions."""
    shared_world.__init__(url=shared_world.url)
    shared_world.tenant(NAME, published=2, served=f"{NAME}@2", limits={"concurrent": 8})
    shared_world.revision(NAME, [0.0, 0.5], state="failed", reasons=["NaN in layer 3"])
    shared_world.revision(NAME, [0.0, 0.7])
    monkeypatch.setenv("SAFEGENE_URL", shared_world.url)
    monkeypatch.setenv("SAFEGENE_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    return shared_world


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        code = exit_.value.code
        out, err = capsys.readouterr()
        return Outcome(code if isinstance(code, int) else 0, out, err)

    return call


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: None)


def last(world: World, method: str) -> Any:
    return next(request for request in reversed(world.requests) if request.method == method)


# tenant


def test_tenant_add_follows_its_job_and_its_rollout(run: Run, world: World) -> None:
    world.tenants.clear()
    outcome = run("tenant", "add", NAME, "--source", "s3://b/acme", "--limit", "concurrent=8")
    assert outcome.code == 0, outcome.err
    assert world.requests[0].body == {
        "name": NAME,
        "source": "s3://b/acme",
        "limits": {"concurrent": 8},
        "publish": True,
    }
    lines = [line for line in outcome.err.splitlines() if line.startswith(("job", "rollout"))]
    assert lines == [
        "job 7 running: publishing",
        "job 7 done: publishing",
        "rollout 12: on 2 of 2 replicas",
    ]
    assert outcome.out.startswith(f"{NAME}\n") and "rollout 12: done" in outcome.out


def test_tenant_add_without_waiting(run: Run, world: World) -> None:
    outcome = run("tenant", "add", NAME, "--coefficient", 0.6, "--no-publish", "--no-wait")
    assert outcome.code == 0 and "job 7: queued" in outcome.out
    assert [request.method for request in world.requests] == ["POST"]
    body = world.requests[0].body
    assert (body["coefficients"], body["publish"], "source" in body) == (0.6, False, False)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_failed_job_is_exit_code_1_with_its_message(
    run: Run, world: World, state: str, as_json: bool
) -> None:
    world.job_states, world.message = ["queued", "running", state], "rank 64 is too large"
    options = ["--json"] if as_json else []
    outcome = run("tenant", "add", NAME, "--source", "s3://b/acme", *options)
    assert outcome.code == 1 and f"job 7 (onboard) {state}: rank 64 is too large" in outcome.err
    if as_json:
        assert json.loads(outcome.out)["job"]["state"] == state


def test_tenant_add_with_a_profile_file(run: Run, world: World, tmp_path: Path) -> None:
    (tmp_path / "safegene.json").write_text(json.dumps(PROFILE))
    for path in (tmp_path, tmp_path / "safegene.json"):
        assert run("tenant", "add", NAME, "--profile", path, "--no-wait").code == 0
        assert last(world, "POST").body["profile"] == PROFILE


def test_tenant_list_and_show(run: Run, world: World) -> None:
    world.tenant("globex", published=None, served=None, state="frozen")
    world.tenant("initech")
    rows = [line.split() for line in run("tenant", "list").out.splitlines()]
    assert rows[0][:3] == ["name", "state", "served"]
    assert [row[:3] for row in rows[1:]] == [
        [NAME, "active", f"{NAME}@2"],
        ["globex", "frozen", "-"],
        ["initech", "active", "initech@1"],
    ]
    assert "concurrent=8" in rows[1] and "2031-05-01 08:00:00Z" in " ".join(rows[1])
    shown = run("tenant", "show", NAME).out
    assert "NaN in layer 3" in shown and "0.7" in shown and FAMILY in shown
    facts = json.loads(run("tenant", "show", NAME, "--json").out)
    assert facts == {"tenant": world.tenants[NAME], "revisions": world.revisions}


def test_tenant_list_says_what_failed_and_hides_what_is_retired(run: Run, world: World) -> None:
    world.tenant("globex", published=None, served=None, failure="job 7 failed: no profile")
    world.tenant("initech", state="retired", published=None, served=None)
    outcome = run("tenant", "list")
    rows = [line.split()[:2] for line in outcome.out.splitlines()]
    assert rows[1:] == [[NAME, "active"], ["globex", "failed"]]
    assert "globex: job 7 failed: no profile" in outcome.err and "1 retired" in outcome.err
    assert "initech" in run("tenant", "list", "--all").out
    assert len(json.loads(run("tenant", "list", "--json").out)["data"]) == 3
    assert "job 7 failed: no profile" in run("tenant", "show", "globex").out


@pytest.mark.parametrize(
    "command",
    [
        ["tenant", "add", "globex", "--coefficient", "1"],
        ["tenant", "update", NAME, "--coefficient", "1"],
        ["job", "watch", "7"],
        ["probe", "run", NAME],
    ],
)
def test_the_reason_of_a_failure_is_printed_once(
    run: Run, world: World, command: list[str]
) -> None:
    world.job_states, world.message = ["running", "failed"], "no profile"
    outcome = run(*command)
    assert outcome.code == 1
    assert (outcome.out + outcome.err).count("no profile") == 1
    assert outcome.err.rstrip().endswith("no profile")


def test_tenant_delete_is_for_what_never_served(run: Run, world: World) -> None:
    world.tenant("globex", published=None, served=None)
    world.revision("globex", [0.5], state="failed")
    outcome = run("tenant", "delete", "globex")
    assert outcome.code == 0 and "globex is deleted; the name can be added again" in outcome.out
    assert last(world, "DELETE").query == {"expected_revision": "0"}
    outcome = run("tenant", "delete", NAME)
    assert outcome.code == 1 and f"{NAME} has served {NAME}@2" in outcome.err
    assert "safegene tenant retire acme/support" in outcome.err


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (["--scale", "1.5"], {"scale": 1.5}),
        (["--coefficient", "0"], {"coefficients": 0.0}),
        (["--coefficients", "0:0.5,1:1"], {"layers": {"0": 0.5, "1": 1.0}}),
        (["--scale", "2", "--expect", "2"], {"scale": 2.0, "expected_revision": 2}),
    ],
)
def test_tenant_set_changes_coefficients(
    run: Run, world: World, options: list[str], body: dict[str, Any]
) -> None:
    world.applied = [0, 1, 2]
    outcome = run("tenant", "set", NAME, *options)
    assert outcome.code == 0, outcome.err
    assert (world.requests[0].method, world.requests[0].body) == ("PATCH", body)
    assert f"{NAME}@2 is published" in outcome.out and "on 2 of 2 replicas" in outcome.out
    assert "rollout 12: on 1 of 2 replicas" in outcome.err


def test_an_unchanged_profile_has_no_rollout(run: Run, world: World) -> None:
    from fastapi.responses import JSONResponse

    world.errors.append(JSONResponse({"revision": world.revisions[1], "rollout": None}))
    outcome = run("tenant", "set", NAME, "--scale", 1)
    assert outcome.code == 0 and "rollout" not in outcome.out and len(world.requests) == 1


def test_a_replica_that_lags_too_long_is_exit_code_1_and_named(run: Run, world: World) -> None:
    world.applied = [1]
    outcome = run("tenant", "set", NAME, "--scale", 2, "--timeout", 0)
    assert outcome.code == 1 and outcome.err.splitlines()[-1] == "- r2: not seen for 9 s"
    assert run("tenant", "set", NAME, "--scale", 2, "--no-wait").code == 0


def test_tenant_set_limits(run: Run, world: World) -> None:
    outcome = run(
        *("tenant", "set", NAME, "--limit", "concurrent=2", "--limit", "tokens_per_minute=60000")
    )
    assert outcome.code == 0 and "concurrent=2, tokens_per_minute=60000" in outcome.out
    assert world.requests[0].body == {"concurrent": 2, "tokens_per_minute": 60000}
    assert run("tenant", "set", NAME, "--limit", "none").code == 0
    assert world.tenants[NAME]["limits"] == {}


def test_tenant_update_publish_rollback_retire(run: Run, world: World) -> None:
    assert run("tenant", "update", NAME, "--expect", 2).code == 0
    assert last(world, "POST").body == {"publish": True, "expected_revision": 2}
    assert run("tenant", "publish", NAME, 2).code == 0
    assert last(world, "POST").body == {"number": 2}
    assert run("tenant", "rollback", NAME).code == 0
    assert last(world, "POST").body == {}
    assert run("tenant", "rollback", NAME, "--to", 1, "--expect", 2).code == 0
    assert last(world, "POST").body == {"number": 1, "expected_revision": 2}
    outcome = run("tenant", "retire", NAME, "--expect", 2)
    assert outcome.code == 0 and f"{NAME} is retired" in outcome.out
    assert last(world, "DELETE").query == {"expected_revision": "2"}


def test_tenant_freeze_and_unfreeze(run: Run, world: World) -> None:
    assert "frozen" in run("tenant", "freeze", NAME).out
    assert json.loads(run("tenant", "unfreeze", NAME, "--json").out)["state"] == "active"


@pytest.fixture
def data(tmp_path: Path) -> None:
    """Nine rows of each kind, where commands run."""
    harm = "".join(json.dumps({"prompt": f"harm {n}"}) + "\n" for n in range(9))
    task = "".join(json.dumps({"prompt": f"t {n}", "answer": "ab"[n % 2]}) + "\n" for n in range(9))
    (tmp_path / "harm.jsonl").write_text(harm)
    (tmp_path / "task.jsonl").write_text(task)


@pytest.mark.usefixtures("data")
def test_tenant_calibrate_sends_drawn_examples(run: Run, world: World) -> None:
    command = (
        *("tenant", "calibrate", NAME, "--safety", "harm.jsonl?licence=MIT"),
        *("--task", "task.jsonl?licence=private", "--shots", 4, "--seed", 1),
    )
    outcome = run(*command)
    assert outcome.code == 0 and "job 7: done" in outcome.out, outcome.err
    body = world.requests[0].body
    assert {kind: len(rows) for kind, rows in body["examples"].items()} == {"safety": 4, "task": 4}
    answers = sorted(row["answer"] for row in body["examples"]["task"])
    assert answers == ["a", "a", "b", "b"] and body["examples"]["safety"][0]["answer"] is None
    assert body["data"]["task"]["licence"] == "private" and body["seed"] == 1
    assert run(*command).code == 0 and last(world, "POST").body == body
    assert run(*command, "--no-publish").code == 0
    assert last(world, "POST").body == {**body, "publish": False}


@pytest.mark.usefixtures("data")
def test_new_content_is_sent_with_the_examples_that_calibrate_would_send(
    run: Run, world: World
) -> None:
    drawn = ("safety", "harm.jsonl?licence=MIT"), ("task", "task.jsonl?licence=private")
    options = [*drawn, ("shots", "4"), ("seed", "1")]
    short = [word for name, value in options for word in (f"--{name}", value)]
    assert run("tenant", "calibrate", NAME, *short).code == 0
    sent = {**world.requests[0].body}
    assert sent.pop("publish") is True
    assert set(sent) == {"examples", "data", "seed"}
    long = [word for name, value in options for word in (f"--calibrate-{name}", value)]
    added = run("tenant", "add", "acme/new", "--source", "s3://b/acme", *long)
    assert added.code == 0 and "rollout 12: done" in added.out, added.err
    body = next(request.body for request in world.requests if request.path == "/tenants")
    assert body == {
        **{"name": "acme/new", "source": "s3://b/acme", "limits": {}, "publish": True},
        "calibrate": sent,
    }
    assert run("tenant", "update", NAME, *long, "--no-wait").code == 0
    assert last(world, "POST").body == {"publish": True, "calibrate": sent}


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "x", "--coefficient", "1"], "give one of them"),
        ([], "give --source"),
    ],
)
def test_invalid_calibration_options_are_rejected_before_a_request(
    run: Run, world: World, arguments: list[str], words: str
) -> None:
    data = (
        "--calibrate-safety",
        "harm.jsonl?licence=MIT",
        "--calibrate-task",
        "task.jsonl?licence=x",
    )
    outcome = run("tenant", "add", NAME, *arguments, *data)
    assert outcome.code == 1 and words in outcome.err and world.requests == []
    outcome = run("tenant", "add", NAME, "--source", "x", *data[:2])
    assert outcome.code == 1 and "--calibrate-safety and --calibrate-task" in outcome.err
    assert world.requests == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tenant", "add", NAME], "--source"),
        (["tenant", "add", NAME, "--source", "x", "--limit", "speed=9"], "requests_per_minute"),
        (["tenant", "add", NAME, "--source", "x", "--limit", "concurrent=-1"], "NAME=N"),
        (["tenant", "set", NAME], "give one of --scale"),
        (["tenant", "set", NAME, "--scale", "1", "--limit", "none"], "give one of --scale"),
        (["tenant", "set", NAME, "--scale", "1", "--coefficient", "1"], "give one of --scale"),
        (["tenant", "set", NAME, "--coefficient", "1", "--coefficients", "0:1"], "one of them"),
        (["tenant", "set", NAME, "--limit", "none", "--expect", "1"], "--expect"),
        (["tenant", "set", NAME, "--scale", "nan"], "finite"),
        (["tenant", "set", NAME, "--profile", "nowhere"], "nowhere"),
        (["tenant", "show", "../keys"], "not a valid name"),
        (["family", "floor", FAMILY, "0=1"], "the floor"),
        (["key", "add", "app", "--tenant", "*", "--expires", "soon"], "30d"),
        (["key", "add", "app", "--tenant", "*", "--expires", "2001-01-01"], "future"),
        (["audit", "--since", "99999999d"], "--since"),
        (["usage", "--since", "yesterday"], "--since"),
    ],
)
def test_invalid_options_are_rejected_before_a_request(
    run: Run, world: World, arguments: list[str], words: str
) -> None:
    outcome = run(*arguments)
    assert outcome.code == 1 and words in outcome.err and "Traceback" not in outcome.err
    assert outcome.out == "" and world.requests == []


# family, key


def test_family_floor_and_freeze(run: Run, world: World) -> None:
    assert "1=0.5" in run("family", "list").out
    outcome = run("family", "floor", FAMILY, "0-1:0.25")
    assert outcome.code == 0 and "rollout 12: done" in outcome.out
    assert last(world, "PUT").body == {"floor": {"0": 0.25, "1": 0.25}}
    assert run("family", "floor", FAMILY, "none", "--no-wait", "--json").code == 0
    assert last(world, "PUT").body == {"floor": {}}
    for name in ("tiny-family", FAMILY[7:15], FAMILY[:12]):
        assert "yes" in run("family", "freeze", name).out
    assert json.loads(run("family", "unfreeze", FAMILY, "--json").out)["frozen"] is False


def test_a_range_of_layers_is_those_with_a_vector(run: Run, world: World) -> None:
    world.family = {"num_layers": 9, "layers": [2, 4, 7]}
    outcome = run("family", "floor", FAMILY, "1-6:0.25,8:0")
    assert last(world, "PUT").body == {"floor": {"2": 0.25, "4": 0.25, "8": 0.0}}
    assert "layers with a vector: 2 at least 0.25, 4 at least 0.25" in outcome.err
    for command, method in (("set", "PATCH"), ("update", "POST")):
        assert run("tenant", command, NAME, "--coefficients", "4-8:0.8", "--no-wait").code == 0
        assert last(world, method).body["layers"] == {"4": 0.8, "7": 0.8}
    assert run("tenant", "add", "b", "--coefficients", "0-3:1", "--no-wait").code == 0
    assert last(world, "POST").body["layers"] == {"2": 1.0}
    outcome = run("tenant", "set", NAME, "--coefficients", "5-6:0.8")
    assert (
        outcome.code == 1
        and "no layer in 5-6 has a vector; expected some of 2, 4, 7" in outcome.err
    )


def test_a_missing_family_and_an_ambiguous_one(run: Run, world: World) -> None:
    outcome = run("family", "freeze", "qwen")
    assert outcome.code == 1 and "no family is named 'qwen'" in outcome.err
    assert f"tiny-family  {FAMILY}" in outcome.err and last(world, "GET").path == "/families"
    world.more_families = [FAMILY[:-1] + "0"]
    assert "2 families are named 'ff'" in run("family", "freeze", "ff").err
    assert run("family", "freeze", FAMILY).code == 0
    outcome = run("tenant", "add", "b", "--coefficients", "0-1:1")
    assert outcome.code == 1 and "has 2 families, so a range of layers is ambiguous" in outcome.err


def test_a_key_for_a_tenant_that_does_not_exist_is_noted(run: Run, world: World) -> None:
    outcome = run("key", "add", "app", "--tenant", "acme/supports", "--tenant", NAME)
    assert outcome.code == 0 and outcome.out == f"{SECRET}\n"
    assert "no tenant acme/supports yet; did you mean 'acme/support'?" in outcome.err
    assert outcome.err.count("warning") == 1


def test_key_add_puts_the_secret_alone_on_stdout(run: Run, world: World) -> None:
    outcome = run(
        *("key", "add", "app", "--tenant", NAME, "--tenant", "base", "--default", NAME),
        *("--expires", "2131-12-31"),
    )
    assert outcome.code == 0 and outcome.out == f"{SECRET}\n" and SECRET not in outcome.err
    assert "until 2131-12-31 00:00:00Z" in outcome.err
    assert world.requests[0].body == {
        "name": "app",
        "scopes": ["serve"],
        "tenants": [NAME, "base"],
        "default_tenant": NAME,
        "expires_at": "2131-12-31T00:00:00+00:00",
    }
    made = json.loads(run("key", "add", "b", "--tenant", "*", "--scope", "admin", "--json").out)
    assert (made["secret"], made["scopes"], made["expires_at"]) == (SECRET, ["admin"], None)
    assert SECRET not in run("key", "list").out


@pytest.mark.parametrize("words", [["add", "app", "--tenant", "*"], ["rotate", "app"]])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_secret_may_be_written_to_a_private_new_file(
    run: Run, world: World, tmp_path: Path, words: list[str], as_json: bool
) -> None:
    options = ["--json"] if as_json else []
    outcome = run("key", *words, "--out", "app.key", *options)
    file = tmp_path / "app.key"
    assert outcome.code == 0 and file.read_text() == f"{SECRET}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert SECRET not in outcome.out + outcome.err
    again = run("key", *words, "--out", "app.key")
    assert again.code == 1 and "exists" in again.err and len(world.requests) == 1


def test_a_rejected_key_leaves_no_file(run: Run, world: World, tmp_path: Path) -> None:
    world.errors.append(error(409, "key 'app' exists"))
    assert run("key", "add", "app", "--tenant", "*", "--out", "app.key").code == 1
    assert list(tmp_path.iterdir()) == []


def test_key_list_and_revoke(run: Run, world: World) -> None:
    run("key", "add", "app", "--tenant", NAME)
    row = run("key", "list").out.splitlines()[1].split()
    assert row == ["app", SECRET[:8], "serve", NAME, "-", "-", "-"]
    assert "app is revoked" in run("key", "revoke", "app").out and world.keys == {}


# rollout, job, replica, audit


def test_rollout_list_show_watch(run: Run, world: World) -> None:
    world.applied = [1]
    assert "12" in run("rollout", "list", "--limit", 3).out.splitlines()[1]
    assert world.requests[0].query == {"limit": "3"}
    assert "r2 lags: not seen for 9 s" in run("rollout", "show", 12).out
    world.applied = [1, 1, 2]
    assert "rollout 12: done" in run("rollout", "watch").out
    assert json.loads(run("rollout", "watch", 12, "--json").out)["done"] is True
    assert json.loads(run("rollout", "show", 12, "--json").out)["applied"] == 2


def test_rollout_watch_without_any(run: Run, world: World) -> None:
    from fastapi.responses import JSONResponse

    world.errors.append(JSONResponse({"data": [], "cursor": None}))
    outcome = run("rollout", "watch")
    assert outcome.code == 1 and "no rollout to watch" in outcome.err


def test_job_list_show_cancel_watch(run: Run, world: World) -> None:
    assert "publishing" in run("job", "list", "--state", "failed", "--tenant", NAME).out
    assert world.requests[0].query == {"state": "failed", "tenant": NAME, "limit": "100"}
    assert "job 7: running" in run("job", "show", 7).out
    assert "job 7: done" in run("job", "watch", 7).out
    world.job_states = ["cancelled"]
    assert "job 7: cancelled" in run("job", "cancel", 7).out
    assert run("job", "watch", 7).code == 1
    assert json.loads(run("job", "show", 7, "--json").out)["state"] == "cancelled"


def test_replica_list(run: Run, world: World) -> None:
    out = run("replica", "list").out
    assert "node-1" in out and f"{NAME}@1: no receipt" in out


def test_probe_list_and_run(run: Run, world: World) -> None:
    out = run("probe", "list").out
    assert re.search(r"acme/support@1 +ok +25 % of 12 +12 % of 24 +100 % of 36 +2031-05-01", out)
    assert len(json.loads(run("probe", "list", "--json").out)["data"]) == 2
    world.job_states = ["queued", "running", "done"]
    assert "job 7: done" in run("probe", "run", NAME).out
    assert (world.requests[2].method, world.requests[2].path) == ("POST", f"/tenants/{NAME}/probe")
    world.job_states = ["queued"]
    assert "job 7: queued" in run("probe", "run", NAME, "--no-wait").out
    world.job_states = ["failed"]
    assert run("probe", "run", NAME).code == 1


def test_audit(run: Run, world: World) -> None:
    outcome = run("audit", "--target", NAME, "--since", "2031-05-01", "--limit", 1)
    assert world.requests[0].query == {
        "target": NAME,
        "since": "2031-05-01T00:00:00+00:00",
        "limit": "1",
    }
    assert "key.add" in outcome.out and "scopes=serve" in outcome.out
    assert "--cursor 9" in outcome.err
    run("audit", "--since", "24h", "--cursor", "9")
    assert world.requests[1].query["cursor"] == "9" and "T" in world.requests[1].query["since"]
    assert json.loads(run("audit", "--json").out)["data"][0]["at"] == AT


USAGE = {"tenant": NAME, "key": "app", "requests": 3, "prompt_tokens": 70, "completion_tokens": 9}


def days(count: int) -> list[dict[str, Any]]:
    return [{"day": f"2031-05-0{count - n}", **USAGE} for n in range(count)]


def test_usage_is_a_table_by_day_with_a_total(run: Run, world: World) -> None:
    world.usage = days(3)
    outcome = run("usage", "--tenant", NAME, "--key-name", "app", "--until", "2031-05-03")
    query = world.requests[0].query
    assert (query["tenant"], query["key"], query["until"]) == (NAME, "app", "2031-05-03")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[0] == [
        *("day", "tenant", "key", "requests"),
        *("prompt", "tokens"),
        *("completion", "tokens"),
    ]
    assert lines[1:] == [[f"2031-05-0{n}", NAME, "app", "3", "70", "9"] for n in (3, 2, 1)]
    assert outcome.err == "total: 9 requests, 210 prompt tokens, 27 completion tokens\n"


def test_usage_is_of_thirty_days_by_default(run: Run, world: World) -> None:
    assert run("usage").code == 0
    (request,) = world.requests
    assert request.query.keys() == {"since"}
    ago = datetime.now(UTC).date() - date.fromisoformat(request.query["since"])
    assert ago.days == 30


@pytest.mark.parametrize(
    ("given", "day"),
    [
        ("2031-05-01", "2031-05-01"),
        ("2031-05-01T01:00+02:00", "2031-04-30"),
        ("0001-01-01T00:00+14:00", "0001-01-01"),
    ],
)
def test_days_of_usage_are_in_utc(run: Run, world: World, given: str, day: str) -> None:
    assert run("usage", "--since", given).code == 0
    assert world.requests[0].query == {"since": day}


def test_usage_as_csv_and_json(run: Run, world: World) -> None:
    world.usage = days(3)
    world.usage[0] |= {"tenant": "=1+1", "key": 'a,"b'}
    outcome = run("usage", "--csv")
    assert outcome.out == (
        "day,tenant,key,requests,prompt_tokens,completion_tokens\n"
        '2031-05-03,\'=1+1,"a,""b",3,70,9\n'
        f"2031-05-02,{NAME},app,3,70,9\n"
        f"2031-05-01,{NAME},app,3,70,9\n"
    )
    assert outcome.err == ""
    assert json.loads(run("usage", "--json").out) == {"data": world.usage}
    both = run("usage", "--csv", "--json")
    assert both.code == 1 and "give one" in both.err


# Keys and addresses


@pytest.mark.parametrize("options", [["--key", KEY], ["--key-file", "key"]])
def test_the_key_option_overrides_the_environment(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv("SAFEGENE_KEY", "sg-wrong")
    rejected = run("tenant", "list")
    assert rejected.code == 1 and rejected.err.startswith("ApiError: ") and "401" in rejected.err
    assert run("tenant", "list", *options).code == 0
    both = run("tenant", "list", "--key", KEY, "--key-file", "key")
    assert both.code == 1 and "give one" in both.err and KEY not in both.err
    missing = run("tenant", "list", "--key-file", "missing")
    assert missing.code == 1 and missing.err.startswith("ConfigError: ")


def test_without_a_key_no_request_is_sent(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAFEGENE_KEY")
    outcome = run("job", "list")
    assert outcome.code == 1 and "SAFEGENE_KEY" in outcome.err and world.requests == []


def test_the_address_option_overrides_the_environment(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEGENE_URL", "http://127.0.0.1:9")
    assert run("tenant", "list").code == 1
    assert run("tenant", "list", "--url", f"{world.url}/v1").code == 0


# Text of other users


def test_text_of_a_server_cannot_control_the_terminal(run: Run, world: World) -> None:
    world.tenant("evil", source="s3://b/\x1b[2J\x9b31m\u202egnp")
    world.message = "line\nline\x1b]0;owned\x07"
    world.errors.append(error(400, "no\x1b[2J"))
    texts = [
        run("tenant", "list").err,
        run("tenant", "list").out,
        run("tenant", "show", "evil").out,
        *(run("job", "watch", 7).out, run("job", "watch", 7).err, run("job", "list").out),
    ]
    for text in texts:
        assert text and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), text
    assert json.loads(run("tenant", "list", "--json").out)["data"][1] == world.tenants["evil"]


def test_a_pipe_gets_cells_unchanged(run: Run, world: World) -> None:
    source = "s3://bucket/[red]/:a:/" + "long/" * 60
    world.tenant("wide", source=source)
    assert source in run("tenant", "list").out


def test_cells_fold_on_a_narrow_terminal(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        client_options,
        "results",
        lambda: Console(force_terminal=True, width=60, markup=False, color_system=None),
    )
    world.tenant("wide", source="s3://bucket/" + "".join(f"<{n}>" for n in range(30)))
    out = run("tenant", "show", "wide").out
    assert all(f"<{n}>" in re.sub(r"\s", "", out) for n in range(30))


def test_an_interrupted_wait_prints_how_to_continue(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(connection.time, "sleep", stop)
    outcome = run("job", "watch", 7)
    assert outcome.code != 0 and "safegene job watch 7" in outcome.err


def test_clean_and_cell() -> None:
    assert console.clean("a\x1b[1mb\nc") == "a?[1mb\nc"
    assert client_options.cell({"a": 1, "b": [2.5, None]}) == "a=1, b=2.5, -"
    assert [client_options.cell(value) for value in (None, "", [], {}, True, 0)] == [
        *("-", "-", "-", "-", "yes", "0")
    ]
    assert client_options.timestamp("2031-05-01T10:00:00+02:00") == "2031-05-01 08:00:00Z"
    assert client_options.timestamp(None) == "-" and client_options.timestamp("later") == "later"


# Documentation


def test_the_page_shows_commands_that_work(run: Run, world: World, tmp_path: Path) -> None:
    world.family = {"name": "qwen2.5-7b", "num_layers": 16, "layers": list(range(16))}
    pages = [(GUIDES / f"{name}.md").read_text() for name in ("tenants", "keys", "probes")]
    fences = re.findall(r"^```\w*\n(.*?)^```", "\n".join(pages), re.DOTALL | re.MULTILINE)
    lines = "\n".join(fences).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.match(r"safegene (?!serve)", line)]
    (tmp_path / "advbench.csv").write_text("goal\nharm\nworse\n")
    (tmp_path / "tickets.jsonl").write_text(
        '{"prompt": "a", "answer": "x"}\n{"prompt": "b", "answer": "y"}\n'
    )
    world.tenant("acme/sales", published=None, served=None)
    named: set[str] = set()
    for command in commands:
        words = shlex.split(command.partition("  #")[0])[1:]
        named.add(" ".join(words[: 1 if words[0] in ("audit", "usage") else 2]))
        world.job_states = ["done"]
        world.revisions[0]["state"] = "ready"
        outcome = run(*words)
        assert outcome.code == 0, (command, outcome)
    from safegene_vllm.cli import audit, family, job, key, probe, replica, rollout, tenant, usage

    groups = {"tenant": tenant, "family": family, "key": key, "rollout": rollout}
    groups |= {"job": job, "probe": probe, "replica": replica}
    every = {f"{group} {word}" for group, module in groups.items() for word in module.COMMANDS}
    # These need no server; their guide is another page.
    without_server = {"family make", "tenant protect"}
    assert named == every - without_server | {"audit", "usage"} and audit and usage
    family_page = (GUIDES / "family.md").read_text()
    assert all(f"\nsafegene {command} " in family_page for command in without_server)
