"""What the page of a report is given, made up: every frame has a colour of its own, which says whose it is."""

import base64
import io
from typing import Any

from PIL import Image

STEPS = 8
ROWS = 30
# The cache's first trajectories are not there: numbers of trajectories are not rows of the table.
FIRST = 5
STRIPS = (7, 2, 20)
EVALUATED = (2, 7, 11, 25)
# Of row 11 the mean is highest, of row 2 the worst step.
ERRORS = {2: [0.9, *[0.05] * 7], 7: [0.1] * 8, 11: [0.4] * 8, 25: [0.0] * 8}
SHAPES = ("square", "circle", "triangle")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & &amp; {{style}} \u2028 🦊 \ud83e"
COLOURS = ("red", "green", "blue", "cyan", "yellow")


def frame_colour(row: int, place: int, half: int) -> tuple[int, int, int]:
    return 8 * row, 20 * place, 40 + 120 * half


def webp(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def sheet(row: int, frame_px: int) -> str:
    picture = Image.new("RGB", ((STEPS + 1) * frame_px, 2 * frame_px))
    for place in range(STEPS + 1):
        for half in range(2):
            frame = Image.new("RGB", (frame_px, frame_px), frame_colour(row, place, half))
            picture.paste(frame, (place * frame_px, half * frame_px))
    return webp(picture)


def student(name: str = "run", factor: float = 1.0) -> dict[str, Any]:
    steps = list(range(STEPS))
    return {
        "name": name,
        "parameters": 199872,
        "rows": list(EVALUATED),
        "steps": steps,
        "errors": [[factor * error for error in ERRORS[row]] for row in EVALUATED],
        "replay_error": [[0.01] * STEPS for _ in EVALUATED],
        "closed": {
            "rows": [7, 25],
            "latent_fraction": [0.25, 0.0],
            "psnr_db": [21.5, None],
            "ssim": [0.75, 1.0],
            "final": [webp(Image.new("RGB", (12, 12), (1, 2, 3)))] * 2,
        },
        "curves": [
            {"name": "loss", "x": [0, 50, 100], "y": [2.0, 0.5, 0.1]},
            {"name": "validation loss", "x": [0, 100], "y": [2.1, 0.2]},
            {"name": "learning rate", "x": [0, 50, 100], "y": [0.0, 1e-4, 0.0]},
        ],
    }


def trajectories(count: int = ROWS) -> dict[str, Any]:
    rows = range(count)
    return {
        "source_names": ["scene", "sign"],
        "index": [FIRST + row for row in rows],
        "key": [f"{row:032x}-0000" for row in rows],
        "prompt": [f"a {COLOURS[row % 5]} {SHAPES[row % 3]} of {row:,}" for row in rows],
        "sources": [[0, 1] if row == 3 else [row % 2] for row in rows],
        "guidance": [2 + row % 7 / 2 for row in rows],
        "sample_index": [0] * count,
        "held_out": [int(row in EVALUATED) for row in rows],
        "tokens": [10 + row * 7 % 13 for row in rows],
        # One was not read.
        "velocity_rms": [None if row == 4 else round(1 + row * 37 % 101 / 100, 4) for row in rows],
        "final_rms": [None if row == 4 else 0.9 for row in rows],
        "non_finite": [None if row == 4 else 0 for row in rows],
        "damaged": [6],
    }


def report_data(**changes: Any) -> dict[str, Any]:
    return {
        "cache": "/data/my cache",
        "title": "my cache",
        "created_at": "2026-11-21T16:40:00Z",
        "created_by": "secondcast 0.1.0",
        "notes": [
            "norms of 29 of 30 trajectories",
            "film strips of 3 of 30",
            "4 held-out trajectories evaluated",
            "so",
        ],
        "summary": [["cache", "my cache (finished)"], ["teacher", "pocket"]],
        "integrity": {"state": "intact", "text": "2 shards: every file matches its checksum", "problems": []},
        "schedule": {
            "sigmas": [1 - step / STEPS for step in range(STEPS + 1)],
            "timesteps": [1 - step / STEPS for step in range(STEPS)],
        },
        "trajectories": trajectories(),
        "strips": {
            "frame_px": 12,
            "steps": list(range(STEPS)),
            "rows": [{"row": row, "why": "random", "sheet": sheet(row, 12)} for row in STRIPS],
        },
        "students": [student()],
        "pictures": {
            "rows": [7, 25],
            "teacher": [webp(Image.new("RGB", (12, 12), (4, 5, 6)))] * 2,
            "untrained": [webp(Image.new("RGB", (12, 12), (7, 8, 9)))] * 2,
        },
        **changes,
    }


def hostile_data() -> dict[str, Any]:
    data = report_data(title="<b>mine</b>")
    data["trajectories"]["prompt"][0] = HOSTILE
    return data
