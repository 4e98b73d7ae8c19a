"""Several workers, killed and resumed, make the bytes of one process; an end of one is the end of all, in its words."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from secondcast.cache_builder.build import build, finish
from secondcast.cache_builder.opening.open_build import open_build
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.cache_builder.workers import local as local_workers
from secondcast.cache_builder.workers.job import Job
from secondcast.cache_builder.workers.local import LocalWorkers, devices_of, run_local_workers
from secondcast.models.teacher.folder import build_parts, find_teacher
from secondcast.storage_schemas.errors import WorkerFailedError
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache, build_settings, data_files
from tests.commands.test_cli import secondcast

LONG = {"steps": 15, "shard_size": 2, "batch_size": 2, "dtype": "float32"}


@pytest.fixture
def many_prompts(tmp_path: Path) -> Path:
    file = tmp_path / "many.txt"
    file.write_text("".join(f"a red car on the left of {number} dogs\n" for number in range(24)))
    return file


class Notes(Silent):
    """Keeps what is said and shown."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.notes: list[str] = []

    def say(self, message):
        self.said.append(message)

    def advance(self, count, note=""):
        self.notes.append(note)


def prepare(path: Path, teacher: Path, prompts: Path):
    found = find_teacher(str(teacher), build_parts("zero"))
    writer = open_build(path, build_settings(prompts, **LONG), found, torch.device("cpu"), Silent())
    job = Job(
        location=str(path),
        teacher=str(teacher),
        teacher_path=str(teacher),
        config=WorkerConfig(batch_size=2, wait_seconds=60),
        threads=1,
    )
    return writer, job


def committed(path: Path) -> int:
    return len(list((path / "commits").glob("trajectories-*.json")))


@pytest.mark.slow
def test_killed_and_resumed_with_other_workers_the_bytes_are_those_of_one(
    tmp_path, dev_teacher, many_prompts, monkeypatch
):
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        local_workers.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    writer, job = prepare(tmp_path / "c", dev_teacher, many_prompts)

    ended = threading.Event()

    def kill_one_when_two_shards_are_there():
        while committed(tmp_path / "c") < 2 and not ended.wait(0.01):
            pass
        started[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one_when_two_shards_are_there)
    killer.start()
    # What lies where the command is given is not taken for ours.
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkerFailedError) as caught:
        run_local_workers(writer, job, ["cpu"] * 2, notes := Notes())
    ended.set()
    killer.join()
    assert str(caught.value) == (
        "worker 1 of 2: was killed by signal 9 (out of host memory?): what was committed stays; give the same command "
        "again"
    )
    assert all(process.poll() is not None for process in started)
    assert 2 <= committed(tmp_path / "c") < 12
    peaks = run_local_workers(writer, job, ["cpu"], Silent())
    assert finish(writer, peaks).finished and peaks["sample"].host_bytes > 0
    assert any("by worker 0:" in note and " 1:" in note for note in notes.notes)
    assert verify(tmp_path / "c", Silent()).problems == ()
    build_cache(tmp_path / "one", dev_teacher, many_prompts, **LONG)
    assert data_files(tmp_path / "c") == data_files(tmp_path / "one")
    assert len(Cache.open(tmp_path / "c")) == 24


@pytest.mark.slow
@pytest.mark.parametrize(("missing", "started"), [((), []), ((1,), [1]), ((0, 1, 2), [0, 1, 2])])
def test_as_many_processes_start_as_have_a_shard_to_make(
    tmp_path, dev_teacher, many_prompts, monkeypatch, capsys, missing, started
):
    few = tmp_path / "few.txt"
    few.write_text("".join(f"{number} dogs\n" for number in range(6)))
    flags = ["--teacher", dev_teacher, "--prompts", few, "--steps", "2", "--shard-size", "2", "--dtype", "float32"]
    assert secondcast("build", tmp_path / "c", *flags, "--quiet", capsys=capsys)[0] == 0
    for number in missing:
        (tmp_path / f"c/commits/trajectories-{number:06d}.json").unlink()
    if missing:
        (tmp_path / "c/commits/index.json").unlink()
    processes: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        local_workers.subprocess, "Popen", lambda *a, **k: processes.append(popen(*a, **k)) or processes[-1]
    )
    code, said, heard = secondcast("build", tmp_path / "c", *flags, "--workers", "99", capsys=capsys)
    assert code == 0 and said.startswith(f"{tmp_path / 'c'}: 6 trajectories of 6 prompts, ")
    assert "3 workers instead of 99: more would have no shard to make\n" in heard
    assert len(processes) == len(started) and all(process.poll() == 0 for process in processes)
    assert [f"worker {number}: sample: at most " in heard for number in range(3)] == [n in started for n in range(3)]


def start_worker(job: dict) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "secondcast.cache_builder.workers.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return process


@pytest.mark.slow
def test_a_worker_says_its_error_in_one_line_and_ends_with_its_stdin(tmp_path, dev_teacher, many_prompts):
    _, job = prepare(tmp_path / "c", dev_teacher, many_prompts)
    told = job.json_value() | {"device": "cpu"}
    lost = start_worker(told | {"location": str(tmp_path / "elsewhere")})
    waiting = start_worker(told | {"config": told["config"] | {"stage": "sample"}})
    assert "waiting for 12 embedding shards" in json.loads(waiting.stdout.readline())["message"]
    waiting.stdin.close()
    assert waiting.wait(30) == 130
    lines = [json.loads(line) for line in lost.stdout]
    assert lost.wait(30) == 1
    assert [line["event"] for line in lines] == ["error"]
    assert f"{tmp_path}/elsewhere is not a folder" in lines[0]["message"]


def test_a_worker_without_a_job_ends_without_a_word():
    command = [sys.executable, "-m", "secondcast.cache_builder.workers.process"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")


def test_a_named_device_is_every_workers_and_threads_are_divided():
    assert devices_of(torch.device("cpu"), 3) == ["cpu"] * 3
    assert devices_of(torch.device("cuda", 1), 2) == ["cuda:1"] * 2


@pytest.mark.thorough
def test_a_build_from_python_with_two_workers_has_the_bytes_of_one(tmp_path, dev_teacher):
    few = tmp_path / "few.txt"
    few.write_text("".join(f"{number} dogs\n" for number in range(6)))
    settings = build_settings(few, dtype="float32")
    teacher, cpu = find_teacher(str(dev_teacher), build_parts("zero")), torch.device("cpu")
    workers = LocalWorkers(count=2, config=WorkerConfig(batch_size=settings.batch_size, wait_seconds=60), threads=1)
    result = build(tmp_path / "two", settings, teacher, cpu, Silent(), workers)
    assert result.finished and result.trajectories == 6 and set(result.peaks) == {"text", "sample"}
    build(tmp_path / "one", settings, teacher, cpu, Silent())
    assert data_files(tmp_path / "two") == data_files(tmp_path / "one")
