"""monitoring/: files fit together, names exist, rules fire; promtool checks them where it is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import metrics
from tests import REPOSITORY

yaml = pytest.importorskip("yaml")

MONITORING = REPOSITORY / "monitoring"
QUESTIONS = ("Where do hits come from?", "How fast, against the link?", "How full is the tier?", "Is it healthy?")


def load(name: str) -> Any:
    return yaml.safe_load((MONITORING / name).read_text())


def board() -> Any:
    return json.loads((MONITORING / "grafana" / "xmem.json").read_text())


def rules() -> list[Any]:
    return [rule for group in load("rules.yml")["groups"] for rule in group["rules"]]


def board_queries() -> list[str]:
    return [target["expr"] for panel in board()["panels"] for target in panel.get("targets", [])]


def queries() -> list[str]:
    return [*board_queries(), *(rule["expr"] for rule in rules())]


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\bsglang:\w+", query))


def sglang_series() -> set[str]:
    """Names of SGLang's own series, from its sources."""
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs SGLang's sources")
    text = (Path(found.submodule_search_locations[0]) / "srt/observability/metrics_collector.py").read_text()
    names = set(re.findall(r'name="(sglang:\w+)"', text))
    return names | {f"{name}_{suffix}" for name in names for suffix in ("bucket", "sum", "count")}


def test_every_name_exists() -> None:
    used = set().union(*map(names_in, queries()))
    ours = {name for name in used if name.startswith(metrics.PREFIX)}
    assert ours <= set(metrics.series())
    assert used - ours <= sglang_series()
    assert used - ours


def test_a_dead_name_is_noticed() -> None:
    """Negative control: a name that the exporter does not have is found, also inside a function."""
    assert not names_in("sum(rate(sglang:xmem_loads_total[5m]))") <= set(metrics.series())


def test_the_board_shows_every_series() -> None:
    shown = set().union(*map(names_in, board_queries()))
    hidden = {
        metrics.PREFIX + metrics.INFO.name,
        metrics.PREFIX + "copy_bytes_bucket",
        metrics.PREFIX + "copy_bytes_count",
    }
    assert set(metrics.series()) - hidden <= shown


def test_labels_are_those_of_the_exporter() -> None:
    values = {family.name: (family.label, family.known) for family in metrics.FAMILIES}
    for query in queries():
        for name, labels in re.findall(r"(sglang:xmem_\w+)\{([^}]*)\}", query):
            for label, value in re.findall(r'(\w+)="([a-z]+)"', labels):
                family = values.get(name.removeprefix(metrics.PREFIX))
                expected = ("direction", metrics.DIRECTIONS) if family is None else family
                assert label == expected[0]
                assert value in expected[1]


def test_one_row_per_question() -> None:
    assert tuple(panel["title"] for panel in board()["panels"] if panel["type"] == "row") == QUESTIONS


def test_six_alerts_that_are_documented() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == 6
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    assert [name for name in names if f"`{name}`" not in text] == []
    tested = {case["alertname"] for test in load("rules_test.yml")["tests"] for case in test["alert_rule_test"]}
    assert tested == set(names)


def test_files_that_are_mounted_exist() -> None:
    services = load("docker-compose.yml")["services"]
    mounts = [mount.split(":")[0] for service in services.values() for mount in service["volumes"]]
    files = [mount for mount in mounts if mount.startswith("./")]
    assert len(files) == 5
    assert all((MONITORING / file).is_file() for file in files)
    (source,) = load("grafana/datasources.yml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in board()["panels"] if "datasource" in panel} == {source["uid"]}
    assert load("prometheus.yml")["rule_files"] == ["rules.yml"]
    assert load("grafana/dashboards.yml")["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of the package prometheus")
def test_promtool_accepts_rules_and_queries(tmp_path: Path) -> None:
    variables = {"$__rate_interval": "1m", "$instance": ".*", "$link": "50"}
    records = []
    for number, query in enumerate(board_queries()):
        for name, value in variables.items():
            query = query.replace(name, value)
        records.append({"record": f"query_{number}", "expr": query})
    path = tmp_path / "board.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": records}]}))
    for arguments in (
        ("check", "config", str(MONITORING / "prometheus.yml")),
        ("check", "rules", str(path)),
        ("test", "rules", str(MONITORING / "rules_test.yml")),
    ):
        done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
