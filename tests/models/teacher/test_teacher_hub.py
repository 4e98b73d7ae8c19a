"""Teachers from the hub, against a small hub on this machine: what is fetched, which commit, and errors in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest

from secondcast.models.teacher.hub import split_revision
from tests.models.teacher.small_hub import COMMIT, NAME, Repository, run_apart, serve

ASK = """
import json, sys
from secondcast.models.teacher.folder import find_teacher
from secondcast.storage_schemas.errors import TeacherError
for name, parts, revision in json.loads(sys.argv[1]):
    try:
        folder = find_teacher(name, parts, revision=revision)
        print(json.dumps([folder.source, folder.pinned_source, sorted(str(p) for p in folder.path.iterdir())]))
    except TeacherError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory, dev_teacher):
    folder = shutil.copytree(dev_teacher, tmp_path_factory.mktemp("hub") / "t", ignore=shutil.ignore_patterns("vae"))
    with serve({NAME: Repository(folder=folder)}) as address:
        yield address


def ask(questions: list, home: Path, **environment: str) -> list:
    return [json.loads(line) for line in run_apart(ASK, json.dumps(questions), home=home, **environment).splitlines()]


@pytest.mark.thorough
def test_only_the_parts_asked_for_are_fetched_and_the_commit_is_known(hub, tmp_path):
    parts = ["transformer", "scheduler"]
    found = ask([(NAME, parts, None), (f"{NAME}@v1", parts, None), (NAME, parts, COMMIT)], tmp_path, HF_ENDPOINT=hub)
    for source, pinned, folders in found:
        assert (source, pinned) == (NAME, f"{NAME}@{COMMIT}")
        assert [Path(folder).name for folder in folders] == ["model_index.json", "scheduler", "transformer"]
        assert {Path(folder).parent.name for folder in folders} == {COMMIT}
    # Offline, what a manifest names is found again.
    again = ask([(f"{NAME}@{COMMIT}", parts, None)], tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert again == found[:1]


@pytest.mark.thorough
def test_each_failure_is_one_line_with_its_way_out(hub, tmp_path):
    questions = [
        ("someone/gated", ["transformer"], None),
        ("someone/nothing", ["transformer"], None),
        (NAME, ["transformer"], "v2"),
        (f"{NAME}@v2", ["transformer"], None),
        (f"{NAME}@v1", ["transformer"], "main"),
        (NAME, ["vae"], None),
        ("someone/broken", ["transformer"], None),
    ]
    said = ask(questions, tmp_path, HF_ENDPOINT=hub)
    expected = [
        "someone/gated is gated: accept its licence on its page, then run `hf auth login` and this command again$",
        "no teacher 'someone/nothing': it is neither a folder nor a hub repository \\(if it is private or gated",
        f"{NAME} has no revision 'v2': see its page for branches and commits$",
        f"{NAME} has no revision 'v2': see its page for branches and commits$",
        f"--revision is 'main', but '{NAME}@v1' names another one: give one of the two$",
        f".*/snapshots/{COMMIT} has no vae/, expected a folder in the FluxPipeline layout with vae/",
        r"someone/broken is not a folder and cannot be downloaded \(\w+\): check the name and the network, or give",
    ]
    for line, pattern in zip(said, expected, strict=True):
        assert re.match(pattern, line) and "\n" not in line, line


@pytest.mark.thorough
def test_offline_a_hand_made_cache_of_the_hub_is_found_and_what_is_not_there_is_one_line(dev_teacher, tmp_path):
    repository = tmp_path / "hub/models--someone--flux"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(dev_teacher)
    other = "f" * 40
    parts = ["transformer", "vae"]
    questions = [(NAME, parts, None), (f"{NAME}@{COMMIT}", parts, None), (f"{NAME}@{other}", parts, None)]
    by_name, by_commit, missing = ask(questions, tmp_path, HF_HUB_OFFLINE="1")
    assert by_name == by_commit and by_name[1] == f"{NAME}@{COMMIT}"
    assert missing == (
        f"{NAME} at revision {other} is not a folder and cannot be downloaded (LocalEntryNotFoundError): check the "
        f"name and the network, or give a folder"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a/b@v1", ("a/b", "v1")),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        ("a/b", ("a/b", None)),
        ("pocket", ("pocket", None)),
        ("/home/me@here/flux", ("/home/me@here/flux", None)),
        ("a/b@", ("a/b@", None)),
    ],
)
def test_a_revision_is_named_behind_the_repository(source, expected):
    assert split_revision(source) == expected
