"""LightGBM on everything that `data.py` has by hand: the peer that good features make strong.

One model per task, all columns, ids as numbers (near article ids are alike) or as categories,
whichever validates better. Hyper-parameters are chosen one after the other by NE on the validation
day, with a share of the training users and large steps; then models of the chosen shape, and of
one with twice the leaves, are trained on everything with smaller steps, and the one that validates
better is tested. Trees are added until validation has not improved for 50.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np

from benchmarks.globo.data import Flat
from benchmarks.globo.results import PARTS, Predictions, joined, plain
from feature_store.columns import NO_LABEL
from jobs.training.ids import in_share
from models.features import ITEM

NAME = "lightgbm"
Params = dict[str, Any]
Sets = tuple[lightgbm.Dataset, lightgbm.Dataset]
_SAMPLE = 0x6C67626D
_ALWAYS = {
    "objective": "binary",
    "num_threads": 1,
    "verbose": -1,
    "bagging_freq": 1,
    "feature_pre_filter": False,
    "deterministic": True,
    "force_col_wise": True,
    "max_cat_threshold": 64,
    "cat_smooth": 50,
}
START: Params = {
    "num_leaves": 63,
    "learning_rate": 0.1,
    "min_data_in_leaf": 200,
    "feature_fraction": 0.4,
    "bagging_fraction": 0.8,
    "lambda_l2": 5.0,
    "categories": "none",
}
# tried beside the best so far, in this order
CHOICES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("num_leaves", (31, 127, 255)),
    ("categories", ("small", "blocks")),
    ("feature_fraction", (0.2, 0.7)),
    ("min_data_in_leaf", (50, 1000)),
    ("lambda_l2", (0.0, 50.0)),
)
_FINAL_RATE = 0.05
_MAX_TREES, _PATIENCE = 2000, 50


class Table:
    """The matrix of a task: ids first, then numbers."""

    def __init__(self, rows: Flat, task: str) -> None:
        self.names = [*(f"id_{n}" for n in rows.names["ids"]), *rows.names["numbers"]]
        self.x = np.concatenate([rows.ids.astype(np.float32), rows.numbers], axis=1)
        self.y = rows.label(task)
        assert (self.y != NO_LABEL).all()

    def categories(self, kind: str) -> list[str]:
        """Columns of ids that are categories and not numbers."""
        ids = [n for n in self.names if n.startswith("id_") and n != f"id_{ITEM}"]
        small = [n for n in ids if n not in ("id_topic", "id_section")]
        return {"none": [], "small": small, "blocks": ids}[kind]


def _sets(train: Table, validation: Table, kind: str) -> Sets:
    params = {"feature_pre_filter": False, "verbose": -1, "num_threads": 1}
    one = lightgbm.Dataset(
        train.x, train.y, feature_name=train.names, categorical_feature=train.categories(kind),
        params=params, free_raw_data=False,
    )  # fmt: skip
    return one, one.create_valid(validation.x, validation.y)


def _fit(sets: Sets, params: Params, seed: int) -> tuple[lightgbm.Booster, float]:
    """The model, and its log loss on the validation day."""
    shape = {k: v for k, v in params.items() if k != "categories"}
    booster = lightgbm.train(
        {**_ALWAYS, **shape, "seed": seed},
        sets[0],
        num_boost_round=_MAX_TREES,
        valid_sets=[sets[1]],
        callbacks=[lightgbm.early_stopping(_PATIENCE, verbose=False)],
    )
    return booster, next(iter(booster.best_score["valid_0"].values()))


class LightGbm:
    """Tunes once per task, then trains per seed.

    Args:
        folder: of the trials.
        tuning_share: of the training users, for the trials.
        about: of the data; trials of other data are not used.
    """

    def __init__(self, folder: Path, *, tuning_share: float, about: dict[str, Any]) -> None:
        self.folder, self.tuning_share, self.about = folder, tuning_share, about

    def config(self) -> dict[str, Any]:
        """What a result depends on beside the data."""
        return {
            "always": _ALWAYS, "start": START, "choices": [list(c) for c in CHOICES],
            "final_rate": _FINAL_RATE, "tuning_share": self.tuning_share,
        }  # fmt: skip

    def run(
        self, task: str, parts: dict[str, Flat], seed: int
    ) -> tuple[Predictions, dict[str, Any]]:
        """Predictions for validation and test, and what is worth knowing.

        Args:
            parts: `train`, `validation` and `test`, rows with a label of `task`.
        """
        tables = {name: Table(rows, task) for name, rows in parts.items()}
        chosen, tuning = self._tune(task, tables, parts["train"])
        started = time.monotonic()
        sets = _sets(tables["train"], tables["validation"], chosen["categories"])
        found = []
        for leaves in (chosen["num_leaves"], 2 * chosen["num_leaves"]):
            params = {**chosen, "num_leaves": leaves, "learning_rate": _FINAL_RATE}
            begun = time.monotonic()
            booster, loss = _fit(sets, params, seed)
            found.append((loss, booster, params, time.monotonic() - begun))
            print(
                f"  {task} {params} trees {booster.best_iteration} logloss {loss:.5f}", flush=True
            )
        _, booster, params, seconds = min(found, key=lambda f: f[0])
        predictions = [
            parts[part].predicted(task, part, np.asarray(booster.predict(tables[part].x)))
            for part in PARTS
        ]
        gains = booster.feature_importance("gain")
        order = np.argsort(-gains)[:30]
        facts = {
            "params": params,
            "trees": booster.best_iteration,
            "seconds": seconds,
            "seconds_with_tuning": tuning + time.monotonic() - started,
            "gain": {
                tables["train"].names[i]: float(gains[i] / max(gains.sum(), 1e-9)) for i in order
            },
        }
        return joined(predictions), facts

    def _tune(self, task: str, tables: dict[str, Table], train: Flat) -> tuple[Params, float]:
        """The chosen parameters, and the seconds of all trials, whichever run they were of."""
        some = Table(train.where(in_share(train.user_id, self.tuning_share, _SAMPLE)), task)
        sets: dict[str, Sets] = {}

        def run(params: Params) -> dict[str, Any]:
            kind = params["categories"]
            if kind not in sets:
                sets[kind] = _sets(some, tables["validation"], kind)
            begun = time.monotonic()
            booster, loss = _fit(sets[kind], params, 0)
            seconds = time.monotonic() - begun
            print(f"  {task} {params} {loss:.5f} in {seconds:.0f} s", flush=True)
            return {"logloss": loss, "trees": booster.best_iteration, "seconds": seconds}

        def tried(params: Params) -> tuple[float, float]:
            key = {"about": self.about, "share": self.tuning_share, "params": params}
            found = trial(self.folder / f"lightgbm-{task}.jsonl", key, lambda: run(params))
            return found["logloss"], found["seconds"]

        best = START
        lowest, spent = tried(best)
        for name, values in CHOICES:
            for value in values:
                params = {**best, name: value}
                loss, seconds = tried(params)
                spent += seconds
                if loss < lowest:
                    best, lowest = params, loss
        return best, spent


def trial(path: Path, config: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a trial of `config` found, from the lines of `path` or from `run`, which is then added.

    One JSON object a line; a line that a killed run left unfinished is not read.
    """
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            known = json.loads(line)
        except json.JSONDecodeError:
            continue
        if known["config"] == plain(config):
            return known["found"]
    found = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write("\n" * bool(out.tell()) + json.dumps({"config": config, "found": found}))
    return found
