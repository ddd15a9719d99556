"""A model of one domain: only that domain's labels move it, and every domain is still scored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

from feature_store import datasets
from feature_store.columns import NO_LABEL
from feature_store.errors import SpecError
from feature_store.spec import Attribute, Dataset, IdType
from jobs.training.checkpoints import state_hash
from jobs.training.config import Shift, TrainingConfig
from jobs.training.ids import int64_ids
from jobs.training.judge import task_metrics
from jobs.training.learner import Learner, domain_id
from jobs.training.presets import Preset, preset
from jobs.training.scoring import Scored
from jobs.training.trainer import train
from jobs.training.upstream_log import metrics_of
from models.batch import Batch
from models.tables import TableConfig
from models.upstream.hybrid import HybridConfig
from models.upstream.sequence import SequenceConfig
from models.upstream.sum import SumConfig
from tests.batches import random_batch
from tests.synthetic import dataset
from tests.written import upstream_result

SPEC = dataset()
TABLES = TableConfig(dim=8, default_rows=64, item_rows=128)


def learner_of(domain: int | str | None, *, model: str = "sum", **training: Any) -> Learner:
    torch.set_num_threads(1)  # as training does
    torch.manual_seed(0)
    chosen = Preset(
        architecture=model,
        shape={
            "sum": SumConfig(tables=TABLES, dense_tokens=2),
            "sequence": SequenceConfig(tables=TABLES, width=16, head_dim=8),
            "hybrid": HybridConfig(tables=TABLES, width=16, head_dim=8, dense_tokens=2),
        }[model],
        training=TrainingConfig(domain=domain, **training),
    )
    return Learner(SPEC, chosen, torch.device("cpu"))


def day(*, flip: int | None = None) -> list[Batch]:
    """Batches of two domains; the labels of one of them upside down."""
    found = []
    for seed in range(4):
        batch = random_batch(SPEC, rows=10, seed=seed)
        surface = torch.arange(batch.targets) % 2
        labels = batch.labels
        if flip is not None:
            labels = torch.where((surface == flip)[:, None], 1 - labels, labels)
        context = {**batch.context_ids, "surface": surface}
        found.append(replace(batch, context_ids=context, labels=labels))
    return found


def trained(learner: Learner, batches: list[Batch]) -> str:
    train(learner, lambda epoch, skip: iter(batches[skip:]), seed=3)
    return state_hash(learner.weights())


@pytest.mark.parametrize("model", ["sum", "sequence", "hybrid"])
def test_only_the_domains_labels_move_weights(model: str) -> None:
    usual = trained(learner_of(1, model=model), day())
    assert trained(learner_of(1, model=model), day(flip=0)) == usual
    assert trained(learner_of(1, model=model), day(flip=1)) != usual
    assert trained(learner_of(None, model=model), day()) != usual
    assert trained(learner_of(None, model=model), day(flip=0)) != trained(
        learner_of(None, model=model), day()
    )


def test_distillation_looks_at_the_domains_targets_only() -> None:
    def weights(flip: int | None) -> str:
        learner = learner_of(1, shift=Shift.DISTIL)
        learner.step(day()[0])
        learner.keep_parent([t.name for t in SPEC.tasks])
        return trained(learner, day(flip=flip))

    assert weights(None) == weights(0) != weights(1)


def test_labels_and_base_rates_are_the_domains() -> None:
    batches = day()
    done = train(learner_of(1), lambda epoch, skip: iter(batches[skip:]), seed=3)
    mine = torch.cat([b.labels[b.context_ids["surface"] == 1] for b in batches])
    assert (mine != NO_LABEL).all()
    assert done.labels == [len(mine)] * 2
    assert done.positives == (mine == 1).sum(0).tolist()
    assert done.targets > len(mine)


def test_every_domain_is_scored() -> None:
    learner, batch = learner_of(1), day()[0]
    assert learner.probabilities(batch).shape == (batch.targets, 2)
    assert (batch.labels != NO_LABEL).all()  # the batch itself is left as it is


def with_strings() -> Dataset:
    place = Attribute(name="surface", id_type=IdType.STRING)
    (target,) = SPEC.targets
    context = tuple(place if c.name == "surface" else c for c in target.context)
    return replace(SPEC, targets=(replace(target, context=context),))


def test_a_string_is_hashed_as_ids_are() -> None:
    assert domain_id(with_strings(), "feed") == int64_ids(pa.array(["feed"]))[0]
    assert domain_id(SPEC, 1) == 1
    assert learner_of(0).domain == 0


@settings(max_examples=20)
@given(names=st.lists(st.text(), min_size=1, max_size=9, unique=True))
@example(names=["a,b!", "a/b", "..", "é", "x" * 400])
def test_each_domain_has_metrics_of_its_own_that_mlflow_takes(names: list[str]) -> None:
    ids = int64_ids(pa.array(names, pa.string()))
    n = len(ids)
    scored = Scored(
        user_id=ids, stored_user_id=ids, target_id=ids, task=np.zeros(n, int),
        label=np.arange(n) % 2, prediction=np.full(n, 0.5), domain=ids,
    )  # fmt: skip
    found = metrics_of(upstream_result(task_metrics(with_strings(), scored, {})))
    for name in found:
        _validate_metric_name(name)
        assert len(name) <= MAX_ENTITY_KEY_LENGTH
    assert sum("_domain_" in name and name.endswith("_labels") for name in found) == n


@pytest.mark.parametrize(
    ("spec", "value", "says"),
    [
        (replace(SPEC, domain=None), 1, "Dataset.synthetic..domain is None"),
        (SPEC, "feed", "ids of surface are int64"),
        (with_strings(), 1, "ids of surface are string"),
    ],
)
def test_a_domain_that_cannot_be_is_refused(spec: Dataset, value: int | str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        domain_id(spec, value)


@pytest.mark.parametrize(("model", "value"), [("sum_feed", 0), ("sum_stories", 1)])
def test_the_domains_of_the_simulated_world_have_a_sum_each(model: str, value: int) -> None:
    spec = datasets.get("simulated")
    chosen, usual = preset(spec, model), preset(spec, "sum")
    assert domain_id(spec, chosen.training.domain) == value
    assert replace(chosen, training=replace(chosen.training, domain=None)) == usual
    assert replace(spec, models=("sum", model)).models[1] == model
