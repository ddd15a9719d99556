"""A change of structure moves no figure: losses, tables, embeddings and a comparison, as `golden.json` has them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jobs import train_downstream
from tests import golden

GOLDEN = json.loads(golden.PATH.read_text())
# another CPU sums in another order, which ten steps and three days of training carry on
CLOSE = {"rtol": 2e-3, "atol": 2e-3}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("dataset", "model"), golden.MODELS, ids=lambda x: x if isinstance(x, str) else x.name
)
def test_losses_of_ten_steps(dataset, model):
    want = GOLDEN["losses"][f"{dataset.name}/{model}"]
    got = golden.losses(dataset, model)
    np.testing.assert_allclose(got[:3], want[:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got, want, **CLOSE)  # Muon carries a last bit on, tenfold a step


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Three simulated days through every job."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_downstream, "MIN_TRAIN_DAYS", 1)
        yield golden.run_days(tmp_path_factory.mktemp("golden"))


def test_rows_of_every_table(settings):
    assert golden.tables(settings) == GOLDEN["tables"]


def test_published_embeddings(settings):
    published = golden.published(settings)
    assert published.keys() == GOLDEN["published"].keys()
    for model, numbers in published.items():
        np.testing.assert_allclose(numbers, GOLDEN["published"][model], **CLOSE)


def test_the_downstream_comparison(settings):
    compared, want = golden.downstream(settings), GOLDEN["downstream"]
    assert compared["rows"] == want["rows"]
    for figure in ("ne", "mean"):
        assert compared[figure].keys() == want[figure].keys()
        for arm, value in compared[figure].items():
            np.testing.assert_allclose(value, want[figure][arm], **CLOSE)
