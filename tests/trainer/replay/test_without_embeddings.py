"""Training from a cache that does not keep the teacher's embeddings."""

import re

import pytest

from secondcast.inspection.summary import summarise
from secondcast.inspection.summary_text import summary_lines
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache
from tests.trainer.data.mixing import run_settings, train_mixed
from tests.trainer.test_train import Listening, run_training


@pytest.fixture(scope="module")
def bare_cache(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("bare")
    (folder / "p.txt").write_text("".join(f"a red dog {i}\n" for i in range(8)))
    build_cache(folder / "c", dev_teacher, folder / "p.txt", shard_size=8, batch_size=8, store_embeddings=False)
    return folder / "c"


def test_a_warm_up_is_refused_with_the_way_out(tmp_path, bare_cache, dev_teacher, t5_config):
    with pytest.raises(
        SettingsError,
        match=r"stage pretrain has the loss context, but .* was built with --no-store-embeddings and has no "
        r"embeddings to compare with: use only stages with the vision loss, or build with --store-embeddings$",
    ):
        run_training(tmp_path / "run", bare_cache, dev_teacher, t5_config, pretrain_steps=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"loss": "context"},
            r"--loss is context, but .* was built with --no-store-embeddings .*: give --loss vision, or",
        ),
        (
            {"loss": "depth"},
            r"--loss is depth, but .* was built with --no-store-embeddings .*: give --loss vision, or",
        ),
        (
            {"embedding_loss_weight": 0.5},
            r"--embedding-loss-weight is 0.5, but .* has no embeddings to compare with: "
            r"give --embedding-loss-weight 0, or",
        ),
    ],
)
def test_losses_that_need_embeddings_are_refused(tmp_path, bare_cache, dev_teacher, t5_config, flags, message):
    with pytest.raises(SettingsError, match=message):
        run_training(tmp_path / "run", bare_cache, dev_teacher, t5_config, **flags)


def test_the_term_of_a_stage_is_named(tmp_path, bare_cache, dev_teacher, t5_config):
    message = (
        f"stage 0 has embedding-loss-weight 0.5, but {bare_cache} was built with --no-store-embeddings and has no "
        "embeddings to compare with: remove it from the stage, or build with --store-embeddings"
    )
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        train_mixed(
            tmp_path / "run", run_settings({"embedding_loss_weight": 0.5}), {"bare": bare_cache}, dev_teacher, t5_config
        )


def test_it_trains_by_replay_and_says_that_there_is_no_replay_error(tmp_path, bare_cache, dev_teacher, t5_config):
    progress = Listening()
    run_training(tmp_path / "run", bare_cache, dev_teacher, t5_config, progress=progress, steps=2)
    assert any(line.startswith("no replay error: ") and "--no-store-embeddings" in line for line in progress.heard)
    assert not any("velocity's norm" in line for line in progress.heard)


def test_the_summary_names_codec_and_embeddings(bare_cache):
    facts = summarise(Cache.open(bare_cache))
    assert (facts["storage"]["compression"], facts["storage"]["embeddings"]) == ("lossless", "none")
    assert "(zarr, lossless, latents derived, embeddings none)" in dict(summary_lines(facts))["on disk"]
