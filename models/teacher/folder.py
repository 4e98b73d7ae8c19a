"""A teacher on disk: a folder (or hub repository) in the layout of a pipeline of diffusers."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from secondcast.models.families.family import Family, Role
from secondcast.models.geometry import Geometry, geometry_of
from secondcast.models.teacher.configs import check_parts, config_name, family_of_folder, read_config
from secondcast.models.teacher.hub import commit_of, download, split_revision
from secondcast.models.teacher.pipeline_inputs import ImageSize
from secondcast.models.weights.files import CheckpointSource
from secondcast.storage_schemas.errors import SettingsError, TeacherError
from secondcast.storage_schemas.io.digests import weight_sha256
from secondcast.storage_schemas.schema.manifest import ConditioningArray, Teacher
from secondcast.storage_schemas.schema.recording import Pooled

# The paper's resolution for its first two stages; a teacher whose VAE is smaller states its own.
PAPER_RESOLUTION = 512

BUILD_PARTS: tuple[Role, ...] = ("transformer", "scheduler", "large_text_encoder", "large_tokenizer", "vae")
# Additional parts if CLIP's pooled output is recorded.
POOLED_PARTS: tuple[Role, ...] = ("pooled_text_encoder", "pooled_tokenizer")
REPLAY_PARTS: tuple[Role, ...] = ("transformer",)
DECODE_PARTS: tuple[Role, ...] = ("vae",)
POOLED_TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)


def part_source(part: Path) -> CheckpointSource:
    """The source of a teacher part's weights, for errors."""
    return CheckpointSource(where=str(part), error=TeacherError, again="download it again")


def build_parts(pooled: Pooled | None) -> tuple[Role, ...]:
    """The parts that a build reads; pooled: as asked for."""
    return BUILD_PARTS if pooled != "clip" else (*BUILD_PARTS, *POOLED_PARTS)


def needed_parts(family: Family, parts: Sequence[Role]) -> tuple[Role, ...]:
    """These parts of a teacher, and what its family needs with them: all text encoders beside the large one, or none.

    Who reads the scheduler begins trajectories; a family whose pooled vectors are never zero then needs all encoders.
    """
    begins = "zero" not in family.pooled and "scheduler" in parts
    wanted = [*parts, *(POOLED_PARTS if begins else ())]
    if not set(POOLED_PARTS).isdisjoint(wanted):
        wanted += [role for pair in family.conditioning_roles for role in pair]
    # A family without pooled vectors has no CLIP.
    return tuple(role for role in dict.fromkeys(wanted) if role in family.parts)


@dataclass(frozen=True, kw_only=True)
class TeacherFolder:
    """A local folder in the layout of a pipeline; `source` is the name as given, `commit` that of the hub."""

    path: Path
    source: str
    commit: str | None = None

    @cached_property
    def family(self) -> Family:
        """The family that model_index.json states."""
        return family_of_folder(self.path)

    @property
    def pinned_source(self) -> str:
        """A name that identifies the same files: NAME@COMMIT for a download from the hub."""
        return self.source if self.commit is None else f"{self.source}@{self.commit}"

    def config(self, role: Role) -> dict[str, Any]:
        """The configuration of a part, without the keys that state its origin.

        And without infinite values, which JSON of manifests does not have: diffusers writes one, lambda_min_clipped of
        schedulers, which is the default.
        """
        part = self.part(role)
        config = read_config(part / config_name(part.name), part.name)
        return {key: value for key, value in config.items() if not key.startswith("_") and value != -math.inf}

    def part(self, role: Role) -> Path:
        """The folder of a part; TeacherError if it is not there."""
        name = self.family.parts[role].folder
        folder = self.path / name
        if not folder.is_dir():
            raise TeacherError(
                f"{self.path} has no {name}/, expected a folder in the {self.family.pipeline} layout with {name}/: "
                f"download the whole repository, or give another --teacher"
            )
        return folder

    def has(self, role: Role) -> bool:
        """Whether the folder has a part with its configuration."""
        part = self.family.parts.get(role)
        return part is not None and (self.path / part.folder / config_name(part.folder)).is_file()

    def weights(self, role: Role) -> list[Path]:
        """The safetensors files of a part, sorted."""
        part = self.part(role)
        files = sorted(part.glob("*.safetensors"))
        if not files:
            raise TeacherError(f"{part} has no *.safetensors: download {part.name}/ again")
        return files

    def weight_hashes(self, role: Role) -> dict[str, str]:
        """sha256 of each weight file of a part, by its path in the folder."""
        return {f"{file.parent.name}/{file.name}": weight_sha256(file) for file in self.weights(role)}

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the large text encoder's tokenizer, which the cache includes."""
        return self._files("large_tokenizer", self.family.tokenizer_files)

    @property
    def pad_token_id(self) -> int:
        """The token id that pads the token ids of a cache."""
        return self.family.pad_token_id(self.config("large_text_encoder"), self.tokenizer_files())

    def _files(self, role: Role, names: tuple[str, ...]) -> dict[str, bytes]:
        folder = self.part(role)
        return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}

    @property
    def text_length(self) -> int:
        """Text tokens: the family's, or what the tokenizer states if that is less."""
        part, usual = self.part("large_tokenizer"), self.family.text_length
        return min(usual, int(read_config(part / "tokenizer_config.json", part.name).get("model_max_length", usual)))

    def checked_text_length(self, asked: int | None) -> int:
        """The requested number of text tokens, or its own for None; SettingsError if the pipeline does not take it."""
        if asked is not None and asked > self.family.largest_text_length:
            raise SettingsError(
                f"--text-length is {asked}, expected at most {self.family.largest_text_length}, the most that "
                f"{self.family.pipeline} takes or its models were trained with: give a smaller one"
            )
        return asked or self.text_length

    @property
    def resolution(self) -> int:
        """Pixels per side: the paper's 512, or what the VAE states if that is less."""
        return min(PAPER_RESOLUTION, int(self.config("vae").get("sample_size", PAPER_RESOLUTION)))

    def geometry(self, size: ImageSize) -> Geometry:
        """The geometry of images: the requested height and width, else a square of the requested or own resolution."""
        side = size.resolution or self.resolution
        vae, taken = self.config("vae"), self.family.latent_channels(self.config("transformer"))
        if (channels := self.family.token_channels(vae)) != taken:
            raise TeacherError(
                f"{self.part('vae')} makes image tokens of {channels} values, but its transformer reads {taken}: they "
                f"are parts of two models; download the whole repository again"
            )
        token_px = self.family.token_px(vae)
        geometry = geometry_of(
            height=size.height or side, width=size.width or side, token_px=token_px, channels=channels
        )
        most = self.family.longest_side(self.config("transformer"))
        if most is not None and max(geometry.rows, geometry.columns) > most:
            raise SettingsError(
                f"the image is {geometry.width} x {geometry.height} px, expected at most {most * token_px} px per "
                f"side: the transformer in {self.path} has embeddings of {most} positions per side; give a smaller size"
            )
        return geometry

    @property
    def conditioning(self) -> tuple[ConditioningArray, ...] | None:
        """What the transformer reads of a prompt besides text and pooled vector."""
        family = self.family
        return family.conditioning_arrays([self.config(encoder) for encoder, _ in family.conditioning_roles])

    def identity(self, *, text_length: int, pooled: Pooled = "zero", hashed: bool = True) -> Teacher:
        """The identity of this teacher, with hashes of the weights of transformer and text encoders.

        hashed: False omits the hashes, so that only configuration files are read, for planning.
        """
        family, backbone, text_encoder = self.family, self.config("transformer"), self.config("large_text_encoder")
        self._check_width(text_encoder, family.text_width(backbone))
        return Teacher(
            family=family.name,
            weights=self._weights(pooled) if hashed else {},
            backbone_config=backbone,
            text_encoder_config=text_encoder,
            tokenizer=_sha256_of(self.tokenizer_files()),
            text_length=text_length,
            text_width=family.text_width(backbone),
            pad_token_id=self.pad_token_id,
            pooled=pooled,
            pooled_width=family.pooled_width(backbone),
            text_mask="token-count" if family.masks_text else None,
            text_cleaning=family.text_cleaning,
            text_layers=family.text_layers,
            **(self._pooled_identity(backbone, hashed=hashed) if pooled == "clip" else {}),
        )

    def _weights(self, pooled: Pooled) -> dict[str, str]:
        read: tuple[Role, ...] = ("transformer", "large_text_encoder")
        if pooled == "clip":
            read = (*read, *(encoder for encoder, _ in self.family.conditioning_roles))
        return {path: checksum for role in read for path, checksum in self.weight_hashes(role).items()}

    def _pooled_identity(self, backbone: dict[str, Any], *, hashed: bool) -> dict[str, Any]:
        family = self.family
        configs = {encoder: self.config(encoder) for encoder, _ in family.conditioning_roles}
        found, expected = family.pooled_outputs(list(configs.values())), family.pooled_width(backbone)
        if found != expected:
            parts = " and ".join(str(self.part(role)) for role in configs)
            raise TeacherError(
                f"the pooled vectors of {parts} have {found} values, but the transformer reads {expected}: they are "
                f"parts of two models; download the whole repository again"
            )
        tokenizers = {
            tokenizer: _sha256_of(self._files(tokenizer, POOLED_TOKENIZER_FILES)) if hashed else {}
            for _, tokenizer in family.conditioning_roles
        }
        if len(configs) == 1:
            # Without the names of the folders, as caches have it since before there were families with two.
            return {
                "pooled_encoder_config": configs["pooled_text_encoder"],
                "pooled_tokenizer": tokenizers["pooled_tokenizer"],
            }
        folder_of = {role: part.folder for role, part in family.parts.items()}
        return {
            "pooled_encoder_config": {folder_of[role]: config for role, config in configs.items()},
            "pooled_tokenizer": {
                f"{folder_of[role]}/{name}": checksum
                for role, files in tokenizers.items()
                for name, checksum in files.items()
            },
            "conditioning": self.conditioning,
        }

    def _check_width(self, text_encoder: dict[str, Any], expected: int) -> None:
        if (found := self.family.encoder_width(text_encoder)) != expected:
            raise TeacherError(
                f"{self.part('large_text_encoder')} gives {found} values per token, but its transformer reads "
                f"{expected}: they are parts of two models; download the whole repository again"
            )


def _sha256_of(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def check_recorded_transformer(teacher: TeacherFolder, recorded: Teacher) -> None:
    """Raise TeacherError, naming the first file, unless a cache was recorded with this transformer's weights."""
    check_recorded_weights(teacher, recorded, "transformer", flag="--backbone")


def check_recorded_weights(teacher: TeacherFolder, recorded: Teacher, role: Role, *, flag: str) -> None:
    """Raise TeacherError, naming the first file, unless a cache was recorded with the weights of this part.

    flag: the option that gives the part.
    """
    part = f"{teacher.family.parts[role].folder}/"
    expected = {name: value for name, value in recorded.weights.items() if name.startswith(part)}
    found = teacher.weight_hashes(role)
    if found != expected:
        name = next(name for name in sorted(expected | found) if expected.get(name) != found.get(name))
        raise TeacherError(
            f"{teacher.path}/{name} has sha256 {str(found.get(name))[:16]}, but the cache was recorded with "
            f"{str(expected.get(name))[:16]}, another model: give the recorded one with {flag}"
        )


def find_teacher(
    name: str, parts: tuple[Role, ...], *, revision: str | None = None, files: Sequence[str] = ("*",)
) -> TeacherFolder:
    """A teacher by folder, hub name or NAME@REVISION, with `parts` available; raises TeacherError.

    files: patterns of the files of each part to download from the hub.
    """
    path = Path(name)
    if path.is_file():
        raise TeacherError(
            f"{name} is a file, expected a folder in the layout of a pipeline or a hub name: single-file checkpoints "
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
        path = _download(source, parts, files, revision or named)
        folder = TeacherFolder(path=path, source=source, commit=commit_of(path))
    parts = needed_parts(folder.family, parts)
    for role in parts:
        folder.part(role)
    check_parts(folder.path, folder.family, parts)
    return folder


def _download(source: str, parts: Sequence[Role], files: Sequence[str], revision: str | None) -> Path:
    # model_index.json, which states the family, and with it the names of the folders.
    path = download(source, (), revision)
    if not parts:
        return path
    family = family_of_folder(path)
    folders = [family.parts[role].folder for role in needed_parts(family, parts)]
    # At the same commit, whatever a branch has become meanwhile.
    return download(source, [f"{folder}/{file}" for folder in folders for file in files], commit_of(path) or revision)
