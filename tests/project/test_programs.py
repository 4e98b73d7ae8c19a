"""Every Python program of the pages runs, with a miniature where a page has FLUX.1-dev or a cache of it."""

from pathlib import Path

import pytest

from secondcast.models.student.student import new_student, save_student
from secondcast.models.teacher.folder import find_teacher
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.run.export import export
from tests.project.programs import programs, run_program
from tests.storage_schemas.caches import write_cache

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "storage_schemas/README.md")
SHOWN = [(page.name, program) for page in PAGES for program in programs(page.read_text())]


def in_miniature(program: str, folder: Path) -> str:
    """The same program for the pocket teacher, or for a small cache in `folder`."""
    if "FluxPipeline" in program:
        teacher = find_teacher(str(TEACHER_FOLDER), ())
        identity = teacher.identity(text_length=teacher.text_length, hashed=False)
        student = new_student(str(STUDENTS_FOLDER / "tiny"), identity, init="random", dropout=0.0, seed=0)
        save_student(student, folder / "saved", tokenizer=teacher.tokenizer_files())
        export(folder / "saved", folder / "my-student")
        in_place = {
            '"black-forest-labs/FLUX.1-dev"': repr(str(TEACHER_FOLDER)), "height=512": "height=24",
            "width=512": "width=24", "num_inference_steps=20": "num_inference_steps=2", "length=77": "length=24",
        }  # fmt: skip
    else:
        write_cache(folder / "CACHE", format="webdataset" if ".tar" in program else "zarr", compression="none")
        key = Cache.open(folder / "CACHE").trajectory(0).key
        in_place = {"<key>.safetensors": f"{key}.safetensors"} if "<key>" in program else {}
    for shown, done in in_place.items():
        assert shown in program, shown
        program = program.replace(shown, done)
    return program


@pytest.mark.slow
@pytest.mark.parametrize(("page", "program"), SHOWN, ids=[f"{page} {n}" for n, (page, _) in enumerate(SHOWN)])
def test_a_program_of_a_page_runs(page, program, tmp_path):
    run_program(in_miniature(program, tmp_path), tmp_path)


def test_the_pages_show_how_a_student_is_used_and_how_a_cache_is_read_without_us():
    assert [page for page, program in SHOWN if "FluxPipeline" in program] == ["README.md"]
    assert any("tensorstore" in program for _, program in SHOWN) and any(".tar" in program for _, program in SHOWN)
