"""Prometheus and Alertmanager on loopback with this folder's files, for checks and pictures.

Not for production: two seconds between scrapes, and a webhook in this process as receiver.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import yaml

from deploy.check import tools

HERE = Path(__file__).parent
START_S = 60.0


class StackError(RuntimeError):
    """Prometheus or Alertmanager did not start, or rejected a query."""


@dataclass(frozen=True)
class Sample:
    """Labels and latest value of one series."""

    labels: dict[str, str]
    value: float


@dataclass
class Stack:
    """Prometheus at `url`, and the alerts that Alertmanager has delivered so far.

    Each of `notices` has the receiver's `path`, `status`, `labels` and `annotations`.
    """

    url: str
    notices: list[dict[str, Any]] = field(default_factory=list)
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30), repr=False)

    def get(self, path: str, **params: str) -> Any:
        """Query Prometheus's API below /api/v1. Raises: StackError."""
        try:
            body = self.http.get(f"{self.url}/api/v1/{path}", params=params).json()
        except (httpx.HTTPError, ValueError) as error:
            raise StackError(f"no response to {path} from {self.url}: {error}") from error
        if body["status"] != "success":
            raise StackError(f"{params or path}: {body['error']}")
        return body["data"]

    def query(self, expr: str) -> list[Sample]:
        """Current samples; a scalar is one sample without labels. Raises: StackError."""
        data = self.get("query", query=expr)
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(one["metric"], float(one["value"][1])) for one in data["result"]]

    def history(self, expr: str, begin: float, end: float, step_s: float) -> list[Any]:
        """Series over time as {"metric": labels, "values": [[Unix seconds, "value"], ...]}."""
        span = {"start": str(begin), "end": str(end), "step": str(step_s)}
        found: list[Any] = self.get("query_range", query=expr, **span)["result"]
        return found

    def names(self) -> set[str]:
        """Names of all series."""
        return set(self.get("label/__name__/values"))

    def firing(self) -> dict[str, list[dict[str, str]]]:
        """Labels of every firing alert, by name."""
        found: dict[str, list[dict[str, str]]] = {}
        for alert in self.get("alerts")["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        return found

    def until(self, what: str, condition: Any, timeout_s: float = 180.0) -> Any:
        """Wait for the first true value of `condition()`. Raises: StackError naming `what`."""
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            if time.monotonic() > end:
                raise StackError(f"{what}: not within {timeout_s:.0f} s; firing: {self.firing()}")
            time.sleep(0.5)
        return found


@contextmanager
def running(
    targets: Sequence[str],
    folder: Path,
    *,
    key: str | None = None,
    every_s: float = 2.0,
    fast: bool = False,
) -> Iterator[Stack]:
    """Run Prometheus over `targets` (URLs of one registry's replicas), and Alertmanager.

    `folder` is empty and takes their files; `key` may read /metrics. With `fast`, alerts fire
    without waiting (`for`) and offsets are removed. Raises: StackError; ToolsMissingError.
    """
    programs = tools.find_all(["prometheus", "alertmanager"])
    folder = folder.resolve()
    web, mail = free_ports(2)
    stack = Stack(f"http://127.0.0.1:{web}")
    with ExitStack() as ends:
        ends.enter_context(stack.http)
        hook = ends.enter_context(_webhook(stack.notices))
        _write_alertmanager(folder, hook, fast)
        if (templates := tools.alertmanager_templates(programs["alertmanager"])) is not None:
            (folder / "share").symlink_to(templates)
        _write_prometheus(folder, targets, mail, key, every_s, fast)
        ends.enter_context(
            _process(
                [
                    *(str(programs["alertmanager"]), f"--config.file={folder}/alertmanager.yml"),
                    *(f"--storage.path={folder}/alertmanager", "--cluster.listen-address="),
                    f"--web.listen-address=127.0.0.1:{mail}",
                ],
                folder / "alertmanager.log",
                f"http://127.0.0.1:{mail}/-/ready",
            )
        )
        ends.enter_context(
            _process(
                [
                    *(str(programs["prometheus"]), f"--config.file={folder}/prometheus.yml"),
                    *(
                        f"--storage.tsdb.path={folder}/data",
                        f"--web.listen-address=127.0.0.1:{web}",
                    ),
                ],
                folder / "prometheus.log",
                f"{stack.url}/-/ready",
            )
        )
        yield stack


def free_ports(count: int) -> list[int]:
    """Free ports below the range of outgoing connections."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = random.SystemRandom().randrange(15000, 30000)
            sock = held.enter_context(socket.socket())
            with suppress(OSError):
                sock.bind(("127.0.0.1", port))
                found.append(port)
    return found


def _write_prometheus(
    folder: Path, targets: Sequence[str], mail: int, key: str | None, every_s: float, fast: bool
) -> None:
    config = yaml.safe_load((HERE / "prometheus.yml").read_text())
    interval = f"{round(every_s * 1000)}ms"
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{mail}"]
    job = next(one for one in config["scrape_configs"] if one["job_name"] == "safegene")
    parts = [urlparse(target) for target in targets]
    job["scheme"] = parts[0].scheme
    job["static_configs"] = [{"targets": [part.netloc for part in parts]}]
    job["scrape_timeout"] = interval
    if key is None:
        del job["authorization"]
    else:
        (folder / "key").write_text(key)
        (folder / "key").chmod(0o600)
        job["authorization"]["credentials_file"] = str(folder / "key")
    config["scrape_configs"] = [job]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copytree(HERE / "rules", folder / "rules")
    if fast:
        for path in (folder / "rules").glob("*.yml"):
            rules = re.sub(r"^ +for: .*\n", "", path.read_text(), flags=re.MULTILINE)
            path.write_text(re.sub(r" offset \w+", "", rules))


def _write_alertmanager(folder: Path, hook: str, fast: bool) -> None:
    config = yaml.safe_load((HERE / "alertmanager.yml").read_text())
    for receiver in config["receivers"]:
        for webhook in receiver["webhook_configs"]:
            webhook["url"] = hook + urlparse(webhook["url"]).path
    if fast:
        for route in (config["route"], *config["route"]["routes"]):
            route |= {"group_wait": "1s", "group_interval": "1s"}
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))


@contextmanager
def _webhook(notices: list[dict[str, Any]]) -> Iterator[str]:
    class Hook(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            notices.extend({**alert, "path": self.path} for alert in body["alerts"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def _process(command: list[str], log: Path, ready: str) -> Iterator[None]:
    """Run `command`, once `ready` responds, until the block ends. Raises: StackError."""
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=log.parent, stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + START_S
        while not _responds(ready):
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text().splitlines()[-5:]
                raise StackError("\n  ".join([f"{command[0]} did not start:", *tail]))
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _responds(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
