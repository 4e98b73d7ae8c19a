"""A teacher as it lies on disk: a folder (or hub repository) in the FluxPipeline layout, read by its own configs."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage_schemas.digests import weight_sha256
from storage_schemas.errors import BadTeacher
from storage_schemas.manifest import Teacher

# The paper's text length (section 4); a teacher whose tokenizer is shorter states its own.
PAPER_TEXT_LENGTH = 77
# The paper's resolution for its first two stages; a teacher whose VAE is smaller states its own.
PAPER_RESOLUTION = 512

BUILD_PARTS = ("transformer", "scheduler", "text_encoder_2", "tokenizer_2", "vae")
REPLAY_PARTS = ("transformer",)
DECODE_PARTS = ("vae",)
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, kw_only=True)
class TeacherFolder:
    """A local folder in the FluxPipeline layout; `source` is the name it was asked for by."""

    path: Path
    source: str

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part, without the keys that name where it came from."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        file = self.part(part) / name
        try:
            config = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise BadTeacher(f"{file} cannot be read ({error}): the teacher's {part} is incomplete") from error
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def part(self, part: str) -> Path:
        """The folder of a part; BadTeacher if it is not there."""
        folder = self.path / part
        if not folder.is_dir():
            raise BadTeacher(
                f"{self.path} has no {part}/: expected a folder in the FluxPipeline layout with {part}/ in it; "
                f"download the whole repository, or name another --teacher"
            )
        return folder

    def weights(self, part: str) -> list[Path]:
        """The safetensors files of a part, sorted."""
        files = sorted(self.part(part).glob("*.safetensors"))
        if not files:
            raise BadTeacher(f"{self.part(part)} has no *.safetensors: weights are missing; download {part}/ again")
        return files

    def weight_hashes(self, part: str) -> dict[str, str]:
        """sha256 of each weight file of a part, by its path in the folder."""
        return {f"{part}/{file.name}": weight_sha256(file) for file in self.weights(part)}

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the T5 tokenizer, for the cache to carry."""
        folder = self.part("tokenizer_2")
        return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}

    @property
    def text_length(self) -> int:
        """Text tokens: the paper's 77, or what the tokenizer states if that is less."""
        config = json.loads((self.part("tokenizer_2") / "tokenizer_config.json").read_bytes())
        return min(PAPER_TEXT_LENGTH, int(config.get("model_max_length", PAPER_TEXT_LENGTH)))

    @property
    def resolution(self) -> int:
        """Pixels per side: the paper's 512, or what the VAE states if that is less."""
        return min(PAPER_RESOLUTION, int(self.config("vae").get("sample_size", PAPER_RESOLUTION)))

    def identity(self, *, text_length: int, hashed: bool = True) -> Teacher:
        """Who this teacher is, weights by hash: reads all weights of transformer and text encoder once.

        hashed: False leaves the hashes out and needs configurations only, for planning.
        """
        backbone, text_encoder = self.config("transformer"), self.config("text_encoder_2")
        tokenizer = {name: hashlib.sha256(data).hexdigest() for name, data in self.tokenizer_files().items()}
        return Teacher(
            family="flux",
            weights=self.weight_hashes("transformer") | self.weight_hashes("text_encoder_2") if hashed else {},
            backbone_config=backbone,
            text_encoder_config=text_encoder,
            tokenizer=tokenizer,
            text_length=text_length,
            text_width=backbone["joint_attention_dim"],
            pad_token_id=text_encoder.get("pad_token_id", 0),
            pooled="zero",
            pooled_width=backbone["pooled_projection_dim"],
        )


def find_teacher(name: str, parts: tuple[str, ...], *, revision: str | None = None) -> TeacherFolder:
    """A teacher by folder or hub name, with `parts` at hand; BadTeacher says what is missing and the way out."""
    path = Path(name).expanduser()
    if not path.is_dir():
        path = _download(name, parts, revision)
    folder = TeacherFolder(path=path, source=name)
    for part in parts:
        folder.part(part)
    if "transformer" in parts and "guidance_embeds" not in folder.config("transformer"):
        raise BadTeacher(
            f"{path}/transformer/config.json has no guidance_embeds: not a FLUX transformer; this version records "
            f"FLUX.1-dev and schnell, and what has their layout"
        )
    return folder


def _download(name: str, parts: tuple[str, ...], revision: str | None) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BadTeacher(
            f"no teacher {name!r}: expected 'pocket', an existing folder, or a hub name such as "
            f"black-forest-labs/FLUX.1-dev"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["model_index.json", *(f"{part}/*" for part in parts)]
            )
        )
    except GatedRepoError as error:
        raise BadTeacher(
            f"{name} is gated: accept its licence on its page, then give `hf auth login` and this command again"
        ) from error
    except RepositoryNotFoundError as error:
        raise BadTeacher(
            f"no teacher {name!r}: neither a folder here nor a repository of the hub (if it is private or gated, "
            f"give `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise BadTeacher(f"{name} has no revision {revision!r}: see its page for branches and commits") from error
    except Exception as error:
        raise BadTeacher(
            f"{name} is no folder here and could not be fetched ({type(error).__name__}): check the name and the "
            f"network, or give a folder"
        ) from error
