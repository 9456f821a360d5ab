"""Fifty tenants, and five thousand requests of which most are wrong, on one real server.

Every request has its expected response; a valid one is served by its own tenant alone, with the
tokens of that tenant without load.
"""

from __future__ import annotations

import asyncio
import collections
import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from registry_server import ADMIN, Running, World, make_world

pytestmark = pytest.mark.engine

TENANTS, REQUESTS, AT_ONCE = 50, 5000, 32
LARGEST = 64 * 1024
PATH = "/v1/completions"
PROMPT = [3 + (5 * i) % 300 for i in range(24)]
JSON = {"Content-Type": "application/json"}
ACCESS = f"max_body_bytes: {LARGEST}"


@dataclass(frozen=True)
class Member:
    """A tenant with its only key, and the tokens of its completion of PROMPT."""

    name: str
    secret: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One request and the statuses that are right for it."""

    kind: str
    statuses: tuple[int, ...]
    headers: dict[str, str]
    content: bytes
    method: str = "POST"
    path: str = PATH


def body(**more: Any) -> dict[str, Any]:
    request = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "return_token_ids": True}
    return {**request, **more}


def bearer(secret: str, **more: str) -> dict[str, str]:
    return {**JSON, "Authorization": f"Bearer {secret}", **more}


def right(me: Member, other: Member, draw: random.Random) -> Case:
    model = draw.choice(({"model": me.name}, {"model": f"{me.name}@1"}, {"model": ""}, {}))
    return Case("right", (200,), bearer(me.secret), json.dumps(body(**model)).encode())


def wrong_key(me: Member, other: Member, draw: random.Random) -> Case:
    content = json.dumps(body(model=me.name)).encode()
    value = draw.choice(
        (
            f"Bearer {me.secret[:-1]}",
            f"Bearer {me.secret}x",
            f"bearer  {me.secret} {me.secret}",
            f"Basic {me.secret}",
            "Bearer",
            "Bearer \x7f",
            me.secret,
        )
    )
    headers = {**JSON, "Authorization": value} if draw.random() < 0.8 else dict(JSON)
    # What is no header at all never gets as far as the key.
    odd = "\x7f" in headers.get("Authorization", "")
    return Case("wrong key", (400,) if odd else (401,), headers, content)


def wrong_model(me: Member, other: Member, draw: random.Random) -> Case:
    model = draw.choice(
        (
            other.name,
            f"{other.name}@1",
            f"{me.name}@2",
            f"{me.name}@01",
            f"{me.name} ",
            me.name.upper(),
            "base",
            "absent",
            "../" + other.name,
            other.name + "\x00",
            "é" * 50,
        )
    )
    return Case("wrong model", (404,), bearer(me.secret), json.dumps(body(model=model)).encode())


def odd_model(me: Member, other: Member, draw: random.Random) -> Case:
    model = draw.choice((7, True, 1e400, [other.name], {"name": other.name}, [[[]]]))
    return Case("odd model", (400,), bearer(me.secret), json.dumps(body(model=model)).encode())


def odd_encoding(me: Member, other: Member, draw: random.Random) -> Case:
    """An ambiguous request is rejected, whichever tenant is named in it."""
    mine = json.dumps(body(model=me.name))
    twice = mine[:-1] + f', "model": "{other.name}"}}'
    content, headers = draw.choice(
        (
            (twice.encode(), {}),
            (mine.encode("utf-16"), {}),
            (mine.encode("utf-32-le"), {}),
            (mine.encode()[:-9], {}),
            (b"\xff\xfe" + mine.encode(), {}),
            (mine.replace(me.name, "\udcff").encode("utf-8", "surrogateescape"), {}),
            (gzip.compress(mine.encode()), {"Content-Encoding": "gzip"}),
            (b"", {}),
            (b"null", {}),
            (b"[1, 2]", {}),
            (b"[" * 5000, {}),
            (f'{{"model": "{me.name}", "prompt": [1], "n": 1e999}}'.encode(), {}),
            (f"model={other.name}".encode(), {"Content-Type": "application/x-www-form-urlencoded"}),
        )
    )
    return Case("odd encoding", (400, 413, 415, 422), bearer(me.secret, **headers), content)


def huge(me: Member, other: Member, draw: random.Random) -> Case:
    content = json.dumps(body(model=me.name, user="x" * (LARGEST + draw.randrange(LARGEST))))
    return Case("huge", (413,), bearer(me.secret), content.encode())


def odd_path(me: Member, other: Member, draw: random.Random) -> Case:
    path = draw.choice(
        (
            "/v1//completions",
            "/v1/completions/",
            "/V1/completions",
            "/v1/%63ompletions/..%2fmodels",
            "/v1/models/../completions",
            "/v1/load_lora_adapter",
            "/tokenize",
            "/collective_rpc",
            "/v1/safegene/tenants",
            f"/v1/models/{other.name}",
        )
    )
    content = json.dumps(body(model=other.name)).encode()
    statuses = (307, 400, 401, 403, 404, 405)
    return Case("odd path", statuses, bearer(me.secret), content, path=path)


KINDS: tuple[tuple[int, Callable[[Member, Member, random.Random], Case]], ...] = (
    (30, right),
    (15, wrong_key),
    (20, wrong_model),
    (10, odd_model),
    (14, odd_encoding),
    (3, huge),
    (8, odd_path),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("crowd")
    url = f"sqlite:///{folder / 'registry.sqlite'}"
    made = make_world(folder, {f"a{i}": 30 + i for i in range(4)}, url=url, access=ACCESS)
    yield made
    made.registry.close()


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Running]:
    for number in range(TENANTS):
        first = 0.05 * (number + 1)
        world.add(f"team{number // 10}/t{number}", f"a{number % 4}", [first, 2.0 - first / 2])
    running = Running(world, slots=8)
    yield running
    running.end()


@pytest.fixture(scope="module")
def members(world: World, server: Running) -> list[Member]:
    found = []
    for tenant in world.registry.tenants.list():
        key = world.registry.keys.add(
            tenant.name,
            scopes=["serve"],
            tenants=[tenant.name],
            default_tenant=tenant.name,
            actor="test",
        )
        found.append((tenant.name, key.secret))
    server.follows(world.registry)
    responses = [
        (name, key, server.http(key).post(PATH, json=body(model=name))) for name, key in found
    ]
    return [
        Member(name, key, tuple(response.json()["choices"][0]["token_ids"]))
        for name, key, response in responses
    ]


def test_a_crowd_gets_what_is_its_own_and_nothing_else(
    server: Running, members: list[Member]
) -> None:
    assert len({member.tokens for member in members}) > TENANTS // 3, (
        "tenants have equal completions"
    )
    draw = random.Random(11)
    kinds = [make for weight, make in KINDS for _ in range(weight)]
    errors, counts = asyncio.run(crowd(server.url, members, kinds, draw))
    assert errors == [], "\n".join(server.lines[-40:])
    assert counts["right"] > REQUESTS // 4 and len(counts) == len(KINDS), counts
    again = server.http(members[0].secret).post(PATH, json=body(model=members[0].name))
    assert tuple(again.json()["choices"][0]["token_ids"]) == members[0].tokens
    ready = server.http(ADMIN).get("/v1/safegene/receipts").json()
    assert (ready["ready"], ready["faults"]) == (True, [])


async def crowd(
    url: str, members: list[Member], kinds: list[Any], draw: random.Random
) -> tuple[list[str], collections.Counter[str]]:
    """The errors, and how many requests of each kind were sent."""
    errors: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    cases = []
    for _ in range(REQUESTS):
        me, other = draw.sample(members, 2)
        cases.append((me, draw.choice(kinds)(me, other, draw)))
    waiting = iter(cases)

    async def user(client: httpx.AsyncClient) -> None:
        for me, case in waiting:
            request = client.build_request(
                case.method, url + case.path, headers=case.headers, content=case.content
            )
            counts[case.kind] += 1
            try:
                response = await client.send(request)
            except httpx.TransportError as error:
                errors.append(f"{case.kind}: {error!r} instead of a response to {case}")
                continue
            errors.extend(
                f"{case.kind}: {problem}: {response.status_code} {response.text[:200]!r} to "
                f"{case.content[:200]!r}"
                for problem in problems_of(me, case, response, members)
            )

    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        await asyncio.gather(*(user(client) for _ in range(AT_ONCE)))
    return errors, counts


def problems_of(
    me: Member, case: Case, response: httpx.Response, members: list[Member]
) -> Iterator[str]:
    """The problems of a response, if any."""
    if response.status_code not in case.statuses:
        yield f"expected {case.statuses}"
    if response.status_code == 200:
        found = response.json()
        if found["model"] != f"{me.name}@1":
            yield f"served by {found['model']}"
        if tuple(found["choices"][0]["token_ids"]) != me.tokens:
            yield f"expected {me.tokens}"
        return
    # A rejection may repeat the request; otherwise it names no tenant and nothing of this machine.
    shown = response.text + str(response.headers)
    for member in members:
        secret = member.secret in shown
        named = f'"{member.name}@' in shown and member.name.encode() not in case.content
        if secret or named:
            yield f"names {member.name}"
    if str(Path.home()) in shown or "registry.sqlite" in shown or "Traceback" in shown:
        yield "names this machine"
