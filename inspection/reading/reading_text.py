"""The text output of `inspect reading`, from its facts. Does not import torch."""

from typing import Any

from secondcast.inspection.text_layout import table_lines
from secondcast.storage_schemas.progress import counted

_COLUMNS = {
    "pca": "PCA",
    "read_pca": "PCA of what is read",
    "context": "context",
    "measured": "measured",
}
_KINDS = {"visual": "visual", "non_visual": "non-visual"}


def reading_lines(facts: dict[str, Any], *, width: int | None = None) -> list[str]:
    """Vision loss by rank and metric, padding, and spread; width: of the terminal, None for a pipe."""
    return [
        f"{facts['cache']}: vision loss on {counted(facts['records'], 'held-out record')}; replay error "
        f"{_number(facts['replay_error'])}, mean square of the velocity {_number(facts['velocity_mean_square'])}",
        "",
        f"embedding truncated to a rank; the text projection reads {facts['inner_width']} of {facts['width']} "
        f"directions; statistics of {counted(facts['prompts'], 'training prompt')}, "
        f"{counted(facts['gradients'], 'gradient')}",
        *_rank_lines(facts),
        "",
        *_padding_lines(facts),
        "",
        *_spread_lines(facts, width),
    ]


def _rank_lines(facts: dict[str, Any]) -> list[str]:
    rows = [[str(row["rank"]), *(_number(row[metric]) for metric in _COLUMNS)] for row in facts["ranks"]]
    return table_lines(["rank", *_COLUMNS.values()], rows, text_columns=())


def _padding_lines(facts: dict[str, Any]) -> list[str]:
    padding = facts["padding"]
    head = (
        f"padding: {_percent(padding['token_fraction'])} of the tokens, {_percent(padding['variance_fraction'])} of "
        f"the embedding's variance"
    )
    rows = [
        ["replaced by its mean at each position", _number(padding["position_mean"])],
        ["replaced by zeros", _number(padding["zeros"])],
    ]
    return [head, *table_lines(["padding", "vision loss"], rows)]


def _spread_lines(facts: dict[str, Any], width: int | None) -> list[str]:
    if facts["spread"] is None:
        return [f"spread between prompts: not measured; {facts['spread_missing']}"]
    rows = [
        [
            _KINDS[kind],
            str(row["prompts"]),
            *(_percent(row[f"{of}_fraction"]) for of in ("prediction", "context", "embedding")),
        ]
        for kind, row in facts["spread"].items()
    ]
    return [
        "spread between prompts at the same latents: variance per mean square",
        *table_lines(["prompts", "number", "prediction", "context", "embedding"], rows, width=width),
    ]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
