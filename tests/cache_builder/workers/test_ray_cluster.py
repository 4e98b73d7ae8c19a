"""What a worker asks of a Ray cluster: GPUs unless CPUs were named, whatever the cluster has at the moment."""

import socket
import sys

import pytest

from secondcast.cache_builder.workers.ray_cluster import ClusterResources, connected, read_runtime_env
from secondcast.storage_schemas.errors import MissingExtraError, SettingsError

pytest.importorskip("ray", reason="the extra `ray` is not installed")

GPUS, NONE = {"GPU": 4.0, "CPU": 10.0}, {"CPU": 6.0}


@pytest.mark.parametrize(
    ("resources", "device", "threads", "options", "places"),
    [
        (GPUS, "auto", None, {"num_cpus": 1, "num_gpus": 1}, 4),
        (GPUS, "cuda", 5, {"num_cpus": 5, "num_gpus": 1}, 2),
        (GPUS, "cpu", 3, {"num_cpus": 3}, 3),
        (NONE, "cpu", None, {"num_cpus": 1}, 6),
        # Asked for all the same: a cluster that grows starts GPU machines for it.
        (NONE, "cuda", 8, {"num_cpus": 8, "num_gpus": 1}, 0),
        ({}, "cpu", 64, {"num_cpus": 64}, 0),
    ],
)
def test_a_worker_asks_for_what_it_needs_and_not_for_what_is_there(resources, device, threads, options, places):
    resources = ClusterResources.of(resources, "head:6379", device, threads)
    assert (resources.options, resources.places) == (options, places)


def test_a_cluster_without_gpus_is_used_on_cpus_only_when_told_so():
    with pytest.raises(SettingsError) as caught:
        ClusterResources.of(NONE, "auto", "auto", None)
    assert str(caught.value) == (
        "--ray auto: the cluster has no GPU at this moment (6 CPUs): give --device cuda to wait until it has one, or "
        "--device cpu to build on CPUs"
    )
    with pytest.raises(SettingsError, match=r"^--ray local: .* moment \(6 CPUs\): give --device cpu to build on CPUs$"):
        ClusterResources.of(NONE, "local", "auto", None)


@pytest.mark.parametrize(
    ("resources", "device", "threads", "message"),
    [
        (NONE, "cuda", None, "asks for a GPU and 1 CPU, this machine has 0 GPUs and 6 CPUs: give --device cpu"),
        (NONE, "cpu", 7, "a worker asks for 7 CPUs, this machine has 0 GPUs and 6 CPUs: give --threads 6"),
        (GPUS, "cuda", 11, "a worker asks for a GPU and 11 CPUs, this machine has 4 GPUs and 10 CPUs: give --threads"),
    ],
)
def test_what_this_machine_can_never_place_is_refused_at_once(resources, device, threads, message):
    with pytest.raises(SettingsError, match=f"^--ray local: .*{message}"):
        ClusterResources.of(resources, "local", device, threads)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[working_dir", "while parsing a flow sequence"),
        ("- pip\n", "expected keys and values, found list"),
        ("", "expected keys and values, found NoneType"),
        ("env_vars: {A: 1}", "runtime_env\\['env_vars'\\] must be of type Dict"),
        ("\0", "unacceptable character"),
    ],
)
def test_a_file_that_is_no_runtime_environment_is_refused_in_one_line(text, reason, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(
        SettingsError, match=rf"^--ray-runtime-env .*r.yaml is no runtime environment \({reason}"
    ) as caught:
        read_runtime_env(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        SettingsError, match=r"none.yaml is no runtime environment \(No such file or directory\): give a"
    ):
        read_runtime_env(tmp_path / "none.yaml")


def test_a_runtime_environment_is_read_from_yaml_and_json(tmp_path):
    (tmp_path / "r.yaml").write_text("env_vars:\n  A: '1'\n")
    (tmp_path / "r.json").write_text('\ufeff{"env_vars": {"A": "1"}}')
    for name in ("r.yaml", "r.json"):
        assert read_runtime_env(tmp_path / name) == {"env_vars": {"A": "1"}}


def test_an_address_without_a_cluster_is_named_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{taken.getsockname()[1]}"
        for address, reason in ((dead, "Connection refused"), ("nowhere", "expected local, auto, host:port")):
            with (
                pytest.raises(SettingsError, match=f"--ray {address}: no cluster answers there .*{reason}"),
                connected(address, None),
            ):
                pass


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError) as caught, connected("local", None):
        pass
    assert str(caught.value) == "--ray was given and ray is not installed: pip install 'secondcast[ray]'"
