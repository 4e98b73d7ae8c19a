"""A build on a real Ray cluster of this machine: workers die and come again, the bytes are those of one process."""

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from secondcast.cache_builder.build import result_of
from secondcast.commands.build.crew import Crew
from secondcast.storage_schemas.errors import BadSettings, MissingExtra, WorkerFailed
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from tests.cache_builder.building import build_cache, data_files
from tests.cache_builder.workers.test_many_workers import LONG, committed, many_prompts, prepare

pytest.importorskip("ray", reason="the extra `ray` is not installed")
from secondcast.cache_builder.workers.ray import _check_room, run_on_ray  # after the check for Ray

__all__ = ["many_prompts"]


def ancestors(process: Path) -> list[int]:
    found = []
    while process.name != "0":
        # After the name, which is in brackets and may hold anything, come the state and the parent.
        process = process.parent / (process / "stat").read_text().rpartition(")")[2].split()[1]
        found.append(int(process.name))
    return found


def builders() -> list[int]:
    """Process ids of the actors of this process's own cluster: others may run on the machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if process.read_bytes().startswith(b"ray::Builder") and os.getpid() in ancestors(process.parent):
                found.append(int(process.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_worker_killed_in_mid_build_comes_again_and_the_bytes_are_those_of_one(tmp_path, dev_teacher, many_prompts):
    writer, job = prepare(tmp_path / "c", dev_teacher, many_prompts)
    killed: list[int] = []
    ended = threading.Event()

    def kill_one_when_two_shards_are_there():
        while committed(tmp_path / "c") < 2:
            if ended.wait(0.01):
                return
        killed.extend(builders()[:1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one_when_two_shards_are_there)
    killer.start()
    try:
        peaks = run_on_ray("local", writer, job, workers=2, progress=Silent())
    finally:
        ended.set()
        killer.join()
    assert killed and killed[0] not in builders()
    assert result_of(writer, peaks).finished and verify(tmp_path / "c", Silent()).problems == ()
    build_cache(tmp_path / "one", dev_teacher, many_prompts, **LONG)
    assert data_files(tmp_path / "c") == data_files(tmp_path / "one")


@pytest.mark.slow
def test_a_workers_error_ends_the_build_in_its_own_words(tmp_path, dev_teacher, many_prompts):
    writer, job = prepare(tmp_path / "c", dev_teacher, many_prompts)
    (tmp_path / "c" / "prompts.offsets").write_bytes(b"")
    with pytest.raises(WorkerFailed, match=f"a worker on Ray: .*{tmp_path}/c/prompts.offsets has 0 bytes"):
        run_on_ray("local", writer, job, workers=1, progress=Silent())


def test_more_workers_than_the_cluster_has_room_for_are_refused():
    _check_room(2, {"num_cpus": 2}, gpus=0, cpus=5)
    with pytest.raises(BadSettings) as caught:
        _check_room(3, {"num_cpus": 2}, gpus=0, cpus=5)
    assert str(caught.value) == (
        "--workers is 3, the Ray cluster has room for 2 (5 CPUs at 2 threads a worker): give --workers 2, or fewer "
        "--threads"
    )
    with pytest.raises(
        BadSettings, match=r"--workers is 9, the Ray cluster has room for 8 \(8 GPUs\): give --workers 8"
    ):
        _check_room(9, {"num_gpus": 1}, gpus=8, cpus=64)


def test_an_address_without_a_cluster_is_named_at_once(tmp_path, dev_teacher, many_prompts):
    writer, job = prepare(tmp_path / "c", dev_teacher, many_prompts)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{taken.getsockname()[1]}"
        for address, reason in ((dead, "Connection refused"), ("nowhere", "expected local, auto, host:port")):
            with pytest.raises(BadSettings, match=f"--ray {address}: no cluster answers there .*{reason}"):
                run_on_ray(address, writer, job, workers=None, progress=Silent())


def test_a_device_is_not_named_beside_ray():
    crew = Crew(stage="all", workers=None, worker=None, wait=None, ray="local", threads=None)
    with pytest.raises(BadSettings, match="--device cuda and --ray do not go together: Ray gives each worker a GPU"):
        crew.device("cuda")


def test_without_ray_the_extra_is_named(tmp_path, dev_teacher, many_prompts, monkeypatch):
    writer, job = prepare(tmp_path / "c", dev_teacher, many_prompts)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra) as caught:
        run_on_ray("local", writer, job, workers=1, progress=Silent())
    assert str(caught.value) == "--ray was given and ray is not installed: pip install 'secondcast[ray]'"
