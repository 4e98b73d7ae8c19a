"""Write the table in docs/families.md from what the families state: `python -m docs.families`."""

from pathlib import Path

from secondcast.models.families.family import Family
from secondcast.models.families.registry import FAMILIES
from secondcast.models.teacher.configs import family_of_folder
from secondcast.models.teacher.planned import CONFIGS, bundled_teachers

FILE = Path(__file__).with_name("families.md")
BEGIN, END = "<!-- python -m docs.families -->\n", "<!-- end -->\n"
_GUIDANCE = {
    "embedded": "an input of the transformer, if it takes any",
    "none": "none",
    "cfg": "classifier-free, both halves in one call; the negative prompt's rows are in the cache and in exports",
}

_OTHERS = {False: "any encoder with its own tokenizer", True: "one with its tokens"}
_STEPS = {
    "flow-match-euler": "Euler steps of flow matching",
    "scheduler": "the scheduler's own, whose configuration is in the manifest (DPM-Solver++ 2M)",
}


def page() -> str:
    """The page with its table."""
    text = FILE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def table() -> str:
    """Markdown: a row for each property, a column for each family."""
    rows = {
        "models": [", ".join(family.models) for family in FAMILIES],
        "pipeline of diffusers": [f"`{family.pipeline}`" for family in FAMILIES],
        "a student replaces": [f"`{family.slot}`" for family in FAMILIES],
        "text tokens: default, maximum": [f"{one.text_length}, {one.largest_text_length}" for one in FAMILIES],
        "recorded beside the embedding": [_beside(family) for family in FAMILIES],
        "guidance": [_GUIDANCE[family.guidance_rule] for family in FAMILIES],
        "guidance scales of a new cache": [
            "none" if family.guidance_rule == "none" else f"`{family.guidance}`" for family in FAMILIES
        ],
        "what is read of the text encoder": [
            "the last layer"
            if family.text_layers is None
            else f"layers {', '.join(map(str, family.text_layers))}, side by side; deeper layers are not loaded"
            for family in FAMILIES
        ],
        "latents of a new cache": [family.latents for family in FAMILIES],
        "replay of the recorded embedding": [
            "bit for bit"
            if family.rows_per_call == 1
            else "both halves bit for bit; the conditional one alone within rounding"
            for family in FAMILIES
        ],
        "padding of the text": [
            "masked, zero in caches; students do the same" if family.masks_text else "read" for family in FAMILIES
        ],
        "how a prompt is tokenised": [
            "within the chat template"
            if family.text_layers
            else "cleaned by the pipeline's clean_caption (extra `pixart`)"
            if family.text_cleaning
            else "as it is given"
            for family in FAMILIES
        ],
        "steps": [_STEPS[family.latent_rule] for family in FAMILIES],
        "modulation weights, for `--modulation`": ["yes" if one.anatomy.modulation else "none" for one in FAMILIES],
        "gradients with streamed blocks": [
            "within rounding: text enters every block" if one.anatomy.cross_attention else "bit for bit"
            for one in FAMILIES
        ],
        "students": [
            f"T5, or {_OTHERS[one.masks_text]}"
            if one.text_layers is None
            else f"smaller models with its tokenizer, such as {one.student}"
            for one in FAMILIES
        ],
        "`init-student`": [_initial(family) for family in FAMILIES],
        "losses": ["embedding, context, depth, vision"] * len(FAMILIES),
        "`--attention-backend`": ["yes" if family.attention_backends else "no" for family in FAMILIES],
        "`export --to distillt5`, `comfyui`": [
            "yes" if family.slot == FAMILIES[0].slot else "no" for family in FAMILIES
        ],
        "bundled configurations for `plan`": [", ".join(_bundled(family)) or "none" for family in FAMILIES],
    }
    head = f"| | {' | '.join(f'`{family.name}`' for family in FAMILIES)} |\n|---|{'---|' * len(FAMILIES)}\n"
    return head + "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())


def _initial(family: Family) -> str:
    if family.makes_initial_students:
        return "yes"
    return (
        "no: make one from the T5-XXL of another family" if family.text_layers is None else "no: it needs a T5 encoder"
    )


def _beside(family: Family) -> str:
    if family.pooled == ("zero",):
        return "nothing"
    if len(family.conditioning_roles) > 1:
        return "pooled vectors and rows of both CLIPs"
    return "nothing, or CLIP's pooled vector with `--pooled clip`"


def _bundled(family: Family) -> list[str]:
    return [name for name in bundled_teachers() if family_of_folder(CONFIGS / name) is family]


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
