"""The deployment files agree with each other and with the metrics that the server exports."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/molex.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLE_QUERIES = [variable["definition"] for variable in DASHBOARD["templating"]["list"]]
PROMQL_LABELS = {"le"}


@pytest.fixture(scope="module")
def exported():
    """Labels of every exported series by its name, once each metric has a sample."""
    metrics = Metrics()
    functions = dict.fromkeys(("waiting", "running", "registered", "resident"), lambda: 1)
    metrics.watch_base("b", **functions, pages={"free": lambda: 1}, memory={"weights": lambda: 1})
    metrics.watch_gpu(allocated=lambda: 1, peak=lambda: 1)
    for stage in ("queue", "tokenize", "forward"):
        metrics.stage("/v1/classify", stage, 0.1)
    metrics.request("/v1/classify", 200, 0.1)
    metrics.first_token("b", 0.1)
    metrics.next_token("b", 0.1)
    metrics.batch("b", tokens=1, adapters=1, layers=1)
    metrics.adapter_load("b", "loaded")
    metrics.cold_load("b", "loaded", 0.1)
    metrics.adapter_eviction("b")
    metrics.routed("b", 0, 1)
    families = text_string_to_metric_families(metrics.render().decode())
    samples = (sample for family in families for sample in family.samples)
    # When a series was created is said in a series of its own, which nobody plots.
    return {s.name: set(s.labels) for s in samples if not s.name.endswith("_created")}


def series_of(query):
    return set(re.findall(r"\b(?:molex|process)_[a-z_]+", query))


def labels_of(query):
    """Labels that a query groups by, matches on or lists."""
    grouped = ",".join(re.findall(r"\bby \(([^)]*)\)", query))
    listed = ",".join(re.findall(r"label_values\(\w+, (\w+)\)", query))
    matched = re.findall(r"(\w+)=~?\"", query)
    return {name.strip() for name in f"{grouped},{listed}".split(",") if name.strip()} | set(matched)


@pytest.mark.parametrize("query", QUERIES + VARIABLE_QUERIES)
def test_a_query_uses_series_and_labels_that_exist(query, exported):
    names = series_of(query)
    assert names
    assert names <= exported.keys()
    scraped = {"job", "instance"}
    for name in names:
        assert labels_of(query) <= exported[name] | PROMQL_LABELS | scraped


def test_every_metric_of_the_server_is_on_the_dashboard(exported):
    shown = set().union(*map(series_of, QUERIES))
    stem = re.compile(r"_(bucket|sum|count)$")
    own = {stem.sub("", name) for name in exported if name.startswith("molex_")}
    assert own == {stem.sub("", name) for name in shown if name.startswith("molex_")}


def test_panels_use_known_template_variables():
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$([a-z]+)", json.dumps(PANELS)))
    assert used == known
    assert {panel["repeat"] for panel in PANELS if "repeat" in panel} <= known


def test_panels_are_distinct_and_do_not_overlap():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not taken & cells
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_dashboard_names_the_provisioned_datasource():
    provisioned = _yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    known = {(source["type"], source["uid"]) for source in provisioned}
    targets = [target for panel in PANELS for target in panel["targets"]]
    users = PANELS + targets + DASHBOARD["templating"]["list"]
    assert {(user["datasource"]["type"], user["datasource"]["uid"]) for user in users} == known


def test_grafana_reads_dashboards_where_compose_mounts_them():
    (provider,) = _yaml("grafana/provisioning/dashboards/molex.yml")["providers"]
    mounts = _mounts("grafana")
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_prometheus_scrapes_the_server_by_its_service_name():
    config = _yaml("prometheus/prometheus.yml")
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets["molex"] == [f"molex:{Settings.model_fields['port'].default}"]
    (source,) = _yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_compose_waits_for_health_and_pins_images():
    services = COMPOSE["services"]
    assert services.keys() == {"molex", "prometheus", "grafana"}
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        for needed in service.get("depends_on", {}).values():
            assert needed == {"condition": "service_healthy"}
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    sources = [mount for name in services for mount in _mounts(name) if mount.startswith("./deploy")]
    assert all((ROOT / source).exists() for source in sources)


def test_the_compose_environment_is_what_the_server_reads(monkeypatch):
    for name, value in COMPOSE["services"]["molex"]["environment"].items():
        monkeypatch.setenv(name, value)
    entrypoint = json.loads(re.search(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), re.M)[1])
    settings = Settings(host=entrypoint[entrypoint.index("--host") + 1])
    mounts = _mounts("molex")
    assert set(settings.bases.values()) == {
        f"{mounts['./.models']}/{folder}" for folder in ("e5-small", "smollm2-135m-instruct")
    }
    assert str(settings.adapters) == mounts["./examples/adapters"]


def test_the_image_is_pinned_and_does_not_run_as_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    images = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert len(images) == 2
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image) for image in images)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001"]
    assert any("/readyz" in line for line in lines)


def _yaml(path):
    return yaml.safe_load((DEPLOY / path).read_text())


def _mounts(service):
    return dict(mount.split(":")[:2] for mount in COMPOSE["services"][service]["volumes"])
