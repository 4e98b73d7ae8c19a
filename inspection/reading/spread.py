"""How far predictions and embeddings of different prompts are apart, at the same latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import linear

from secondcast.evaluation.open_loop import RecordedSteps
from secondcast.evaluation.replaying import filled_batches
from secondcast.evaluation.settings.generating import TEACHER
from secondcast.evaluation.text_encoder import open_text_encoder
from secondcast.models.backbone import Backbone
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder, check_recorded_weights
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Manifest

PROMPTS_FOLDER = Path(__file__).parent / "prompts"
"""Lists for teachers that know the world: KIND.txt of each of KINDS, a prompt per line."""

KINDS = ("visual", "non_visual")
"""visual: prompts of different pictures. non_visual: one picture, with different words that cannot be seen."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Variance between the prompts of a list, each as a fraction of the mean square.

    prompts: their number.
    prediction, context, embedding: of the predictions at the same latents, of the embeddings after the text projection,
        and of the embeddings.
    """

    prompts: int
    prediction: float
    context: float
    embedding: float


@dataclass(frozen=True, kw_only=True)
class PromptLists:
    """Lists of prompts by kind, and the teacher that has the text encoder to embed them."""

    texts: Mapping[str, Sequence[str]]
    teacher: TeacherFolder

    def embeddings(self, manifest: Manifest, device: torch.device) -> dict[str, torch.Tensor]:
        """embedding_NTD of each list, on the CPU, as in the cache; TeacherError for another text encoder.

        The text encoder is freed before the transformer is loaded.
        """
        check_recorded_weights(self.teacher, manifest.teacher, "large_text_encoder", flag="--teacher")
        encoder = open_text_encoder(
            TEACHER,
            self.teacher,
            text_length=manifest.teacher.text_length,
            dtype=DTYPES[manifest.sampling.dtype],
            device=device,
        )
        found = {kind: encoder.embeddings(texts, device).cpu() for kind, texts in self.texts.items()}
        assert encoder.free is not None
        encoder.free()
        return found


def read_prompts(folder: Path) -> dict[str, list[str]]:
    """The lists of a folder, by kind."""
    return {kind: (folder / f"{kind}.txt").read_text(encoding="utf-8").splitlines() for kind in KINDS}


def spread_fraction(values_N: torch.Tensor) -> float:
    """Variance over the first dimension (unbiased, at least two rows) per mean square, summed over the others."""
    values_N = values_N.double()
    variance = values_N.var(0, correction=1).sum()
    return float(variance / values_N.square().mean(0).sum())


@torch.no_grad()
def measure_spread(
    cache: Cache,
    backbone: Backbone,
    embeddings: Mapping[str, torch.Tensor],
    context_ID: torch.Tensor,
    records: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    progress: Progress,
) -> dict[str, Spread]:
    """The spread of each list, of its embedding_NTD (on the CPU), mean over the latents of these records.

    Latent, timestep, guidance and pooled vector are those of the record for every prompt.
    context_ID: the text projection, float64.
    """
    predictions: dict[str, list[float]] = {kind: [] for kind in embeddings}
    total = len(records) * sum(len(embedding_NTD) for embedding_NTD in embeddings.values())
    with progress.bar("spread", total=total, done=0, unit="predictions") as bar:
        for index, k in records:
            steps = RecordedSteps.of(cache, [(cache.trajectory(index), k)] * batch_size, backbone)
            for kind, embedding_NTD in embeddings.items():
                found = []
                for batch, kept in filled_batches(list(embedding_NTD), batch_size):
                    found.append(steps.predict(backbone, torch.stack(batch).to(backbone.device))[:kept].float())
                    bar.advance(kept)
                predictions[kind].append(spread_fraction(torch.cat(found)))
    return {
        kind: Spread(
            prompts=len(embedding_NTD),
            prediction=sum(predictions[kind]) / len(records),
            context=spread_fraction(linear(embedding_NTD.to(context_ID), context_ID)),
            embedding=spread_fraction(embedding_NTD),
        )
        for kind, embedding_NTD in embeddings.items()
    }
