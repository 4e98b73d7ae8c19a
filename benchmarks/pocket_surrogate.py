"""The sensitivity loss of a trained student on held-out prompts, for its correlation with the vision loss."""

from pathlib import Path

import numpy as np
import torch

from models.student import checkpoints, load_student
from storage_schemas.reader import Cache
from trainer.feed import Feed, Source
from trainer.settings import TrainFlags
from trainer.surrogate import Surrogate, sensitivity_loss


@torch.no_grad()
def surrogate_of(run: Path, cache_folder: Path) -> float:
    """With the floors that training has by default, by what was measured on this cache."""
    cache = Cache.open(str(cache_folder))
    stage = TrainFlags(student="", loss="sensitivity").settings().stages[0]
    surrogate = Surrogate.read({"cache": cache})
    held_out = [at for at in range(len(cache)) if cache.prompts[cache.layout.place(at).prompt].held_out]
    source = Source(cache=cache, indices=np.array(held_out), weights=surrogate.weights["cache"])
    batch = Feed([source], device=torch.device("cpu")).embedding_batch(range(len(held_out)))
    student = load_student(checkpoints(run)[-1] / "student")
    assert batch.weights_BT is not None
    loss = sensitivity_loss(
        student(batch.token_ids_BT)[0],
        batch.encoder_hidden_states_BTD,
        surrogate.root_on(stage.metric_floor, torch.device("cpu")),
        batch.weights_BT,
        floor=stage.weight_floor,
    )
    return float(loss)
