"""Manifests and compose files: valid by their schemas, and in agreement with the image and the server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pat_serve.server.http.policy import Policy

ROOT = Path(__file__).parents[1]
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def one(kind: str) -> dict[str, Any]:
    [found] = [manifest for manifest in MANIFESTS if manifest["kind"] == kind]
    return found


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
@pytest.mark.parametrize("version", ["1.32", kubernetes_validate.latest_version()])
def test_manifests_are_valid(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_see_a_mistake() -> None:
    wrong = json.loads(json.dumps(one("Deployment")))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.32", strict=True)


def test_selectors_and_ports_agree() -> None:
    template = one("Deployment")["spec"]["template"]
    labels = template["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert one(kind)["spec"]["selector"]["matchLabels"] == labels
    assert one("Service")["spec"]["selector"] == labels
    [container] = template["spec"]["containers"]
    [port] = container["ports"]
    assert one("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^EXPOSE (\d+)$", dockerfile, re.M) == [str(port["containerPort"])]
    assert re.findall(r"^USER (\d+):", dockerfile, re.M)[0] == str(template["spec"]["securityContext"]["runAsUser"])


def test_probes_ask_open_paths_and_the_grace_holds_the_drain() -> None:
    pod = one("Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in Policy().open_paths
    drain_s = float(container["args"][container["args"].index("--shutdown-timeout") + 1])
    assert pod["terminationGracePeriodSeconds"] > drain_s + container["lifecycle"]["preStop"]["sleep"]["seconds"]


def test_what_compose_mounts_is_there_and_its_prometheus_finds_the_server() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    [job] = yaml.safe_load((ROOT / "monitoring/prometheus.compose.yml").read_text())["scrape_configs"]
    [[target]] = [entry["targets"] for entry in job["static_configs"]]
    name, port = target.split(":")
    assert COMPOSE["services"][name]["ports"][0].endswith(f":{port}")
    assert "--public-metrics" in COMPOSE["services"][name]["command"]
    grace_s = float(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s"))
    assert grace_s > Policy().shutdown_timeout_s
    source = yaml.safe_load((ROOT / "monitoring/grafana/provisioning/datasources/prometheus.yml").read_text())
    assert "prometheus" in source["datasources"][0]["url"]


def test_compose_gives_no_empty_keys() -> None:
    """The server refuses a variable that is there and empty; without a value it is there when the caller has it."""
    environment = COMPOSE["services"]["server"]["environment"]
    assert environment["PAT_SERVE_API_KEYS"] is None


def test_the_image_takes_its_packages_from_where_it_is_told() -> None:
    """The build argument stands in the stage from which all stages that call pip begin."""
    base = (ROOT / "Dockerfile").read_text().partition(" AS base\n")[2].partition("\nFROM ")[0]
    assert "\nARG PIP_INDEX_URL\n" in base
