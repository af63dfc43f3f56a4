"""A server that most tests share: a next-item model with a fusion, a Yes/No model, a collaborative model."""

import shutil
from types import SimpleNamespace

import pytest

from tests.helpers.server import run_server


@pytest.fixture(scope="session")
def checkpoints(workshop, tuned, studio, tmp_path_factory):
    """Folders: `data` with both datasets, `lcrec` with a fusion for `exclude_seen`, `tallrec`, `din`."""
    from reclingua import Recommender
    from reclingua.baselines import fit_baselines
    from reclingua.inference.fusion import FusedRecommender, save_fusion

    root = tmp_path_factory.mktemp("served")
    for dataset in (workshop / "datasets" / "toy", studio / "liked"):
        shutil.copytree(dataset, root / "data" / dataset.name)
    shutil.copytree(tuned, root / "lcrec")
    recommender = Recommender.from_pretrained(root / "lcrec", root / "data")
    baselines = fit_baselines(recommender.dataset, names=["ease"])
    save_fusion(root / "lcrec", FusedRecommender.fit(recommender, baselines, ["ease"], excludes_seen=True))
    return SimpleNamespace(data=root / "data", lcrec=root / "lcrec", tallrec=studio / "tallrec", din=studio / "din")


@pytest.fixture(scope="session")
def server(checkpoints):
    models = (checkpoints.lcrec, f"likes={checkpoints.tallrec}", checkpoints.din)
    with run_server("--ckpt_path", *models, "--data_path", checkpoints.data, "--num_beams", 8) as running:
        yield running
