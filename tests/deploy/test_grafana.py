"""The dashboards: their JSON is what the sources build, and no panels overlap."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana import build
from deploy.grafana.pictures import with_gaps

FOLDER = Path(build.__file__).parent
BOARDS = {path.stem: json.loads(path.read_text()) for path in build.FOLDER.glob("*.json")}


def test_what_is_checked_in_is_what_the_sources_build() -> None:
    assert build.stale() == [], "run `python -m deploy.grafana.build`"
    assert build.main(["--check"]) == 0


def test_a_stale_dashboard_is_named_and_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "old.json").write_text("{}")
    assert build.main(["--check"]) == 1
    assert "old.json is stale" in capsys.readouterr().err
    (tmp_path / "old.json").unlink()
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    assert build.main(["--chek"]) == 2


def test_a_picture_has_no_line_where_there_is_no_series() -> None:
    at, values = with_gaps([(0.0, "1"), (2.0, "1"), (8.0, "0"), (10.0, "0")], 2.0)
    assert at == [0.0, 2.0, 6.0, 8.0, 10.0]
    assert values == pytest.approx([1.0, 1.0, float("nan"), 0.0, 0.0], nan_ok=True)
    assert with_gaps([], 2.0) == ([], [])


def test_there_are_three_with_distinct_ids() -> None:
    assert {board["uid"] for board in BOARDS.values()} == {
        "safegene-fleet",
        "safegene-tenant",
        "safegene-engine",
    }


@pytest.mark.parametrize("name", BOARDS)
def test_panels_are_described_and_do_not_overlap(name: str) -> None:
    panels: list[dict[str, Any]] = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["options"] is not None
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == sorted(set(refs))
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        side_by_side = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert side_by_side or below, (one, other)


def test_provisioning_names_the_source_and_the_folder_that_compose_mounts() -> None:
    sources = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yml").read_text())
    assert [source["uid"] for source in sources["datasources"]] == ["prometheus"]
    providers = yaml.safe_load((FOLDER / "provisioning/dashboards/safegene.yml").read_text())
    assert providers["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"
