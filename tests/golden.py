"""Figures that a change of structure must not move: `tests/golden.json`, compared by `test_golden.py`.

    python -m tests.golden        # writes them anew; the commit says which changed, and why

Losses and embeddings are compared within a tolerance, as the last bits of a sum depend on the CPU;
the rows of tables are compared by a hash of their content.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch

from feature_store import datasets
from feature_store.content import content_hash
from feature_store.days import add_days, day_range
from feature_store.embeddings import EmbeddingKind, read_embeddings
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs import (
    build_aggregates,
    build_examples,
    build_item_aggregates,
    build_labels,
    build_sequences,
    ingest,
    publish_embeddings,
    spark,
    train_downstream,
    train_upstream,
)
from jobs.context import JobContext
from jobs.settings import EngineChoice, Settings
from jobs.training.learner import Learner
from jobs.training.presets import preset
from jobs.training.results import PREDICTIONS, RESULT
from tests.batches import random_batch
from tests.tiny import TINY

PATH = Path(__file__).with_suffix(".json")
SIMULATED = datasets.get("simulated")
DAYS = day_range(SIMULATED.first_day, add_days(SIMULATED.first_day, 2))
WORLD = "users=250,seed=5"
STEPS = 10
# every preset family; TINY has none of its own, and so takes the defaults
MODELS = (
    (TINY, "sum"), (TINY, "sequence"), (TINY, "hybrid"), (TINY, "sequence_distil"),
    (TINY, "sum_regularise"), (SIMULATED, "sum"), (SIMULATED, "sequence"), (SIMULATED, "hybrid"),
    (datasets.get("globo"), "sum"), (datasets.get("globo"), "sequence"), (datasets.get("globo"), "hybrid"),
)  # fmt: skip
FEATURES = (
    ingest, build_sequences, build_aggregates, build_item_aggregates, build_examples, build_labels,
)  # fmt: skip
TABLES = (
    "events", "impressions", "sequences", "aggregates", "item_aggregates", "examples", "labels",
)  # fmt: skip
_STATISTICS_OF = 1000  # embeddings that are looked at one by one


def losses(dataset: Dataset, model: str) -> list[list[float]]:
    """Log loss per task of ten steps of `model` from its first weights, on ten random batches."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    learner = Learner(dataset, preset(dataset, model), torch.device("cpu"))
    learner.keep_parent([task.name for task in dataset.tasks])
    learner.average.train()
    batches = [random_batch(dataset, rows=16, seed=seed) for seed in range(STEPS)]
    return [[float(x) for x in learner.step(batch).per_task] for batch in batches]


def run_days(home: Path) -> Settings:
    """Every job of three simulated days, into `home`, on Sail."""
    settings = Settings.from_env(
        {"HEADWATER_HOME": str(home), "HEADWATER_ENGINE": EngineChoice("sail")}
    )
    try:
        for ds in DAYS:
            context = JobContext(dataset=SIMULATED, ds=ds, settings=settings, source=Path(WORLD))
            for job in FEATURES:
                job.run(context)
            for model in SIMULATED.models:
                train_upstream.run(replace(context, model=model))
                publish_embeddings.run(replace(context, model=model))
        train_downstream.run(
            JobContext(dataset=SIMULATED, ds=DAYS[-1], settings=settings, task="click")
        )
    finally:
        spark.stop(settings)
    return settings


def tables(settings: Settings) -> dict[str, str]:
    """Content hash of every partition of every table that an engine built."""
    lake = Lake(settings.lake_root, SIMULATED)
    return {
        f"{table}/{ds}": content_hash(pads.dataset(lake.read(table, days=[ds])))
        for table in TABLES
        for ds in DAYS
    }


def published(settings: Settings) -> dict[str, list[float]]:
    """Per model: users, then the first raw numbers of the last day's embeddings by user id."""
    lake = Lake(settings.lake_root, SIMULATED)
    result = {}
    for model in SIMULATED.models:
        rows = read_embeddings(lake, model, DAYS[-1], EmbeddingKind.RAW)
        order = np.argsort(rows.ids.to_numpy(zero_copy_only=False))
        values = rows.numpy()[order].astype(np.float64).ravel()[:_STATISTICS_OF]
        result[model] = [float(len(rows.ids)), *values.round(4).tolist()]
    return result


def downstream(settings: Settings) -> dict[str, Any]:
    """The comparison of the last day: NE by arm, and the mean prediction by arm."""
    folder = settings.downstream_dir(SIMULATED.name, "click") / DAYS[-1]
    result = json.loads((folder / RESULT).read_text())
    predictions: pa.Table = pq.read_table(folder / PREDICTIONS)
    return {
        "rows": predictions.num_rows,
        "ne": {name: arm["ne"] for name, arm in result["arms"].items()},
        "mean": {name: float(np.mean(predictions[name].to_numpy())) for name in result["arms"]},
    }


def everything() -> dict[str, Any]:
    """What `golden.json` holds."""
    with tempfile.TemporaryDirectory() as folder:
        train_downstream.MIN_TRAIN_DAYS = 1
        settings = run_days(Path(folder))
        return {
            "losses": {f"{d.name}/{model}": losses(d, model) for d, model in MODELS},
            "tables": tables(settings),
            "published": published(settings),
            "downstream": downstream(settings),
        }


if __name__ == "__main__":
    PATH.write_text(json.dumps(everything()) + "\n")
