"""A build on a real Ray cluster of this machine: workers die and come again, the bytes are those of one process."""

import os
import signal
import threading
from pathlib import Path

import pytest

from secondcast.cache_builder.build import finish
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.cache_builder.workers import ray as ray_workers
from secondcast.cache_builder.workers.launcher import BuildLauncher
from secondcast.cache_builder.workers.ray import run_on_ray
from secondcast.storage_schemas.errors import SettingsError, WorkerFailedError
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.schema.commits import committed_shards
from tests.cache_builder.building import build_cache, data_files
from tests.cache_builder.workers.test_many_workers import LONG, Notes, committed, many_prompts, prepare

pytest.importorskip("ray", reason="the extra `ray` is not installed")

__all__ = ["many_prompts"]


class Counting(Notes):
    """Notes, and how far all bars came."""

    def __init__(self) -> None:
        super().__init__()
        self.advanced = 0

    def advance(self, count, note=""):
        super().advance(count, note)
        self.advanced += count


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
        peaks = run_on_ray("local", writer, job, device="cpu", workers=2, progress=Silent())
    finally:
        ended.set()
        killer.join()
    assert killed and killed[0] not in builders()
    assert finish(writer, peaks).finished and verify(tmp_path / "c", Silent()).problems == ()
    build_cache(tmp_path / "one", dev_teacher, many_prompts, **LONG)
    assert data_files(tmp_path / "c") == data_files(tmp_path / "one")


@pytest.mark.slow
def test_one_failing_shard_dismisses_nobody_and_the_error_is_said_in_its_own_words(tmp_path, dev_teacher, many_prompts):
    writer, job = prepare(tmp_path / "c", dev_teacher, many_prompts)
    build_cache(tmp_path / "c", dev_teacher, many_prompts, config=WorkerConfig(stage="text", batch_size=2), **LONG)
    numbers = {shard.shard for shard in writer.missing("trajectories")}
    damaged = next(path for path in sorted((tmp_path / "c/embeddings.zarr").rglob("c/**/*")) if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    notes = Counting()
    with pytest.raises(WorkerFailedError) as caught:
        run_on_ray("local", writer, job, device="cpu", workers=2, progress=notes)
    left = numbers - committed_shards(writer.folder, "trajectories")
    # The run with the damaged embedding, of at most two shards; all the others are there.
    assert 1 <= len(left) <= 2
    message = str(caught.value)
    assert message.startswith("a worker on Ray: ") and str(damaged.relative_to(tmp_path / "c")) in message
    assert message.endswith(
        ("; 1 shard is left, what was committed stays", "; 2 shards are left, what was committed stays")
    )
    assert notes.advanced == 2 * (len(numbers) - len(left))
    assert sum("failed, the others continue: " in said for said in notes.said) == 2


@pytest.mark.slow
def test_workers_without_a_place_are_not_waited_for_and_the_runtime_environment_is_theirs(
    tmp_path, dev_teacher, many_prompts, monkeypatch
):
    monkeypatch.setattr(ray_workers, "_PLACE_SECONDS", 0.5)
    (tmp_path / "ray.yaml").write_text(f"env_vars:\n  SECONDCAST_CACHE_HOME: {tmp_path}/home\n")
    writer, job = prepare(tmp_path / "c", dev_teacher, many_prompts)
    notes = Counting()
    how = {"device": "cpu", "workers": 40, "runtime_env": tmp_path / "ray.yaml"}
    peaks = run_on_ray("local", writer, job, progress=notes, **how)
    assert finish(writer, peaks).finished and notes.advanced == 2 * 24
    assert any("of 40 workers are scheduled on the cluster, which had 0 GPUs" in said for said in notes.said)
    # Where a worker remembers the hashes of weights.
    assert any((tmp_path / "home").iterdir())


@pytest.mark.slow
def test_workers_wait_for_gpus_and_never_compute_on_a_cpu_in_their_place(tmp_path, dev_teacher, many_prompts):
    from ray.cluster_utils import Cluster

    writer, job = prepare(tmp_path / "c", dev_teacher, many_prompts)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False})

    class Grows(Counting):
        """The cluster gets its GPU when the build has been told that it waits."""

        def say(self, message):
            super().say(message)
            if "are scheduled on the cluster" in message:
                cluster.add_node(num_cpus=1, num_gpus=1)

    notes = Grows()
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ray_workers, "_PLACE_SECONDS", 0.5)
            with pytest.raises(WorkerFailedError) as caught:
                run_on_ray(cluster.address, writer, job, device="cuda", workers=1, progress=notes)
    finally:
        cluster.shutdown()
    assert notes.said[:2] == [
        "1 worker on Ray, a GPU and 1 CPU each",
        "0 of 1 workers are scheduled on the cluster, which had 0 GPUs and 2 CPUs; the others wait until it grows or "
        "something else ends, each for a GPU and 1 CPU",
    ]
    # The GPU that the cluster promised is none that torch can use.
    assert str(caught.value).startswith("a worker on Ray: --device 'cuda' cannot be used here (")
    assert not committed_shards(writer.folder, "embeddings")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"device": "cuda:1", "ray": "local"},
            "--device cuda:1 and --ray cannot be combined: Ray assigns a GPU to each worker; give --device cuda, cpu, "
            "or auto for GPUs if the cluster has any",
        ),
        (
            {"ray_runtime_env": Path("r.yaml")},
            "--ray-runtime-env r.yaml only applies to workers on Ray: give --ray too",
        ),
    ],
)
def test_flags_that_do_not_go_with_ray_are_refused(flags, message):
    with pytest.raises(SettingsError) as caught:
        BuildLauncher.from_flags(**{key: value for key, value in flags.items() if key != "device"}).own_device(
            flags.get("device", "cpu")
        )
    assert str(caught.value) == message


def test_who_builds_on_ray_needs_no_gpu_itself():
    assert str(BuildLauncher(ray="auto").own_device("cuda")) == "cpu"
