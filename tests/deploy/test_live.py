"""A live Prometheus and Alertmanager over a server's metrics: do expressions return data, and do
alerts arrive? The values are made up (metrics_exporter); test_metrics_server queries a real server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from metrics_exporter import TENANTS, World, world

from deploy.grafana import pictures
from deploy.grafana.pictures import PictureError
from deploy.prometheus import live
from deploy.prometheus.expressions import Expression
from deploy.prometheus.page import page
from deploy.prometheus.stack import Stack, StackError, running


@pytest.fixture(scope="module")
def shown() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture(scope="module")
def stack(shown: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with running([shown.url], folder, key="secret", fast=True) as made:
        made.until("a scrape", lambda: made.query("safegene_build_info"))
        yield made


def test_every_expression_returns_data(stack: Stack) -> None:
    assert live.check(stack, tenant=TENANTS[0]) == []


def test_what_does_not_exist_or_stays_empty_is_reported(stack: Stack) -> None:
    invented = Expression("x.json", "panel", "Title", "safegene_invented_total / 2")
    assert live.unknown(stack, [invented]) == [
        "x.json: panel 'Title': no series safegene_invented_total"
    ]
    missing = Expression("x.json", "panel", "Title", 'safegene_gain_norm{tenant="$tenant"}')
    assert live.empty(stack, [missing], tenant=TENANTS[0]) == []
    assert len(live.empty(stack, [missing], tenant="missing")) == 1
    assert live.empty(stack, [missing], tenant="missing", unseen=["gain_norm"]) == []


def test_a_query_that_prometheus_rejects_is_reported_in_its_words(stack: Stack) -> None:
    with pytest.raises(StackError, match="parse error"):
        stack.query("sum(")


def test_the_page_has_a_line_for_every_tenant(stack: Stack) -> None:
    def whole() -> str:
        text = page(stack)
        return text if all(tenant in text for tenant in TENANTS) else ""

    heading, *lines = stack.until("all tenants", whole).splitlines()
    assert heading.split()[:2] == ["tenant", "served"]
    assert [line.split()[1] for line in lines[: len(TENANTS)]] == ["r@1"] * len(TENANTS)


def test_pictures_are_drawn(stack: Stack, tmp_path: Path) -> None:
    path = pictures.picture("safety", stack, TENANTS[0], 1, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PictureError, match="tenant: none of Coefficients"):
        pictures.picture("tenant", stack, "missing", 1, tmp_path)
    with pytest.raises(PictureError, match="no line chart 'Alerts' on fleet"):
        pictures.panel_of("fleet", "Alerts")


@pytest.mark.parametrize(
    ("metric", "labels", "value", "alert"),
    [
        (
            "safegene_coefficient",
            {"tenant": TENANTS[0], "stat": "mean"},
            0.01,
            "SafegeneTenantWeak",
        ),
        ("safegene_gain_norm", {"tenant": TENANTS[1]}, 0.0, "SafegeneTenantWithoutSafety"),
        ("safegene_registry_lag_seconds", {}, 90.0, "SafegeneReplicaLagging"),
        ("safegene_sites", {"rank": "1", "state": "applied"}, 12.0, "SafegeneSitesMissing"),
    ],
)
def test_an_alert_reaches_the_pager_and_is_resolved(
    shown: World, stack: Stack, metric: str, labels: dict[str, str], value: float, alert: str
) -> None:
    def delivered(status: str) -> list[dict[str, str]]:
        return [
            notice["annotations"]
            for notice in stack.notices
            if notice["path"] == "/pager"
            and notice["status"] == status
            and notice["labels"]["alertname"] == alert
        ]

    healthy = stack.until(metric, lambda: stack.query(f"max({metric})"))[0].value
    shown.set_value(metric, value, **labels)
    (words, *_) = stack.until(f"{alert} at the pager", lambda: delivered("firing"))
    assert words["runbook_url"] == f"docs/runbook.md#{alert.lower()}"
    assert "error" not in words["summary"] + words["description"]
    shown.set_value(metric, healthy, **labels)
    stack.until(f"{alert} resolved", lambda: delivered("resolved"))


def test_a_prometheus_that_cannot_start_says_why(shown: World, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a directory")
    with pytest.raises(StackError, match="did not start"), running([shown.url], tmp_path):
        pass


def test_the_command_says_what_is_wrong(
    shown: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert live.main(["--target", shown.url, "--seconds", "0", "--page"]) == 0
    assert "every expression is known and returns data" in capsys.readouterr().out
    missing = tmp_path / "no-key"
    assert live.main(["--target", shown.url, "--key-file", str(missing)]) == 1
    assert str(missing) in capsys.readouterr().err
