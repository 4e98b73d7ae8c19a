"""A teacher on disk: a folder (or hub repository) in the FluxPipeline layout."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secondcast.models.teacher.family import check_family, config_name, read_config
from secondcast.models.teacher.hub import commit_of, download, split_revision
from secondcast.models.weights.files import CheckpointSource
from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.io.digests import weight_sha256
from secondcast.storage_schemas.schema.manifest import Pooled, Teacher

# The paper's text length (section 4); a teacher whose tokenizer is shorter states its own.
PAPER_TEXT_LENGTH = 77
# The paper's resolution for its first two stages; a teacher whose VAE is smaller states its own.
PAPER_RESOLUTION = 512

BUILD_PARTS = ("transformer", "scheduler", "text_encoder_2", "tokenizer_2", "vae")
# Additional parts if CLIP's pooled output is recorded.
POOLED_PARTS = ("text_encoder", "tokenizer")
REPLAY_PARTS = ("transformer",)
DECODE_PARTS = ("vae",)
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
POOLED_TOKENIZER_FILES = ("vocab.json", "merges.txt", *TOKENIZER_FILES[1:])


def part_source(part: Path) -> CheckpointSource:
    """The source of a teacher part's weights, for errors."""
    return CheckpointSource(where=str(part), error=TeacherError, again="download it again")


def build_parts(pooled: Pooled) -> tuple[str, ...]:
    """The parts that a build reads."""
    return BUILD_PARTS if pooled == "zero" else (*BUILD_PARTS, *POOLED_PARTS)


@dataclass(frozen=True, kw_only=True)
class TeacherFolder:
    """A local folder in the FluxPipeline layout; `source` is the name as given, `commit` that of the hub."""

    path: Path
    source: str
    commit: str | None = None

    @property
    def pinned_source(self) -> str:
        """A name that identifies the same files: NAME@COMMIT for a download from the hub."""
        return self.source if self.commit is None else f"{self.source}@{self.commit}"

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part, without the keys that state its origin."""
        config = read_config(self.part(part) / config_name(part), part)
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def part(self, part: str) -> Path:
        """The folder of a part; TeacherError if it is not there."""
        folder = self.path / part
        if not folder.is_dir():
            raise TeacherError(
                f"{self.path} has no {part}/, expected a folder in the FluxPipeline layout with {part}/: download the "
                f"whole repository, or give another --teacher"
            )
        return folder

    def weights(self, part: str) -> list[Path]:
        """The safetensors files of a part, sorted."""
        files = sorted(self.part(part).glob("*.safetensors"))
        if not files:
            raise TeacherError(f"{self.part(part)} has no *.safetensors: download {part}/ again")
        return files

    def weight_hashes(self, part: str) -> dict[str, str]:
        """sha256 of each weight file of a part, by its path in the folder."""
        return {f"{part}/{file.name}": weight_sha256(file) for file in self.weights(part)}

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the T5 tokenizer, which the cache includes."""
        return self._files("tokenizer_2", TOKENIZER_FILES)

    def _files(self, part: str, names: tuple[str, ...]) -> dict[str, bytes]:
        folder = self.part(part)
        return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}

    @property
    def text_length(self) -> int:
        """Text tokens: the paper's 77, or what the tokenizer states if that is less."""
        config = read_config(self.part("tokenizer_2") / "tokenizer_config.json", "tokenizer_2")
        return min(PAPER_TEXT_LENGTH, int(config.get("model_max_length", PAPER_TEXT_LENGTH)))

    @property
    def resolution(self) -> int:
        """Pixels per side: the paper's 512, or what the VAE states if that is less."""
        return min(PAPER_RESOLUTION, int(self.config("vae").get("sample_size", PAPER_RESOLUTION)))

    def identity(self, *, text_length: int, pooled: Pooled = "zero", hashed: bool = True) -> Teacher:
        """The identity of this teacher, with hashes of the weights of transformer and text encoders.

        hashed: False omits the hashes, so that only configuration files are read, for planning.
        """
        backbone, text_encoder = self.config("transformer"), self.config("text_encoder_2")
        self._check_width("text_encoder_2", "d_model", text_encoder, "joint_attention_dim", backbone)
        return Teacher(
            family="flux",
            weights=self._weights(pooled) if hashed else {},
            backbone_config=backbone,
            text_encoder_config=text_encoder,
            tokenizer=_sha256_of(self.tokenizer_files()),
            text_length=text_length,
            text_width=backbone["joint_attention_dim"],
            pad_token_id=text_encoder.get("pad_token_id") or 0,
            pooled=pooled,
            pooled_width=backbone["pooled_projection_dim"],
            **(self._pooled_identity(backbone) if pooled == "clip" else {}),
        )

    def _weights(self, pooled: Pooled) -> dict[str, str]:
        parts = ("transformer", "text_encoder_2", *(("text_encoder",) if pooled == "clip" else ()))
        return {path: checksum for part in parts for path, checksum in self.weight_hashes(part).items()}

    def _pooled_identity(self, backbone: dict[str, Any]) -> dict[str, Any]:
        config = self.config("text_encoder")
        self._check_width("text_encoder", "hidden_size", config, "pooled_projection_dim", backbone)
        tokenizer = _sha256_of(self._files("tokenizer", POOLED_TOKENIZER_FILES))
        return {"pooled_encoder_config": config, "pooled_tokenizer": tokenizer}

    def _check_width(self, part: str, key: str, config: dict[str, Any], read: str, backbone: dict[str, Any]) -> None:
        if config[key] != backbone[read]:
            raise TeacherError(
                f"{self.path}/{part} has {key} = {config[key]}, but its transformer has {read} = {backbone[read]}: "
                "they are parts of two models; download the whole repository again"
            )


def _sha256_of(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def check_recorded_transformer(teacher: TeacherFolder, recorded: Teacher) -> None:
    """Raise TeacherError, naming the first file, unless a cache was recorded with this transformer's weights."""
    expected = {name: value for name, value in recorded.weights.items() if name.startswith("transformer/")}
    found = teacher.weight_hashes("transformer")
    if found != expected:
        name = next(name for name in sorted(expected | found) if expected.get(name) != found.get(name))
        raise TeacherError(
            f"{teacher.path}/{name} has sha256 {str(found.get(name))[:16]}, but the cache was recorded with "
            f"{str(expected.get(name))[:16]}, another model: give the recorded one with --backbone"
        )


def find_teacher(
    name: str, parts: tuple[str, ...], *, revision: str | None = None, files: Sequence[str] = ("*",)
) -> TeacherFolder:
    """A teacher by folder, hub name or NAME@REVISION, with `parts` available; raises TeacherError.

    files: patterns of the files of each part to download from the hub.
    """
    path = Path(name)
    if path.is_file():
        raise TeacherError(
            f"{name} is a file, expected a folder in the FluxPipeline layout or a hub name: single-file checkpoints "
            "are not supported; give the folder"
        )
    if path.is_dir():
        if revision is not None:
            raise TeacherError(
                f"--revision is {revision!r}, but {name} is a folder, and only hub repositories have revisions: remove "
                "it"
            )
        folder = TeacherFolder(path=path, source=name)
    else:
        source, named = split_revision(name)
        if revision is not None and named is not None and revision != named:
            raise TeacherError(f"--revision is {revision!r}, but {name!r} names another one: give one of the two")
        path = download(source, [f"{part}/{file}" for part in parts for file in files], revision or named)
        folder = TeacherFolder(path=path, source=source, commit=commit_of(path))
    for part in parts:
        folder.part(part)
    check_family(folder.path, parts)
    return folder
