"""Make, load and save students."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import T5Config, T5EncoderModel

from models import student_network
from models.distillt5 import is_published_form, load_published, student_config
from models.student_network import StudentConfig, UnderstudyStudent
from storage_schemas.errors import BadStudent
from storage_schemas.manifest import Teacher

CHECKPOINT_PREFIX = "checkpoint-"
BEST_FILE = "best.json"
_MODELLING_FILE = Path(student_network.__file__)


def new_student(source: str, teacher: Teacher, *, init: str, dropout: float, seed: int) -> UnderstudyStudent:
    """A student that fits a teacher, fp32.

    source: folder (or hub name) of a T5 encoder, of its config.json alone, or of an earlier export.
    init: "pretrained", "random" or "auto" (pretrained where there are weights). dropout: in T5 and projection.
    Raises BadStudent for a width or vocabulary that does not fit the cache's teacher.
    """
    config = _t5_config(source)
    pretrained = init == "pretrained" or (init == "auto" and _has_weights(source))
    if isinstance(config, StudentConfig) and pretrained:
        return _continued(source, config, teacher, dropout)
    if config.vocab_size < teacher.text_encoder_config["vocab_size"]:
        raise BadStudent(
            f"{source} has a vocabulary of {config.vocab_size}, the cache's token ids go up to "
            f"{teacher.text_encoder_config['vocab_size'] - 1}: take a student of the teacher's tokenizer"
        )
    torch.manual_seed(seed)
    settings = {key: value for key, value in config.to_dict().items() if key not in _OWN_KEYS}
    settings |= {"dropout_rate": dropout, "architectures": None}
    student = UnderstudyStudent(
        StudentConfig(
            project_in_dim=config.d_model,
            project_out_dim=teacher.text_width,
            projection_dropout=dropout,
            text_length=teacher.text_length,
            **settings,
        )
    )
    if pretrained:
        encoder = T5EncoderModel.from_pretrained(source, torch_dtype=torch.float32)
        student.encoder.load_state_dict(encoder.state_dict())
    return student.float()


_OWN_KEYS = (
    "project_in_dim",
    "project_out_dim",
    "projection_dropout",
    "text_length",
    "model_type",
    "auto_map",
)


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted(run.glob(f"{CHECKPOINT_PREFIX}*"))


def student_folder(path: Path) -> Path:
    """Where the student of a run folder (its best checkpoint, else its last) or of an export lies."""
    if path.is_file():
        raise BadStudent(
            f"{path} is one file, which holds neither a configuration nor a tokenizer: give the run folder, or an "
            f"export --to diffusers"
        )
    if not path.is_dir():
        raise BadStudent(f"no student {path}: expected a run folder, or what `understudy export` wrote")
    found = checkpoints(path)
    marker = path / BEST_FILE
    if marker.is_file():
        best = path / json.loads(marker.read_bytes())["checkpoint"]
        if best.is_dir():
            return best / "student"
    if found:
        return found[-1] / "student"
    if (path / "metrics.jsonl").exists() or "settings" in _config_of(path):
        raise BadStudent(f"{path} has no checkpoint yet: give the `understudy train` command again to go on")
    _check_is_student(path)
    return path


def untrained_like(student: UnderstudyStudent, *, seed: int) -> UnderstudyStudent:
    """A student of the same shape with random weights, in eval mode: what training began with, or might have."""
    torch.manual_seed(seed)
    return UnderstudyStudent(copy.deepcopy(student.config)).float().eval()


def load_student(folder: Path) -> UnderstudyStudent:
    """A saved student, fp32, in eval mode, ours or in DistillT5's form; BadStudent if the folder holds none."""
    _check_is_student(folder)
    try:
        if is_published_form(_config_of(folder)):
            return load_published(folder).eval()
        return UnderstudyStudent.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise BadStudent(f"{folder} cannot be loaded ({reason}): export the run again") from error


def save_student(student: UnderstudyStudent, folder: Path, *, tokenizer: dict[str, bytes] | None) -> None:
    """Write what FluxPipeline takes as text_encoder_2: config, safetensors, modelling file, tokenizer files."""
    student.save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    name = _MODELLING_FILE.stem
    config["auto_map"] = {
        "AutoConfig": f"{name}.StudentConfig",
        "AutoModel": f"{name}.UnderstudyStudent",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(_MODELLING_FILE, folder / _MODELLING_FILE.name)
    for file_name, data in sorted((tokenizer or {}).items()):
        (folder / file_name).write_bytes(data)
    for file in folder.iterdir():
        # safetensors writes files that only their owner can read.
        file.chmod(0o644)


def check_fits(student: UnderstudyStudent, text_width: int, where: str) -> None:
    """Raise BadStudent unless a student's embeddings are as wide as the backbone reads them."""
    if student.config.project_out_dim != text_width:
        raise BadStudent(
            f"{where} gives embeddings {student.config.project_out_dim} wide, this teacher reads {text_width}: "
            f"a student fits the teacher it was trained for; train one from this cache"
        )


def _continued(source: str, config: StudentConfig, teacher: Teacher, dropout: float) -> UnderstudyStudent:
    student = load_student(Path(source))
    check_fits(student, teacher.text_width, source)
    student.config.dropout_rate = dropout
    # What it is trained at from now on; an export states the rest anew.
    student.config.text_length = teacher.text_length
    if hasattr(student.config, "trained_guidance"):
        del student.config.trained_guidance
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return student


def _t5_config(source: str) -> T5Config:
    file = Path(source) / "config.json"
    if Path(source).is_dir():
        if not file.is_file():
            raise BadStudent(f"{source} has no config.json: expected a T5 encoder, a config of one, or an export")
        found = _config_of(Path(source))
        kind = found.get("model_type")
        if kind == StudentConfig.model_type:
            return StudentConfig.from_pretrained(source)
        if is_published_form(found):
            return student_config(found)
        if kind != "t5":
            raise BadStudent(f"{source} is a {kind!r} model, expected t5: this version trains T5 students")
        return T5Config.from_pretrained(source)
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise BadStudent(f"no student {source!r}: expected a folder, or a hub name such as google-t5/t5-base")
    try:
        return T5Config.from_pretrained(source)
    except Exception as error:
        raise BadStudent(
            f"no student {source!r}: neither a folder here nor fetched from the hub ({type(error).__name__}); "
            f"give a folder, or a hub name such as google-t5/t5-base"
        ) from error


def _has_weights(source: str) -> bool:
    return not Path(source).is_dir() or any(Path(source).glob("*.safetensors"))


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_is_student(folder: Path) -> None:
    config = _config_of(folder)
    kind = config.get("model_type")
    if kind != StudentConfig.model_type and not is_published_form(config):
        raise BadStudent(
            f"{folder} holds no student (config.json says {kind!r}, expected {StudentConfig.model_type!r}): "
            f"give a run folder, or what `understudy export` wrote"
        )
