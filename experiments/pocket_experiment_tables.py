"""Markdown of what `experiments.pocket_experiment` found, beside the paper's rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.pocket_questions import LORA, TEACHER, Setting, settings
from experiments.pocket_trials import BERT, KINDS, SIZES, Plan, Trial, small_vision
from experiments.training.tables import print_table, score_cell, short, spread
from secondcast.pocket.scorer import DIMENSIONS

Results = Sequence[Mapping[str, Any]]
# FID, CLIP score, T2I-CompBench's average, characters of text rendering: arXiv 2503.19897, its tables.
PAPER_SIZES = {
    "T5-Small": ("25.10", "28.28", "-", "31.9"),
    "T5-Base": ("24.32", "29.79", "50.32", "69.3"),
    "T5-XL": ("23.17", "30.33", "53.74", "77.8"),
    "T5-XXL, the teacher": ("22.36", "31.30", "55.56", "76.7"),
}
PAPER_DATA = {
    "LAION only": ("24.13", "29.69", "31.09", "2.97"),
    "T2I-CompBench only": ("23.55", "27.88", "44.93", "1.32"),
    "CommonText only": ("28.95", "25.62", "21.20", "43.41"),
    "naive, all": ("26.47", "22.52", "13.78", "0.35"),
    "vision, all": ("24.32", "29.79", "50.32", "49.1"),
}
PAPER_HEADS = ("paper", "FID", "CLIP score", "compositions", "characters")
RESAMPLED = 2000

_LOSSES = ("vision_loss", "embedding_error")
_COLUMNS = (*DIMENSIONS, "mean", *(name.replace("_", " ") for name in _LOSSES), "s, training")


def print_all(plan: Plan, chosen: Sequence[Trial], results: Mapping[str, Results], *, lora: Mapping[str, Any]) -> None:
    runs = results["runs"]
    for size, found in plan.step_seconds.items():
        print(f"Seconds a step, {size}: {', '.join(f'{k} {v:.4f}' for k, v in found.items())}.")
    print()
    _scaling(chosen, runs, results["references"])
    _equal_steps(plan, chosen, runs)
    _screening(plan, chosen, runs)
    _ablation(plan, chosen, runs)
    _stages(plan, chosen, runs)
    _tokenizer(plan, chosen, runs)
    told = Answers(results["questions"])
    for question in ("steps", "guidance", "text-length"):
        _question(question, told)
    _lora(told, lora)


def _of(trial: Trial, runs: Results) -> list[Mapping[str, Any]]:
    return [result for result in runs if result["name"] == trial.name]


def _cells(found: Results) -> list[str]:
    return [
        *(score_cell(name, found) for name in DIMENSIONS),
        spread([result["mean"] for result in found], short),
        *(spread([r[key] for r in found if key in r], "{:.3g}".format) for key in _LOSSES),
        spread([r["training_seconds"] for r in found if "training_seconds" in r], "{:.0f}".format),
    ]


def _steps(trial: Trial) -> str:
    return f"{trial.pretrain_steps} + {trial.steps}" if trial.pretrain_steps else str(trial.steps)


def _row(trial: Trial, runs: Results) -> list[str]:
    found = _of(trial, runs)
    return [trial.row, f"{found[0]['parameters']:,}", _steps(trial), f"{trial.rate:g}", *_cells(found)]


def _scaling(chosen: Sequence[Trial], runs: Results, references: Results) -> None:
    lines = [[one["name"], "", "", "", *_cells([one])] for one in references]
    lines += [_row(trial, runs) for trial in chosen]
    seeds = len(_of(chosen[0], runs))
    print_table(f"Sizes, {seeds} seeds", ("student", "parameters", "steps", "rate", *_COLUMNS), lines)
    print_table("Sizes, the paper", PAPER_HEADS, [[name, *row] for name, row in PAPER_SIZES.items()])


def _equal_steps(plan: Plan, chosen: Sequence[Trial], runs: Results) -> None:
    rows = [*plan.equal_steps(chosen), *(trial for trial in chosen if trial.size == SIZES[-1])]
    lines = [_row(trial, runs) for trial in rows]
    print_table("Sizes at the steps of the largest", ("student", "parameters", "steps", "rate", *_COLUMNS), lines)


def _screening(plan: Plan, chosen: Sequence[Trial], runs: Results) -> None:
    lines = []
    for trial in plan.scaling():
        found = [result for result in _of(trial, runs) if result["seed"] == 0]
        lines.append([trial.row, f"{trial.rate:g}", short(found[0]["mean"]), "x" if trial in chosen else ""])
    print_table("Screened rates, seed 0", ("student", "rate", "mean", "went on"), lines)


def _small(chosen: Sequence[Trial], method: str) -> Trial:
    return next(trial for trial in chosen if trial.row == f"small-{method}")


def _ablation(plan: Plan, chosen: Sequence[Trial], runs: Results) -> None:
    rows = [(f"{trial.row}s only, vision", trial) for trial in plan.ablation(small_vision(chosen))]
    rows += [(f"all, {method}", _small(chosen, method)) for method in ("naive", "vision")]
    heads = ("trained on", "steps", *DIMENSIONS, "mean", *(f"{kind} captions" for kind in KINDS), "vision loss")
    lines = []
    for name, trial in rows:
        found = _of(trial, runs)
        kinds = [spread([result["kinds"][kind] for result in found], short) for kind in KINDS]
        cells = _cells(found)
        scores, loss = cells[: len(DIMENSIONS) + 1], cells[len(DIMENSIONS) + 1]
        lines.append([name, _steps(trial), *scores, *kinds, loss])
    print_table("Data of one kind", heads, lines)
    print_table("Data of one kind, the paper", PAPER_HEADS, [[name, *row] for name, row in PAPER_DATA.items()])


def _stages(plan: Plan, chosen: Sequence[Trial], runs: Results) -> None:
    trials = plan.stages(small_vision(chosen))
    lines = [[trial.row, _steps(trial), *_cells(_of(trial, runs))] for trial in trials]
    print_table("Stages", ("order", "steps", *_COLUMNS), lines)


def _tokenizer(plan: Plan, chosen: Sequence[Trial], runs: Results) -> None:
    trial = plan.bert()
    found = _of(trial, runs)
    row = [BERT, f"{found[0]['parameters']:,}", _steps(trial), *_cells(found)]
    print_table("Another tokenizer, one seed", ("student", "parameters", "steps", *_COLUMNS), [row])


class Answers:
    """Scores by caption: of the teacher [1, N, dimensions] and of the students [seeds, N, dimensions], nan for none."""

    def __init__(self, results: Results) -> None:
        self._found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for result in results:
            rows = [[scores.get(name, np.nan) for name in DIMENSIONS] for scores in result["values"]]
            self._found.setdefault((result["question"], result["value"]), {})[result["who"]] = np.array(rows)

    def teacher(self, setting: Setting) -> np.ndarray:
        """[1, N, dimensions]."""
        return self._found[setting.question, setting.value][TEACHER][None]

    def students(self, setting: Setting) -> np.ndarray:
        """[seeds, N, dimensions]."""
        found = self._found[setting.question, setting.value]
        return np.stack([found[who] for who in sorted(found) if who != TEACHER])


def mean_of(values_SND: np.ndarray) -> float:
    """Mean of seeds and captions in each dimension, then of the dimensions that occur."""
    return float(_means(values_SND, np.ones((1, values_SND.shape[1])))[0])


def _means(values_SND: np.ndarray, drawn_RN: np.ndarray) -> np.ndarray:
    """mean_of, [R], where each caption occurs as often as it was drawn."""
    # A caption has the same dimensions for every seed.
    known_ND = ~np.isnan(values_SND[0])
    sums_RD = drawn_RN @ np.nan_to_num(values_SND).mean(0)
    counts_RD = drawn_RN @ known_ND.astype(np.float64)
    occurs_RD = counts_RD > 0
    means: np.ndarray = np.where(occurs_RD, sums_RD / np.maximum(counts_RD, 1), 0.0).sum(1) / occurs_RD.sum(1)
    return means


def interval(terms: Sequence[tuple[float, np.ndarray]]) -> tuple[float, float, float]:
    """Of a weighted sum of means over the same captions: its value, and 95 % by resampling the captions."""
    count = terms[0][1].shape[1]
    rng = np.random.default_rng(0)
    drawn_RN = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLED).astype(np.float64)
    totals = sum(weight * _means(values, drawn_RN) for weight, values in terms)
    low, high = np.quantile(totals, (0.025, 0.975))
    return sum(weight * mean_of(values) for weight, values in terms), float(low), float(high)


def _signed(terms: Sequence[tuple[float, np.ndarray]]) -> str:
    value, low, high = interval(terms)
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def _pair(name: str, teacher: np.ndarray, students: np.ndarray) -> str:
    at = DIMENSIONS.index(name)
    return f"{short(np.nanmean(teacher[..., at]))}, {short(np.nanmean(students[..., at]))}"


def _question(question: str, told: Answers) -> None:
    usual = next(setting for setting in settings() if setting.question == "usual")
    asked = [setting for setting in settings() if setting.question == question]
    field = question.replace("-", "_")
    lines = []
    for setting in sorted([usual, *asked], key=lambda one: float(getattr(one, field))):
        teacher, students = told.teacher(setting), told.students(setting)
        beyond = [(1, students), (-1, teacher), (-1, told.students(usual)), (1, told.teacher(usual))]
        lines.append(
            [
                f"{getattr(setting, field):g}" + " (as trained)" * (setting is usual),
                short(mean_of(teacher)),
                spread([mean_of(one[None]) for one in students], short),
                _signed([(1, students), (-1, teacher)]),
                "" if setting is usual else _signed(beyond),
                *(_pair(name, teacher, students) for name in DIMENSIONS),
            ]
        )
    heads = (question, "teacher", "student", "student - teacher", "beyond that as trained")
    print_table(f"{question}: teacher, student", (*heads, *DIMENSIONS), lines)


def _lora(told: Answers, made: Mapping[str, Any]) -> None:
    before, after = (s for s in settings() if s.question == LORA)
    half = told.teacher(before).shape[1] // 2
    every = list(range(len(DIMENSIONS)))
    colour, binding = ([DIMENSIONS.index(name)] for name in ("colour", "binding"))
    lines = []
    for name, rows, dimensions in (
        ("with the word", slice(0, half), every),
        ("with the word, colour", slice(0, half), colour),
        ("with the word, binding", slice(0, half), binding),
        ("without it", slice(half, None), every),
    ):
        parts = [told.teacher(before), told.teacher(after), told.students(before), told.students(after)]
        old_t, new_t, old_s, new_s = (values[:, rows][..., dimensions] for values in parts)
        lines.append(
            [
                name,
                f"{short(mean_of(old_t))}, {short(mean_of(new_t))}",
                f"{short(mean_of(old_s))}, {short(mean_of(new_s))}",
                _signed([(1, new_t), (-1, old_t)]),
                _signed([(1, new_s), (-1, old_s)]),
                _signed([(1, new_s), (-1, old_s), (-1, new_t), (1, old_t)]),
            ]
        )
    heads = ("captions", "teacher before, after", "student before, after", "teacher's change", "student's change")
    title = f"LoRA: {made['steps']} steps, {made['parameters']:,} parameters"
    print_table(title, (*heads, "student's - teacher's"), lines)
