"""What is beside the package: files that Ray's own tools read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.house.source import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "cluster-configs").glob("*.yaml")), ids=lambda path: path.name)
def test_cluster_files_follow_rays_own_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "no_such_field": 1}, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    workers = [one.get("max_workers", 0) for name, one in types.items() if name != config["head_node_type"]]
    assert sum(workers) <= config["max_workers"]


@pytest.mark.parametrize("path", sorted((ROOT / "cluster-configs").glob("*.yaml")), ids=lambda path: path.name)
def test_what_cluster_files_run_exists(path: Path) -> None:
    for name in re.findall(r"distckpt/((?:examples|benchmarks)/[\w/]+\.py)", path.read_text()):
        assert (ROOT / name).is_file(), f"{path.name} runs {name}"


def test_a_cluster_file_for_google_cloud_is_there() -> None:
    import yaml

    providers = [
        yaml.safe_load(path.read_text())["provider"]["type"] for path in (ROOT / "cluster-configs").glob("*.yaml")
    ]
    assert "gcp" in providers
