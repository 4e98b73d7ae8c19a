"""What the experiments on the pocket teacher share: commands in this process, one core a job, results that stay.

A job is what makes one result.json; one that is there already is not done again.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Any

from secondcast.storage_schemas.io import durable

ASKED = "asked.json"
RESULT = "result.json"
# The settings of every cache that is recorded here.
RECORDING = {"teacher": "pocket", "dtype": "float32", "batch_size": 64, "device": "cpu"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One result: `work(place, *arguments)` gives it, a function that processes can be sent; seconds is a guess."""

    place: Path
    work: Callable[..., Mapping[str, Any]]
    arguments: tuple[Any, ...] = ()
    seconds: float = 0.0


def command(*words: object) -> None:
    """A command line of secondcast, in this process: no second start of torch. Its errors come through."""
    from secondcast import cli

    cli.app([str(word) for word in words], standalone_mode=False)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def make_cache(cache: Path, count: int, kind: str | None = None, *, text_only: bool = False) -> None:
    """Captions beside the cache and the recording, by the commands; done already it takes a second."""
    prompts = cache.with_name(f"{cache.name}.txt")
    if not prompts.exists():
        prompts.parent.mkdir(parents=True, exist_ok=True)
        command("prompts", "pocket", prompts, "--num-prompts", count, *as_flags({"kind": kind} if kind else {}))
    command("build", cache, "--prompts", prompts, *["--text-only"] * text_only, *as_flags(RECORDING))


def train(run: Path, caches: Sequence[object], flags: Mapping[str, Any]) -> float:
    """Seconds of its steps."""
    given = [word for cache in caches for word in ("--cache", cache)]
    with contextlib.redirect_stdout(io.StringIO()):
        command("train", run, *given, "--device", "cpu", "--quiet", *as_flags(flags))
    return sum(entry["seconds"] for entry in metrics(run))


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "seconds" in entry]


@remembered
def judge(cache: Path, captions: int, steps: int = 20) -> Any:
    from experiments.pocket_judge import Judge

    return Judge(cache, captions, steps)


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(file, (json.dumps(value, indent=1) + "\n").encode())


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def result_of(place: Path) -> dict[str, Any] | None:
    file = place / RESULT
    return read_json(file) if file.exists() else None


def results_below(folder: Path) -> list[dict[str, Any]]:
    """Of all jobs whose places lie in a folder, by name."""
    return [read_json(place / RESULT) for place in sorted(folder.iterdir()) if (place / RESULT).exists()]


def run_parts(parser: argparse.ArgumentParser, parts: Sequence[str], make: Callable[..., Any]) -> None:
    """Add the options that experiments in parts share; run one part or all, methods of make(folder, asked, jobs)."""
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--part", choices=(*parts, "all"), default="all")
    parser.add_argument("--jobs", type=int, default=2)
    asked = vars(parser.parse_args())
    folder, part, jobs = (asked.pop(key) for key in ("folder", "part", "jobs"))
    experiment = make(folder.absolute(), asked, jobs)
    for name in parts if part == "all" else (part,):
        getattr(experiment, name)()


def keep_asked(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write down what was asked; SystemExit where the folder was begun with something else."""
    file = folder / ASKED
    if file.exists() and (was := read_json(file)) != asked:
        raise SystemExit(f"{folder} was begun with {was}, you asked for {asked}: give the same, or another folder")
    write_json(file, asked)


def do(job: Job) -> float:
    """Do a job in this process; how many seconds it took. Its result comes last and whole."""
    began = time.monotonic()
    job.place.mkdir(parents=True, exist_ok=True)
    found = job.work(job.place, *job.arguments)
    took = time.monotonic() - began
    write_json(job.place / RESULT, {**found, "wall_seconds": took})
    return took


def work_off(jobs: Sequence[Job], processes: int) -> None:
    """Do the jobs that have no result yet, the longest first; SystemExit names those that failed."""
    todo = sorted((job for job in jobs if result_of(job.place) is None), key=lambda job: -job.seconds)
    left, failed = sum(job.seconds for job in todo), []
    if not todo:
        return
    with workers(processes) as pool:
        # The longest first, so that the last ones do not leave a core idle for long.
        futures = {pool.submit(do, job): job for job in todo}
        for number, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            left -= job.seconds
            if error := future.exception():
                failed.append(f"{job.place.name}: {error}")
            said = error or f"{future.result():.0f} s"
            minutes = math.ceil(left / processes / 60)
            print(f"{number}/{len(todo)} {job.place.name}: {said}; about {minutes} minutes left here", flush=True)
    if failed:
        raise SystemExit("\n".join(["failed, the rest is done; the same command tries again:", *failed]))


def start_worker(cores: Any) -> None:
    """One core and one thread for this process, which ends when the one that began it does."""
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    from secondcast.models.device import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()


def workers(jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for number in range(jobs):
        cores.put(own[number % len(own)] if own else None)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(cores,))
