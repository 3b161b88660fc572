"""What a cluster's autoscaler may add, read from where Ray's autoscalers have it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from medtune import growth

CONFIG = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0, "GPU": 0}, "max_workers": 0},
        "large": {"resources": {"CPU": 16, "GPU": 4}, "max_workers": 2},
        "small": {"resources": {"CPU": 8, "GPU": 1}},
    },
}


def test_no_more_machines_than_the_whole_cluster_may_have(monkeypatch):
    monkeypatch.setattr(growth, "autoscaling", lambda: CONFIG)
    assert [machine["GPU"] for machine in growth.addable()] == [4, 4, 1, 1, 1]
    monkeypatch.setattr(growth, "autoscaling", lambda: None)
    assert growth.addable() == []


def test_the_head_is_not_among_them():
    nodes = [
        {"Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Resources": {"CPU": 2.0, "node:__internal_head__": 1.0}},
    ]
    assert growth.head(nodes)["CPU"] == 2 and growth.head(nodes[:1]) == {}


@pytest.fixture
def attached(monkeypatch):
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))


def test_the_file_is_that_of_the_autoscaler_of_this_cluster(attached, tmp_path):
    import ray  # noqa: F401 brings psutil

    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(CONFIG))
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    other = subprocess.Popen([*sleep, "--gcs-address=10.0.0.2:6379", "--autoscaling-config=/nowhere"])
    try:
        assert growth.autoscalers_file() is None
        own = subprocess.Popen([*sleep, "--gcs-address=10.0.0.1:6379", f"--autoscaling-config={path}"])
        try:
            assert growth.autoscalers_file() == path and growth.autoscaling() == CONFIG
        finally:
            own.kill()
            own.wait()
    finally:
        other.kill()
        other.wait()


def raycluster(grows=True):
    def pod(name, **resources):
        return {"spec": {"containers": [{"name": name, "resources": {"requests": resources, "limits": resources}}]}}

    return {
        "metadata": {"name": "medtune-x", "namespace": "lab"},
        "spec": {
            "enableInTreeAutoscaling": grows,
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
                "template": pod("head", cpu="2", memory="8Gi"),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "gpu",
                    "replicas": 0,
                    "minReplicas": 0,
                    "maxReplicas": 4,
                    "rayStartParams": {},
                    "template": pod("worker", cpu="7", memory="24Gi", **{"nvidia.com/gpu": "1"}),
                }
            ],
        },
    }


class Kubernetes:
    """Answers as the API server, with one RayCluster."""

    cluster = raycluster()

    def __init__(self, namespace):
        assert namespace == "lab"

    def get(self, path):
        assert path == "rayclusters/medtune-x"
        return self.cluster


def test_in_a_pod_of_kuberays_what_the_raycluster_says(attached, monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "NAMESPACE", tmp_path / "namespace")
    monkeypatch.setattr("ray.autoscaler._private.kuberay.node_provider.KubernetesHttpApiClient", Kubernetes)
    assert growth.addable() == [], "no pod"
    growth.NAMESPACE.write_text("lab\n")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "medtune-x")
    assert [(machine["CPU"], machine["GPU"]) for machine in growth.addable()] == [(7, 1)] * 4
    monkeypatch.setattr(Kubernetes, "cluster", raycluster(grows=False))
    assert growth.addable() == []
