"""The alerts, the dashboard and the files of `docker/monitoring` name what there is."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.observability.metrics import METRICS
from tests.conftest import REPOSITORY
from tests.containers import COMPOSE

FOLDER = REPOSITORY / "docker" / "monitoring"
LABELS = {name: {*metric.label_names, "instance", "job", "le"} for metric in METRICS for name in [metric.name]}
NAME = re.compile(r"\b(?:maskmerge|process)_[a-z0-9_]+\b")


class Rule(BaseModel):
    """An alerting rule, as Prometheus reads it."""

    model_config = ConfigDict(extra="forbid")

    alert: Annotated[str, Field(pattern="^Maskmerge[A-Za-z]+$")]
    expr: Annotated[str, Field(min_length=1)]
    for_: Annotated[str, Field(alias="for", pattern="^[0-9]+[smhd]$")] = "0s"
    labels: dict[Literal["severity"], Literal["critical", "warning"]]
    annotations: dict[Literal["summary"], str]


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    rules: Annotated[list[Rule], Field(min_length=1)]


class Rules(BaseModel):
    model_config = ConfigDict(extra="forbid")

    groups: list[Group]


def _yaml(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def rules() -> list[Rule]:
    return [rule for group in Rules.model_validate(_yaml("alerts.yml")).groups for rule in group.rules]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return found


def expressions() -> dict[str, str]:
    """The queries of the alerts and of the dashboard, by where they are."""
    found = {rule.alert: rule.expr for rule in rules()}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    return found


def names_in(expression: str) -> set[str]:
    return set(NAME.findall(re.sub(r'"[^"]*"', "", expression)))


def problems(expression: str) -> Iterator[str]:
    """What is wrong with a query as far as it can be told without Prometheus: names, labels, types and brackets."""
    for opening, closing in ("()", "{}", "[]"):
        if expression.count(opening) != expression.count(closing):
            yield f"{opening} and {closing} differ in number"
    plain = re.sub(r'"[^"]*"', '""', expression)
    families = {name: metric for metric in METRICS for name in [metric.name]}
    used: set[str] = set()
    for name in names_in(expression):
        family = families.get(re.sub("_(bucket|sum|count)$", "", name))
        if name.startswith("process_"):
            continue
        if family is None or (name != family.name) != (family.kind == "histogram"):
            yield f"{name} is no series"
            continue
        used |= LABELS[family.name]
        for selector in re.findall(rf"{name}\{{([^}}]*)\}}", plain):
            for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector):
                if label not in LABELS[family.name]:
                    yield f"{name} has no label {label}"
        is_rated = re.search(rf"\b(rate|increase)\(\s*{name}\s*(\{{[^}}]*\}})?\[", plain) is not None
        if is_rated != (family.kind != "gauge"):
            yield f"{name} is a {family.kind}"
    for grouping in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", plain):
        for label in re.findall(r"\w+", grouping):
            if used and label not in used:
                yield f"no series here has the label {label}"


@pytest.mark.parametrize("place", expressions())
def test_queries_name_series_and_labels_that_there_are(place: str) -> None:
    assert list(problems(expressions()[place])) == []


@pytest.mark.parametrize(
    "broken",
    [
        "maskmerge_wokers",
        'sum(maskmerge_workers{tenant="a"})',
        "rate(maskmerge_workers[5m])",
        "maskmerge_jobs_finished_total",
        "maskmerge_job_phase_seconds",
        "sum by (tenent) (rate(maskmerge_jobs_finished_total[5m]))",
        "sum(rate(maskmerge_jobs_finished_total[5m])",
    ],
)
def test_a_query_that_is_wrong_is_found(broken: str) -> None:
    assert list(problems(broken))


def test_what_redis_tells_is_not_added_up_over_instances() -> None:
    for place, expression in expressions().items():
        for name in names_in(expression) - {"process_resident_memory_bytes"}:
            is_shared = not name.startswith("maskmerge_http")
            is_reduced = re.search(r"max without \(instance\)|^(max|min)\(", expression) is not None
            assert is_reduced == is_shared, (place, name)


def test_rules_are_as_prometheus_reads_them() -> None:
    found = rules()
    assert len({rule.alert for rule in found}) == len(found) > 5
    for rule in found:
        named = set(re.findall(r"\$labels\.(\w+)", rule.annotations["summary"]))
        assert not named or named <= set(re.findall(r"\w+", rule.expr)) | {"tenant", "instance"}, rule.alert
    with pytest.raises(ValidationError, match="expression"):
        Rules.model_validate({"groups": [{"name": "a", "rules": [{"alert": "MaskmergeA", "expression": "up"}]}]})


def test_the_dashboard_has_its_panels_side_by_side() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    (variable,) = dashboard()["templating"]["list"]
    assert {panel["datasource"]["uid"] for panel in panels} == {f"${{{variable['name']}}}"}


def test_every_alert_is_in_the_guide() -> None:
    page = (REPOSITORY / "docs" / "monitoring.md").read_text()
    assert set(re.findall(r"^\| `(Maskmerge\w+)`", page, re.MULTILINE)) == {rule.alert for rule in rules()}


def test_the_compose_file_is_one_and_names_files_that_there_are(tmp_path: Path) -> None:
    path = FOLDER / "compose.yml"
    command = [
        str(Path(sys.executable).parent / "check-jsonschema"),
        "--builtin-schema",
        "vendor.compose-spec",
        str(path),
    ]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    described = _yaml("compose.yml")
    files = {name: config["file"] for name, config in described["configs"].items() if "file" in config}
    assert all((COMPOSE.parent / file).is_file() for file in files.values()), files
    for name, service in described["services"].items():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert {config["source"] for config in service["configs"]} <= set(described["configs"])
    assert described["services"]["grafana"]["ports"] == ["127.0.0.1:${MASKMERGE_GRAFANA_PORT:-3000}:3000"]


def test_prometheus_scrapes_the_api_with_the_key_that_compose_gives_it() -> None:
    (scrape,) = _yaml("prometheus.yml")["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["api:8000"]}]
    assert "api" in yaml.safe_load(COMPOSE.read_text())["services"]
    assert scrape["authorization"] == {"credentials_file": "/run/secrets/metrics_key"}
    assert _yaml("compose.yml")["services"]["prometheus"]["secrets"] == ["metrics_key"]
    assert _yaml("prometheus.yml")["rule_files"] == ["alerts.yml"]
