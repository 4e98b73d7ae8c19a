"""The registry of losses: what each is called, compares and needs. Without torch: help texts and plans read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Loss = Literal["vision", "depth", "embedding", "context"]


@dataclass(frozen=True, kw_only=True)
class LossKind:
    """A loss.

    help: in help texts.
    card: what a student that was trained with it imitates, in model cards.
    backbone: what it needs of the frozen transformer: all of it or its first blocks on recorded latents, its text
        projection, or nothing.
    options: options of a stage that it alone has.
    """

    help: str
    card: str
    backbone: Literal["all", "first blocks", "text projection", "nothing"]
    options: tuple[str, ...] = ()

    @property
    def replays(self) -> bool:
        """Whether it runs blocks of the transformer on recorded latents; the others compare embeddings."""
        return self.backbone in ("all", "first blocks")

    @property
    def predicts(self) -> bool:
        """Whether it compares predictions, which needs the whole transformer."""
        return self.backbone == "all"


LOSSES: Mapping[Loss, LossKind] = {
    "vision": LossKind(
        help="the paper's, replay through the transformer",
        card="the prediction: mean squared difference between what the frozen transformer predicts with the student's "
        "embedding and what it predicted with the teacher's, on recorded latents (the paper's loss)",
        backbone="all",
        options=("timestep_weighting", "embedding_loss_weight", "context_loss_weight", "timesteps_per_sample"),
    ),
    "depth": LossKind(
        help="image and text stream after the transformer's first --depth-blocks; only these are loaded",
        card="streams: mean squared difference of image and text tokens after the first blocks of the frozen "
        "transformer, with the student's embedding and with the teacher's, on recorded latents",
        backbone="first blocks",
        options=("depth_blocks",),
    ),
    "embedding": LossKind(
        help="the paper's baseline, without the transformer",
        card="embeddings: mean squared difference between the student's embedding and the teacher's",
        backbone="nothing",
    ),
    "context": LossKind(
        help="the embedding error after the transformer's text projection; only that layer is loaded",
        card="projected embeddings: mean squared difference between the student's embedding and the teacher's, both "
        "after the transformer's own text projection",
        backbone="text projection",
    ),
}
LOSSES_HELP = ". ".join(f"{name}: {kind.help}" for name, kind in LOSSES.items()) + "."
