"""The node for ComfyUI gives a student's embeddings: against a stub of what it uses of ComfyUI, which is not installed.

The stub has folder_paths, three devices and free_memory of comfy.model_management, and the two methods of a CLIP.
"""

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from secondcast.models.student.encoder_student import new_encoder_student
from secondcast.models.student.student import load_student, save_student
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import find_teacher
from secondcast.trainer.run.export import export
from tests.models.student.encoders import make_encoder_folder
from tests.project.programs import run_program

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "integrations/comfyui"
LENGTH = 12
PROMPT = "a red dog on the left"


class StubClip:
    """A CLIP-L that notes how its pooled output was asked for."""

    def __init__(self, width: int = 768):
        self.pooled, self.requests = torch.randn(1, width), []

    def tokenize(self, text: str) -> str:
        return f"tokens of {text}"

    def encode_from_tokens(self, tokens: str, return_pooled: bool | str = False) -> tuple:
        self.requests.append((tokens, return_pooled))
        return torch.zeros(1, 77, 768), self.pooled


@pytest.fixture(scope="module")
def models(tmp_path_factory, dev_teacher) -> Path:
    """ComfyUI's models folder with exports of FLUX.1's width."""
    models = tmp_path_factory.mktemp("comfyui") / "models"
    saved = models.parent / "saved"
    teacher = find_teacher(str(dev_teacher), ())
    small = {"vocab_size": 200, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    projection = {"project_in_dim": 16, "project_out_dim": 4096, "projection_rank": 4}
    torch.manual_seed(0)
    t5 = SecondcastStudent(StudentConfig(**small, **projection, text_length=LENGTH)).eval()
    save_student(t5, saved / "t5", tokenizer=teacher.tokenizer_files())
    identity = teacher.identity(text_length=LENGTH, hashed=False).model_copy(update={"text_width": 4096})
    source = make_encoder_folder(models.parent / "bert")
    bert = new_encoder_student(str(source), identity, pretrained=True, dropout=0.0, seed=0, projection_rank=4)
    save_student(bert, saved / "bert", tokenizer=own_tokens(source, bert).files)
    for name in ("t5", "bert"):
        export(saved / name, models / "secondcast" / name)
    export(saved / "t5", models / "secondcast/t5-int8", quantize="int8")
    return models


@pytest.fixture
def comfyui(models, monkeypatch):
    """The node's module as ComfyUI imports it: a package by its file, beside its own modules."""
    paths = types.ModuleType("folder_paths")
    paths.models_dir, found = str(models), {}
    paths.add_model_folder_path = lambda name, path: found.setdefault(name, []).append(path)
    paths.get_folder_paths = lambda name: found[name][:]
    comfy, management = types.ModuleType("comfy"), types.ModuleType("comfy.model_management")
    cpu = torch.device("cpu")
    management.text_encoder_device = management.text_encoder_offload_device = management.intermediate_device = lambda: (
        cpu
    )
    management.freed = []
    management.free_memory = lambda size, device: management.freed.append((size, device))
    comfy.model_management = management
    for module in (paths, comfy, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location(
        "a_custom_node", NODE / "__init__.py", submodule_search_locations=[str(NODE)]
    )
    node = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_custom_node", node)
    spec.loader.exec_module(node)
    yield node
    sys.modules.pop("a_custom_node.text_encoder")


def ids_of(folder: Path, text: str, student) -> torch.Tensor:
    """As training makes them: by the student's own tokenizer, else by the teacher's as its pipeline calls it."""
    if own := own_tokens(folder, student):
        return own.batch([text])
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast.from_pretrained(folder)
    return tokenizer(text, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


@pytest.mark.parametrize("name", ["t5", "t5-int8", "bert"])
@pytest.mark.parametrize("text", [PROMPT, "", f"{PROMPT}, {PROMPT}, {PROMPT}"])
def test_the_node_gives_the_embedding_of_the_student_at_its_own_length(comfyui, models, name, text, caplog):
    node = comfyui.NODE_CLASS_MAPPINGS["SecondcastTextEncoder"]
    (((embedding_1TD, extra),),) = getattr(node(), node.FUNCTION)(student=name, text=text)
    student = load_student(models / "secondcast" / name)
    with torch.no_grad():
        expected_1TD = student(ids_of(models / "secondcast" / name, text, student)).last_hidden_state
    assert embedding_1TD.shape == (1, LENGTH, 4096) and torch.equal(embedding_1TD, expected_1TD)
    assert list(extra) == ["pooled_output"] and torch.equal(extra["pooled_output"], torch.zeros(1, 768))
    assert ("cut to the 12 tokens" in caplog.text) == (text.count(PROMPT) == 3)


def test_the_pooled_output_is_clips_before_its_text_projection(comfyui):
    node, clip = comfyui.NODE_CLASS_MAPPINGS["SecondcastTextEncoder"](), StubClip()
    (((_, extra),),) = node.encode(student="t5", text=PROMPT, clip=clip)
    assert extra["pooled_output"] is clip.pooled and clip.requests == [(f"tokens of {PROMPT}", "unprojected")]
    with pytest.raises(ValueError, match="768 wide in FLUX.1, found one 1280 wide: load clip_l"):
        node.encode(student="t5", text=PROMPT, clip=StubClip(1280))


class FailingStudent(torch.nn.Module):
    """Notes where it was moved to, and fails there."""

    def __init__(self):
        super().__init__()
        self.weight, self.moves = torch.nn.Parameter(torch.zeros(3, 5)), []
        self.config = types.SimpleNamespace(text_length=LENGTH)

    def to(self, device):
        self.moves.append(str(device))
        return self

    def forward(self, ids_BT):
        raise RuntimeError(f"out of memory on {ids_BT.device}")


def test_on_a_gpu_memory_is_asked_for_and_the_student_goes_back(comfyui, models, monkeypatch):
    module, student = sys.modules["a_custom_node.text_encoder"], FailingStudent()
    _, tokenizer = module._loaded(models / "secondcast/t5", 0)
    monkeypatch.setattr(module.model_management, "text_encoder_device", lambda: torch.device("meta"))
    with pytest.raises(RuntimeError, match="out of memory on meta"):
        module.embedding_of(PROMPT, student, tokenizer)
    assert student.moves == ["meta", "cpu"]
    assert module.model_management.freed == [(3 * 5 * 4, torch.device("meta"))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "t5"},
            r"has model_type 't5', expected secondcast_student or secondcast_encoder_student: gi",
        ),
        ({"project_out_dim": 2560}, r"a student of flux with embeddings 2560 wide, expected one of FLUX.1, 4096 wide"),
        ({"auto_map": {"AutoModel": "a/b--c.D"}}, r"takes its code from elsewhere \(a/b--c.D\): give an export as it"),
        (None, r"config.json cannot be read \(Expecting value.*\): copy the export again"),
    ],
)
def test_what_is_no_student_of_flux_is_refused_before_its_code_runs(comfyui, models, change, message):
    folder = shutil.copytree(models / "secondcast/t5", models / "secondcast/other")
    try:
        (folder / "student_network.py").write_text("raise SystemExit")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text("x" if change is None else json.dumps(config | change))
        node = comfyui.NODE_CLASS_MAPPINGS["SecondcastTextEncoder"]
        assert node.INPUT_TYPES()["required"]["student"] == (["bert", "other", "t5", "t5-int8"],)
        with pytest.raises(ValueError, match=message):
            node().encode(student="other", text=PROMPT)
    finally:
        shutil.rmtree(folder)


def test_a_student_of_another_family_or_place_is_refused(comfyui, models, tmp_path):
    node = comfyui.NODE_CLASS_MAPPINGS["SecondcastTextEncoder"]()
    for name in ("../bert", str(models / "secondcast/t5"), "none"):
        with pytest.raises(ValueError, match=r"no student .* in ComfyUI/models/secondcast: found bert, t5, t5-int8"):
            node.encode(student=name, text=PROMPT)
    folder = shutil.copytree(models / "secondcast/t5", tmp_path / "sd3")
    (folder / "secondcast.json").write_text('{"family": "sd3"}')
    with pytest.raises(ValueError, match=r"sd3 is a student of sd3 with embeddings 4096 wide, expected one of FLUX.1"):
        sys.modules["a_custom_node.text_encoder"].check_student(folder)


def test_the_example_workflow_links_nodes_that_it_has_and_gives_ours_what_it_takes(comfyui):
    workflow = json.loads((NODE / "workflow.json").read_text())
    ours = [node["inputs"] for node in workflow.values() if node["class_type"] in comfyui.NODE_CLASS_MAPPINGS]
    taken = comfyui.NODE_CLASS_MAPPINGS["SecondcastTextEncoder"].INPUT_TYPES()
    assert [set(inputs) for inputs in ours] == [{*taken["required"], *taken["optional"]}]
    links = [value for node in workflow.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert links and all(source in workflow and output == 0 for source, output in links)
    assert workflow[ours[0]["clip"][0]]["class_type"] == "CLIPLoader"


STUB = """
import sys, types
paths, comfy, management = (types.ModuleType(name) for name in ("folder_paths", "comfy", "comfy.model_management"))
paths.models_dir, paths.add_model_folder_path, paths.get_folder_paths = sys.argv[1], lambda *_: None, lambda _: []
comfy.model_management = management
sys.modules |= {"folder_paths": paths, "comfy": comfy, "comfy.model_management": management}
sys.path.insert(0, sys.argv[2])
import comfyui
assert "secondcast" not in sys.modules and list(comfyui.NODE_CLASS_MAPPINGS) == ["SecondcastTextEncoder"]
"""


@pytest.mark.thorough
def test_the_node_is_imported_where_secondcast_is_not_installed(models, tmp_path):
    run_program(STUB, tmp_path, models, NODE.parent, without_us=True)
