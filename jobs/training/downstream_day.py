"""One day of one downstream task: its arms trained and tested on the days chosen, the result kept and logged."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.columns import id_type
from feature_store.days import add_days
from feature_store.embeddings import read_embeddings
from feature_store.spec import Dataset, Task
from jobs.context import JobContext
from jobs.training import presets
from jobs.training.checkpoints import replacing
from jobs.training.downstream import REFERENCE, Comparison, Loaded, arms, load
from jobs.training.downstream_log import log_day
from jobs.training.ids import held_out, seed_of
from jobs.training.loader import Limits, Users, labelled_day, labelled_rows, share_within
from jobs.training.results import PREDICTIONS, Compared, DownstreamResult, downstream_results
from jobs.training.scoring import Scored

_TEST_TARGETS = 4096  # of a batch that is only scored


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Batches of some days shown.

    Args:
        share: of the users, that was taken.
        inputs: {"<table>/<ds>": Delta version} read.
        snapshots: by model and day, which published the embeddings.
    """

    batches: list[Loaded]
    share: float
    inputs: dict[str, int]
    snapshots: dict[str, dict[str, str]]

    @property
    def targets(self) -> int:
        """How many."""
        return sum(item.batch.targets for item in self.batches)


@dataclass(frozen=True, kw_only=True)
class DownstreamDay:
    """What compares the arms of a task.

    Args:
        context: of the job.
        task: what is predicted.
        test_day, train_days: days shown, whose labels are final, with every model's embeddings of the day
            before.
    """

    context: JobContext
    task: Task
    test_day: str
    train_days: tuple[str, ...]

    def run(self) -> DownstreamResult:
        """The day's result, kept as `result.json` beside the predictions, and logged; without arms where
        there is nothing to compare by."""
        dataset, task, ds = self.context.dataset, self.task, self.context.ds
        config = presets.downstream_training(dataset)
        training = self._sample(
            self.train_days, Users.TRAINING, config.max_train_targets, config.batch_targets
        )
        test = self._sample((self.test_day,), Users.ALL, config.max_test_targets, _TEST_TARGETS)
        if not training.batches or not test.batches:
            where = (
                "the days trained on" if not training.batches else f"the test day {self.test_day}"
            )
            return self._kept(why_not=f"no label on {where}")
        comparison = Comparison(
            dataset=dataset,
            task=task,
            config=config,
            training=training.batches,
            test=test.batches,
            seed=seed_of("downstream", dataset.name, task.name, ds),
        )
        if not 0 < comparison.base_rate() < 1:
            answer = int(comparison.base_rate())
            return self._kept(
                why_not=f"every label trained on is {answer}: there is nothing to tell apart"
            )
        outcome = comparison.run(arms(dataset.models))
        compared = Compared(
            base_rate=outcome.base_rate,
            reference=REFERENCE,
            test_day=self.test_day,
            train_days=list(self.train_days),
            users_share={"training": training.share, "test": test.share},
            targets={"training": training.targets, "test": test.targets},
            users=len(set(outcome.scored["context"].user_id.tolist())),
            importance=outcome.importance,
            snapshots={m: training.snapshots[m] | test.snapshots[m] for m in dataset.models},
            config=asdict(config),
        )
        folder = downstream_results(self.context.settings, dataset.name, task.name).root / ds
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(dataset, outcome.scored, folder / PREDICTIONS)
        inputs = training.inputs | test.inputs
        result = self._kept(arms=outcome.arms, compared=compared, inputs=inputs)
        log_day(self.context, task, result, compared, outcome.scored)
        return result

    def _kept(self, **found: Any) -> DownstreamResult:
        dataset, task = self.context.dataset, self.task
        result = DownstreamResult(
            dataset=dataset.name,
            task=task.name,
            ds=self.context.ds,
            sampled=task.sampled,
            simulated=dataset.simulated,
            **found,
        )
        downstream_results(self.context.settings, dataset.name, task.name).write(result)
        return result

    def _sample(self, shown: tuple[str, ...], users: Users, most: int, batch: int) -> Sample:
        """Of about `most` targets, in batches of `batch`. Held-out users are tested and never trained on."""
        lake, dataset = self.context.lake, self.context.dataset
        labelled = [
            labelled_day(
                lake, dataset, add_days(day, self.task.matures_after), tasks=[self.task.name]
            )
            for day in shown
        ]
        share, limits = share_within(labelled, self.task.name, most), Limits(max_targets=batch)
        kind = presets.downstream_training(dataset).kind
        batches: list[Loaded] = []
        inputs: dict[str, int] = {}
        snapshots: dict[str, dict[str, str]] = {model: {} for model in dataset.models}
        for day, of_day in zip(shown, labelled, strict=True):
            inputs |= of_day.inputs
            before, embeddings = add_days(day, -1), {}
            for model in dataset.models:
                read = embeddings[model] = read_embeddings(lake, model, before, kind)
                inputs[f"user_embeddings/{model}/{before}"] = read.version or 0
                snapshots[model][before] = read.snapshot
            rows = labelled_rows(
                lake, dataset, of_day.shown, users=users, history=False, seed=1, limits=limits,
                share=share,
            )  # fmt: skip
            batches += load(rows, embeddings, limits)
        return Sample(batches=batches, share=share, inputs=inputs, snapshots=snapshots)


def write_predictions(dataset: Dataset, scored: dict[str, Scored], path: Path) -> None:
    """One row per test target, one column per arm."""
    first = next(iter(scored.values()))
    columns = {
        "user_id": pa.array(first.stored_user_id.tolist(), id_type(dataset.user_id_type)),
        "target_id": pa.array(first.target_id.tolist(), id_type(dataset.target_id_type)),
        "label": first.label.astype(np.int32),
        "domain": first.domain,
        "held_out": held_out(first.user_id, dataset.held_out_share),
    }
    columns |= {name: found.prediction for name, found in scored.items()}
    with replacing(path) as staging:
        pq.write_table(pa.table(columns), staging, compression="zstd")
