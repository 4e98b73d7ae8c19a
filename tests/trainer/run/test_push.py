"""An export goes to a hub and back byte for byte, and never over something else: against a stand-in for the hub.

The stand-in (tests/models/teacher/small_hub_uploads.py) takes uploads as git LFS; the real hub, and Xet, were not used.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from secondcast.models.student.student import new_student, save_student
from secondcast.models.teacher.folder import find_teacher
from secondcast.trainer.run.export import export
from secondcast.trainer.run.export_facts import FACTS_FILE, ExportFacts
from tests.models.teacher.small_hub import ROOT, run_apart, serve
from tests.models.teacher.small_hub_uploads import ATTRIBUTES, UploadHub, Uploads, repository

pytestmark = pytest.mark.thorough

COMMANDS = """
import contextlib, io, json, os, sys
from secondcast import cli
for token, words in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    sys.argv, output = ["secondcast", *words], io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, output.getvalue()]))
"""
DOWNLOAD = """
import os, sys
from huggingface_hub import snapshot_download
from secondcast.models.student.student import load_student
from secondcast.models.weights.files import CheckpointSource
from secondcast.models.weights.hub import local_weights
from secondcast.storage_schemas.errors import StudentError
from pathlib import Path
load_student(Path(snapshot_download("me/student", local_dir=sys.argv[1])))
# As `train --student me/student` reads it.
folder = local_weights("me/student", CheckpointSource(where="me/student", error=StudentError, again=""))
assert (folder / "model.safetensors").read_bytes() == (Path(sys.argv[1]) / "model.safetensors").read_bytes()
"""
FACTS = ExportFacts(
    teacher="black-forest-labs/FLUX.1-dev",
    teacher_digest="a",
    sampling_digest="b",
    text_length=12,
    guidance=(3.5,),
    settings={},
    checkpoint="checkpoint-00000003",
    validation_loss=0.5,
    replay_error=0.0,
    created_by="secondcast 0",
)


@pytest.fixture(scope="module")
def student(tmp_path_factory, dev_teacher, t5_config) -> Path:
    folder = tmp_path_factory.mktemp("student")
    teacher = find_teacher(str(dev_teacher), ())
    identity = teacher.identity(text_length=12, hashed=False)
    made = new_student(str(t5_config), identity, init="random", dropout=0.0, seed=0)
    save_student(made, folder / "plain", tokenizer=teacher.tokenizer_files())
    (folder / "plain" / FACTS_FILE).write_text(FACTS.model_dump_json())
    Image.new("RGB", (8, 8), "red").save(folder / "sheet.png")
    export(folder / "plain", folder / "s", picture=folder / "sheet.png")
    (folder / "plain" / FACTS_FILE).unlink()
    return folder / "s"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def run(commands: list, home: Path, **environment: str) -> list:
    lines = run_apart(COMMANDS, json.dumps(commands), home=home, **environment).splitlines()
    return [json.loads(line) for line in lines]


def test_a_student_goes_there_and_back_byte_for_byte_and_is_sent_once(student, tmp_path):
    uploads, repositories = Uploads(), {}
    command = ["hf_owner", ["export", str(student), "--push", "me/student", "--quiet"]]
    with serve(repositories, UploadHub, uploads=uploads) as address:
        first, again = run([command, command], tmp_path, HF_ENDPOINT=address)
        run_apart(DOWNLOAD, str(tmp_path / "back"), home=tmp_path, HF_ENDPOINT=address, HF_TOKEN="hf_owner")
    count = len(contents(student))
    back = "`hf download me/student --local-dir FOLDER` brings it back\n"
    assert first == [0, f"{address}/me/student (private): {count} files; {back}"]
    assert again == [0, f"{address}/me/student (private): no change; {back}"]
    assert sorted(uploads.requests) == ["commit", "create", "put", "put", "put"]
    assert contents(tmp_path / "back") == contents(student) | {".gitattributes": ATTRIBUTES}
    card = contents(student)["README.md"].decode()
    assert "\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n" in card and "](samples.png)" in card


def test_an_interrupted_push_changes_nothing_and_a_repeated_one_sends_only_what_had_not_arrived(student, tmp_path):
    uploads, repositories = Uploads(), {}
    words = ["export", str(student), "--push", "me/student"]

    def killed_at(kind: str, number: int, address: str) -> None:
        numbers = itertools.count(1)
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        script = [sys.executable, "-c", COMMANDS, json.dumps([["hf_owner", words]])]
        process = subprocess.Popen(script, cwd=ROOT, env=environment)

        def arrives(found: str) -> bool:
            if found != kind or next(numbers) < number:
                return True
            process.kill()
            return False

        uploads.before = arrives
        assert process.wait(timeout=120) == -signal.SIGKILL
        uploads.before = lambda found: True
        assert repositories["me/student"].files == {".gitattributes": ATTRIBUTES}

    with serve(repositories, UploadHub, uploads=uploads) as address:
        killed_at("put", 2, address)
        arrived = len(uploads.objects)
        killed_at("commit", 1, address)
        assert uploads.requests.count("put") == len(uploads.objects) == 3 and arrived < 3
        (done,) = run([["hf_owner", words]], tmp_path, HF_ENDPOINT=address)
    assert done[0] == 0, done
    assert sorted(uploads.requests) == ["commit", "create", "put", "put", "put"]
    assert repositories["me/student"].files == contents(student) | {".gitattributes": ATTRIBUTES}


def test_a_repository_of_an_earlier_push_loses_its_old_weights_alone_and_keeps_its_visibility(student, tmp_path):
    kept = {"LICENSE": b"l", "pictures/a.png": b"p"}
    old = {FACTS_FILE: b"{}", "model-00001-of-00002.safetensors": b"w", "added_tokens.json": b"{}"}
    repositories = {name: repository(kept | old, private=name != "me/seen") for name in ("me/student", "me/seen")}
    push = ["export", str(student), "--push"]
    commands = [[*push, "me/student"], [*push, "me/seen"], [*push, "me/student", "--public"]]
    with serve(repositories, UploadHub, uploads=Uploads()) as address:
        done = run([["hf_owner", words] for words in commands], tmp_path, HF_ENDPOINT=address)
    shown = [re.search(r"\((private|public)\): (no change)?", text).groups() for _, text in done]
    assert shown == [("private", None), ("public", None), ("public", "no change")]
    assert all(found.files == contents(student) | kept and not found.private for found in repositories.values())


def test_what_cannot_be_pushed_is_one_line_and_changes_nothing(student, tmp_path):
    uploads = Uploads()
    other = repository({".gitattributes": ATTRIBUTES, "README.md": b"", "model.bin": b"w"})
    repositories = {"me/other": other, "me/mine": repository({FACTS_FILE: b"{}"})}
    plain, out = student.with_name("plain"), tmp_path / "o"
    cases = {
        "no token": ("", [student, "--push", "me/x"], r"--push me/x needs a token for the hub, and there is none: run"),
        "token": (
            "hf_old",
            [student, "--push", "me/x"],
            r"the hub does not accept the token: run `hf auth login` wi",
        ),
        "role": (
            "hf_reader",
            [student, "--push", "me/x"],
            r"the token may not write to me/x: give one with write ",
        ),
        "owner": (
            "hf_owner",
            [student, "--push", "you/x"],
            r"the token may not write to you/x: .* for you ",
        ),
        "gated": ("hf_owner", [student, "--push", "someone/gated"], r"someone/gated is gated: accept its terms on its"),
        "files": (
            "hf_owner",
            [student, out, "--push", "me/other"],
            r"me/other has README.md and 1 more files but no secondcast.json, so `secondcast export` did not write it: "
            r"nothing was uploaded; give an empty or a new repository",
        ),
        "again": (
            "hf_owner",
            [plain, student, "--push", "me/x"],
            r".*/s is an export already: upload it by `secondcast export .*/s --push me/x`, or give a new folder$",
        ),
        "facts": ("hf_owner", [plain, "--push", "me/x"], r".*plain has no secondcast.json, by which a later --push"),
        "no student": ("", [tmp_path / "nix", "--push", "me/x"], r"no student .*nix: there is no such folder"),
        "name": ("hf_owner", [student, "--push", "x"], r"--push is 'x', expected OWNER/NAME, such as me/my-student"),
        "form": ("hf_owner", [student, "c.safetensors", "--to", "comfyui", "--push", "me/x"], r"--push uploads a fold"),
        "public": ("hf_owner", [student, out, "--public"], r"--public is given without --push: add --push OWNER/NAME"),
        "out": ("hf_owner", [student], r"OUT is missing: give a new folder for the export$"),
        "quantize": ("hf_owner", [student, "--push", "me/x", "--quantize", "int8"], r"--quantize is given without OUT"),
        "scores": ("hf_owner", [student, out, "--scores", "t.json"], r"--scores is t.json, expected a Markdown file"),
        "no scores": ("hf_owner", [student, out, "--scores", "t.md"], r"--scores t.md cannot be read \(No such file"),
    }
    raced = (
        r"me/mine was made or changed by somebody else meanwhile \(status 412\): run `secondcast export .*/s --push "
        r"me/mine` to upload the export, which is complete in .*/s$"
    )
    cases["race"] = ("hf_owner", [student, "--push", "me/mine"], raced)

    def changed_meanwhile(kind: str) -> bool:
        repositories["me/mine"].commit = "f" * 40
        return True

    uploads.before = changed_meanwhile
    commands = [[token, ["export", *map(str, words)]] for token, words, _ in cases.values()]
    with serve(repositories, UploadHub, uploads=uploads) as address:
        results = run(commands, tmp_path, HF_ENDPOINT=address)
    for (code, text), (name, (_, _, message)) in zip(results, cases.items(), strict=True):
        last = text.splitlines()[-1]
        assert code == 1 and re.match(f"secondcast: {message}", last), (name, text)
    # That of the other owner, whose repository the hub itself refuses to create, and those of the last case.
    assert uploads.requests[0] == "create" and sorted(uploads.requests[1:]) == ["commit", "put", "put", "put"]
    assert repositories["me/mine"].files == {FACTS_FILE: b"{}"} and other.files.keys() >= {"model.bin"}
    assert not out.exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, r"http://127.0.0.1:9 cannot be reached \(\w+: .+\): check the network"),
        ({"HF_HUB_OFFLINE": "1"}, "--push me/x needs the network, but HF_HUB_OFFLINE is set: unset it"),
    ],
)
def test_without_a_network_a_push_is_one_line(student, tmp_path, environment, message):
    ((code, text),) = run([["hf_owner", ["export", str(student), "--push", "me/x"]]], tmp_path, **environment)
    assert code == 1 and re.match(f"secondcast: {message}", text.splitlines()[-1]), text
