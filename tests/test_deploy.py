"""Cluster files against their schema, against each other and against the project."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from cluster.session import Node, ResourcePlan
from ript_ray.config import Config, load_config

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "cluster" / "deploy"


def job_of(entrypoint: str, command: str = "train") -> Config:
    """The configuration that a job with this command line has."""
    words = shlex.split(entrypoint)
    assert words[:4] == ["python", "launch.py", command, "--config"]
    return load_config(ROOT / words[4], words[5:])


def assert_fits(config: Config, nodes: list[Node]) -> None:
    """The job has room on these nodes, and its learners use the GPUs that are there for them."""
    ResourcePlan.of(config.scaling).check(nodes)
    assert config.scaling.learners * config.scaling.learner_gpus == sum(node.gpus for node in nodes)


def test_the_file_for_ray_up_follows_rays_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    cluster = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"max_worker": 1}, schema)
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] in kinds
    assert {kind.get("labels", {}).get("role") for kind in kinds.values()} == {None, "rollout", "learner"}
    assert sum(kind["max_workers"] for kind in kinds.values()) <= cluster["max_workers"]


def test_the_command_in_the_file_for_ray_up_fits_the_nodes() -> None:
    text = (DEPLOY / "ray-up.yaml").read_text()
    (command,) = re.findall(r"^#   (python .*\\\n(?:#     .*\n)+)", text, re.MULTILINE)
    kinds = yaml.safe_load(text)["available_node_types"]
    nodes = [
        Node(kind["resources"]["CPU"], kind["resources"].get("GPU", 0), kind.get("labels", {}))
        for kind in kinds.values()
        for _ in range(kind["min_workers"])
    ]
    config = job_of(re.sub(r"\\\n#", "", command), "submit")
    assert_fits(config, nodes)
    assert config.run.dir is not None
    assert Path(config.run.dir).is_absolute()


def test_the_kuberay_job_runs_this_project_with_labels_that_exist() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == version("ray")
    config = job_of(job["spec"]["entrypoint"])
    assert config.run.resume
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for name, labels in (("rollout", config.scaling.actor_labels), ("learner", config.scaling.learner_labels)):
        assert groups[name]["labels"] == labels
        assert groups[name]["minReplicas"] <= groups[name]["replicas"] <= groups[name]["maxReplicas"]
    nodes = []
    for group in groups.values():
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        nodes += group["replicas"] * [Node(int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0)), group["labels"])]
    assert_fits(config, nodes)
    for group in (spec["headGroupSpec"], *groups.values()):
        assert "labels" not in group["rayStartParams"]  # KubeRay refuses them there
        pod: dict[str, Any] = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (driver,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    kept = next(mount["mountPath"] for mount in driver["volumeMounts"] if mount["name"] == "runs")
    assert str(config.run.dir).startswith(f"{kept}/")


def test_the_container_holds_all_that_the_project_is() -> None:
    lines = (DEPLOY / "Containerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.*)$", lines, re.MULTILINE) for word in line.split()[:-1]}
    for name in copied:
        assert (ROOT / name).exists(), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    modules = {f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"]}
    assert packages | modules | {"pyproject.toml", project["project"]["readme"]} <= copied
    job = yaml.safe_load((DEPLOY / "kuberay-rayjob.yaml").read_text())["spec"]
    words = job["entrypoint"].split()
    config = words[words.index("--config") + 1]
    assert {Path(config).parts[0], Path(job_of(job["entrypoint"]).policy.checkpoint).parts[0]} <= copied


def test_grafana_is_provisioned_with_the_source_that_the_dashboard_asks() -> None:
    folder = ROOT / "cluster/grafana"
    dashboard = json.loads((folder / "ript_ray.json").read_text())
    (source,) = yaml.safe_load((folder / "provisioning/datasources.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "provisioning/dashboards.yaml").read_text())["providers"]
    assert (provider["type"], Path(provider["options"]["path"]).is_absolute()) == ("file", True)
    choices = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert choices["datasource"]["query"] == source["type"] == "prometheus"
    for asked in [dashboard["panels"], *(panel["targets"] for panel in dashboard["panels"])]:
        assert all(part["datasource"] == {"type": source["type"], "uid": "${datasource}"} for part in asked)
    for panel in dashboard["panels"]:
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references), panel["title"]
        assert all('{run=~"$run"}' in target["expr"] for target in panel["targets"])


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    load_config(file, [])
