"""Does a training run that is killed again and again end as one that was not? Each start costs some seconds of imports.

taskset -c 3 python -m tests.stress.training_kill_loop DIR [--kills 20 --sequential-kills 5 --seed 0]

`secondcast train`, on the pocket teacher, is killed with SIGKILL at random moments, each time resumed by the same
command, until there were enough kills; then it runs to its end. Student, average, moments, state.json, best.json,
config.json and metrics.jsonl (but for seconds) must be those of a run that nobody killed; other files that a kill
left behind are named. A kill comes at a random time after the start, a random time after a number of new optimizer
steps, or while a checkpoint is written and settled.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from secondcast.models.student.folder import BEST_FILE, checkpoints
from secondcast.pocket.world import captions

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, CHECKPOINT_EVERY, KEEP = 64, 5, 2
PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.002
# A checkpoint of the pocket's student takes about half as long to write; later kills land behind its rename.
CHECKPOINT_SECONDS = 0.08
LONGEST_STEP_SECONDS = 0.15
START_SECONDS = 6.0
NEW_STEPS = range(1, 10)
_MOMENTS = {"start": 2, "steps": 5, "checkpoint": 4}
FLAGS = (
    "--student", "pocket-small", "--batch-size", "16", "--ema-decay", "0.9", "--checkpoint-every",
    str(CHECKPOINT_EVERY),
    "--keep-checkpoints", str(KEEP), "--device", "cpu", "--quiet",
)  # fmt: skip
# The second is short, so that its few kills come in both of its stages, and longer than one walk of 20 steps.
ORDERS = {
    "shuffled": ("--data-order", "shuffled", "--pretrain-steps", "20", "--steps", "40"),
    "sequential": ("--data-order", "sequential", "--grad-accum-steps", "2", "--pretrain-steps", "4", "--steps", "25"),
}


@dataclass
class Tally:
    """Where the kills of one order landed. `faults`: what must not be."""

    order: str
    kills: int = 0
    in_training: int = 0
    in_a_write: int = 0
    after_the_rename: int = 0
    runs: int = 0
    start_seconds: list[float] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        """As markdown."""
        cells = [self.kills, self.kills - self.in_training, self.in_training, self.in_a_write, self.after_the_rename]
        return f"| {self.order} | {' | '.join(map(str, [*cells, self.runs, len(self.faults)]))} |"


HEADER = (
    "| order | kills | before the first step | after it | of these within a checkpoint's write | between its rename "
    "and the end of its marking and forgetting | runs ended | faults |\n|---|---|---|---|---|---|---|---|"
)


def secondcast(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from secondcast import cli; cli.main()", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def step_lines(run: Path) -> list[str]:
    """Lines of metrics.jsonl of whole optimizer steps; their seconds tell a step from the same one made again."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [line for line in lines if '"kind"' in line and line.endswith("}")]


class Attempt:
    """One start of the command on a run, and what it has done since."""

    def __init__(self, run: Path, arguments: list[str]) -> None:
        self.run = run
        self.newest = self._newest()
        self._old_lines, self._old_writes = set(step_lines(run)), self._writes()
        self.started = time.monotonic()
        self.process = secondcast(*arguments)

    def new_lines(self) -> list[str]:
        """Optimizer steps logged since the start."""
        return [line for line in step_lines(self.run) if line not in self._old_lines]

    def writing(self) -> bool:
        """Whether a checkpoint is half written."""
        return bool(self._writes() - self._old_writes)

    def marking(self) -> bool:
        """Whether a new checkpoint has its name and the old ones are not forgotten yet, or the best not marked."""
        found = checkpoints(self.run)
        if self._newest() == self.newest or not found:
            return False
        best = json.loads((self.run / BEST_FILE).read_bytes()) if (self.run / BEST_FILE).is_file() else {}
        state = json.loads((found[-1] / "state.json").read_bytes())
        forgotten = {path.name for path in found[:-KEEP]} <= {best.get("checkpoint")}
        return not forgotten or (state["is_best"] and best.get("checkpoint") != found[-1].name)

    def wait(self, moment: str, rng: random.Random, tally: Tally) -> bool:
        """Until the moment of the kill; False if the run came to its end before."""
        if moment == "start":
            return self._sleep(rng.uniform(0, START_SECONDS))
        if not self._until(lambda: bool(self.new_lines())):
            return False
        tally.start_seconds.append(time.monotonic() - self.started)
        if moment == "checkpoint":
            return self._until(self.writing) and self._sleep(rng.uniform(0, CHECKPOINT_SECONDS))
        wanted = rng.choice(NEW_STEPS)
        return self._until(lambda: len(self.new_lines()) >= wanted) and self._sleep(
            rng.uniform(0, LONGEST_STEP_SECONDS)
        )

    def kill(self) -> bool:
        """SIGKILL to the whole group; False if the process had ended by itself before."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return self.process.returncode == -signal.SIGKILL

    def _until(self, ready) -> bool:
        end = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            if ready():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _sleep(self, seconds: float) -> bool:
        time.sleep(seconds)
        return self.process.poll() is None

    def _writes(self) -> set[str]:
        return {path.name for path in self.run.glob(".checkpoint-*.tmp")}

    def _newest(self) -> str:
        return max((path.name for path in checkpoints(self.run)), default="none")


class KilledRun:
    """Runs of one order, killed until there were enough kills, each compared with the run that nobody killed."""

    def __init__(self, folder: Path, order: str, seed: int) -> None:
        self.folder, self.tally, self.rng = folder, Tally(order), random.Random(f"{seed} {order}")
        self.truth = folder / f"{order}-unkilled"

    def run(self, kills: int) -> Tally:
        """The unkilled run, then killed ones until there were enough kills."""
        self._finish(self._start(self.truth))
        while self.tally.kills < kills and not self.tally.faults:
            self._one_run(self.folder / f"{self.tally.order}-{self.tally.runs}", kills)
        return self.tally

    def _start(self, run: Path) -> Attempt:
        cache = str(self.folder / "cache")
        return Attempt(run, ["train", str(run), "--cache", cache, *FLAGS, *ORDERS[self.tally.order]])

    def _finish(self, attempt: Attempt) -> None:
        said, _ = attempt.process.communicate(timeout=PATIENCE_SECONDS)
        if attempt.process.returncode:
            self.tally.faults.append(f"{attempt.run.name}: ended with {attempt.process.returncode}: {said.strip()}")

    def _one_run(self, run: Path, kills: int) -> None:
        while self.tally.kills < kills and not self.tally.faults:
            moment = self.rng.choices(list(_MOMENTS), weights=list(_MOMENTS.values()))[0]
            attempt = self._start(run)
            if not attempt.wait(moment, self.rng, self.tally) or not attempt.kill():
                # Came to its end, before this kill.
                break
            self._count(attempt)
        else:
            attempt = self._start(run)
        self._finish(attempt)
        self.tally.runs += 1
        if not self.tally.faults:
            found, wanted = files_of(run), files_of(self.truth)
            wrong = [name for name in sorted(wanted) if found.get(name) != wanted[name]]
            self.tally.faults += [f"{run.name}: {name} is not that of the unkilled run" for name in wrong]
            self.tally.left_behind += [f"{run.name}/{name}" for name in sorted(found.keys() - wanted.keys())]

    def _count(self, attempt: Attempt) -> None:
        new = attempt.new_lines()
        writing, marking = attempt.writing(), not attempt.writing() and attempt.marking()
        self.tally.kills += 1
        self.tally.in_training += bool(new)
        self.tally.in_a_write += writing
        self.tally.after_the_rename += marking
        where = f"at step {json.loads(new[-1])['step'] + 1}, {len(new)} steps made" if new else "before its first step"
        where += ", a checkpoint half written" * writing + ", its last checkpoint named and not yet settled" * marking
        seconds = time.monotonic() - attempt.started
        print(f"{attempt.run.name} kill {self.tally.kills}: {seconds:.1f} s after the start, {where}", flush=True)


def files_of(run: Path) -> dict[str, object]:
    """All files, as bytes; the metrics without what was timed."""
    files: dict[str, object] = {
        str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()
    }
    entries = [json.loads(line) for line in files["metrics.jsonl"].decode().splitlines()]
    # Each start measures the replay error anew and logs it before step 0.
    replay_errors = {entry["replay_error"] for entry in entries if "replay_error" in entry}
    steps = [{**entry, "seconds": 0} for entry in entries if not {"replay_error", "summary"} & entry.keys()]
    return {**files, "metrics.jsonl": (replay_errors, steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="new or empty")
    parser.add_argument("--kills", type=int, default=20, help="of the run in the order `shuffled`")
    parser.add_argument("--sequential-kills", type=int, default=5, help="of one with `sequential --grad-accum-steps 2`")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.monotonic()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if any(asked.folder.iterdir()):
        parser.error(f"{asked.folder} is not empty: give a new folder")
    folder = asked.folder.resolve()
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{text}\n" for text in captions(PROMPTS, seed=asked.seed, split="train")))
    build = ["build", str(folder / "cache"), "--teacher", "pocket", "--prompts", str(prompts), "--dtype", "float32"]
    said, _ = (process := secondcast(*build, "--device", "cpu", "--quiet")).communicate(timeout=PATIENCE_SECONDS)
    if process.returncode:
        sys.exit(f"the cache cannot be built: {said.strip()}")
    wanted = {"shuffled": asked.kills, "sequential": asked.sequential_kills}
    tallies = [KilledRun(folder, order, asked.seed).run(kills) for order, kills in wanted.items() if kills]
    print("\n".join([HEADER, *(tally.row() for tally in tallies)]))
    starts = [seconds for tally in tallies for seconds in tally.start_seconds] or [0.0]
    took = time.monotonic() - began
    print(f"from a start to its first step {min(starts):.1f} to {max(starts):.1f} s; in all {took:.0f} s")
    for name in (name for tally in tallies for name in tally.left_behind):
        print(f"left behind by a kill: {name}")
    faults = [fault for tally in tallies for fault in tally.faults]
    print("\n".join(faults) if faults else "every killed run ended as the unkilled one, bit for bit")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
