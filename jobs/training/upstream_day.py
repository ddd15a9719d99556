"""One day of one upstream model: evaluated, trained and judged at pinned versions, as `jobs/train_upstream.py` says."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from feature_store.columns import id_type
from feature_store.days import add_days
from feature_store.errors import QualityError
from feature_store.spec import Dataset
from feature_store.tables import definition
from jobs.context import JobContext
from jobs.training.checkpoints import Checkpoints, Snapshot, replacing, run_hash, state_hash
from jobs.training.ids import held_out, seed_of
from jobs.training.judge import decide, drift, score_and_embed, task_metrics
from jobs.training.learner import Learner
from jobs.training.loader import LabelledDay, Shown, Users, labelled_batches, labelled_rows
from jobs.training.parent import parent_of
from jobs.training.presets import Preset
from jobs.training.results import (
    EVALUATION,
    Evaluation,
    Gate,
    Training,
    UpstreamResult,
    Verdict,
    upstream_results,
)
from jobs.training.rows import Rows
from jobs.training.scoring import Scored, concat, score
from jobs.training.trainer import Progress, choose_device, train
from jobs.training.whole import NotWholeError, whole_learner
from models.batch import Batch


@dataclass(frozen=True, kw_only=True)
class UpstreamDay:
    """What evaluates, trains and gates one model on one day, at pinned versions.

    Args:
        context: of the job.
        model: its name.
        preset: its configuration.
        day: labels and examples, at pinned versions; beside its own labels, those of earlier days that
            are trained on too.
        lost: earlier days whose labels no champion was trained on, and that are not read either.
        parents: where the parent snapshot is, if not where the new one goes.
    """

    context: JobContext
    model: str
    preset: Preset
    day: LabelledDay
    lost: tuple[str, ...] = ()
    parents: Checkpoints | None = None

    @property
    def dataset(self) -> Dataset:
        """The spec."""
        return self.context.dataset

    @property
    def checkpoints(self) -> Checkpoints:
        """Where the model's snapshots are."""

        root = self.context.settings.snapshot_dir(self.dataset.name, self.model, self.context.ds)
        return Checkpoints(root.parent)

    def run(self) -> UpstreamResult:
        """The three steps; the day's result, which is also kept as `result.json`.

        Raises:
            QualityError: the candidate is rejected, and there is no champion that could stay.
        """

        checkpoints, ds = self.checkpoints, self.context.ds
        parent = parent_of(self.context.lake, checkpoints, ds)
        evaluation, scored, not_evaluated = self.evaluate()
        candidate, training = self.train(parent)
        gate = self.gate(candidate, parent)
        rejected = gate.verdict is Verdict.REJECTED
        if rejected and parent is None:
            raise QualityError(
                f"{candidate.id} is the first of {self.model}: {gate.reason}; look at what {ds} holds, "
                "and at the model's learning rate"
            )
        champion = parent if rejected and parent else candidate
        lineage = self.context.lake.lineage()
        checkpoints.set_champion(
            ds, champion.id, verdict=gate.verdict, candidate=candidate.id,
            definition=definition(self.dataset, "user_embeddings"),
            identity=lineage.identity("user_embeddings", ds),
        )  # fmt: skip
        folder = checkpoints.day(ds)
        write_evaluation(self.dataset, scored, folder / EVALUATION)
        result = UpstreamResult(
            dataset=self.dataset.name,
            model=self.model,
            ds=ds,
            evaluation=evaluation,
            not_evaluated=not_evaluated,
            training=training,
            trained_on=self.day.final_days,
            lost=list(self.lost),
            gate=gate,
            candidate=candidate.id,
            champion=champion.id,
            parent=parent.id if parent else None,
            inputs=self.day.inputs,
        )
        upstream_results(self.context.settings, self.dataset.name, self.model).write(result)
        return result

    def learner(self, parent: Snapshot | None = None) -> Learner:
        """The model with its first weights, which its name fixes, or with those of a parent."""

        device = choose_device()
        torch.set_num_threads(self.preset.training.threads)
        torch.manual_seed(seed_of("init", self.dataset.name, self.model))
        checkpoints = self.parents or self.checkpoints
        state = None if parent is None else checkpoints.load(parent.id)
        return Learner(self.dataset, self.preset, device, state)

    def _whole(self, snapshot: Snapshot) -> Learner:

        return whole_learner(self.dataset, self.checkpoints, snapshot, ds=self.context.ds)

    def _rows(self, users: Users, shown: tuple[Shown, ...], *learners: Learner) -> Iterator[Rows]:

        return labelled_rows(
            self.context.lake,
            self.dataset,
            shown,
            users=users,
            history=any(learner.preset.kind.history for learner in learners),
            user_features=any(learner.preset.kind.user_features for learner in learners),
            limits=self.preset.training.inference,
        )

    def _known(self, learner: Learner, scored: Scored) -> Scored:
        """What of `scored` is of tasks that the learner's snapshot knows."""

        unknown = learner.taken.unknown_tasks()
        known = [i for i, task in enumerate(self.dataset.tasks) if task.name not in unknown]
        return scored.where(np.isin(scored.task, known))

    # ---- evaluate

    def evaluate(self) -> tuple[dict[str, Evaluation], Scored, dict[str, str]]:
        """Metrics per task of the snapshot that was live when the targets were shown, its predictions; and
        days shown whose snapshot does not fit the spec, with the reason."""

        evaluation: dict[str, Evaluation] = {}
        parts, without = [], {}
        for shown in self.day.today:
            live = self.checkpoints.newest_champion(add_days(shown.ds, -1))
            if live is None:  # shown before the first model
                continue
            try:
                learner = self._whole(live)
            except NotWholeError as misfit:
                without[shown.ds] = misfit.fact
                continue
            rows = self._rows(Users.ALL, (shown,), learner)
            scored = score(self.dataset, learner, rows, self.preset.training.inference)
            scored = self._known(learner, scored)
            metrics = task_metrics(self.dataset, scored, live.base_rates())
            for name in shown.labels.tasks:
                if name in metrics:
                    evaluation[name] = Evaluation(
                        **vars(metrics[name]), snapshot=live.id, shown_ds=shown.ds
                    )
            parts.append(scored)
        return evaluation, concat(parts), without

    # ---- train

    def train(self, parent: Snapshot | None) -> tuple[Snapshot, Training]:
        """The candidate: trained now, resumed, or found where this very training was done before."""

        checkpoints, ds = self.checkpoints, self.context.ds
        config = self.preset.plain()
        key = run_hash(
            model=self.model, ds=ds, config=config, spec=self.dataset.hash,
            parent=parent.id if parent else None,
            inputs=self.context.lake.lineage().identities(self.day.inputs),
        )  # fmt: skip
        known = checkpoints.trained(ds, key)
        if known is not None:
            return known, Training(**known.metadata["training"])
        return self._train(parent, key, config)

    def _train(
        self, parent: Snapshot | None, key: str, config: dict[str, Any]
    ) -> tuple[Snapshot, Training]:

        checkpoints, ds, training = self.checkpoints, self.context.ds, self.preset.training
        learner = self.learner(parent)
        if parent is not None:
            # of another spec first weights speak in every prediction of the parent
            learner.keep_parent([] if learner.taken.misfit() else parent.trained_tasks())
        seed = seed_of("train", self.dataset.name, self.model, ds)

        def batches(epoch: int, skip: int) -> Iterable[Batch]:
            return labelled_batches(
                self.context.lake, self.dataset, self.day.shown, users=Users.TRAINING,
                history=self.preset.kind.history, user_features=self.preset.kind.user_features,
                seed=seed_of(seed, epoch), limits=training.limits, skip=skip,
            )  # fmt: skip

        def checkpoint(state: dict[str, Any]) -> None:
            checkpoints.save_progress(ds, {**state, "run_hash": key})

        done = train(
            learner,
            batches,
            seed=seed,
            restored=checkpoints.load_progress(ds, key),
            checkpoint=checkpoint,
            report=self._say,
        )
        record = _record(self.dataset, done, learner)
        weights = state_hash(learner.weights())
        snapshot = Snapshot(
            id=f"{self.model}-{ds}-{weights[:8]}",
            model=self.model,
            ds=ds,
            parent=parent.id if parent else None,
            run_hash=key,
            state_hash=weights,
            config=config,
            spec_hash=self.dataset.hash,
            inputs=dict(self.day.inputs),
            label_counts=_label_counts(self.dataset, parent, done),
            steps=done.steps,
            metadata={"training": vars(record)},
        )
        checkpoints.save(snapshot, learner.state())
        checkpoints.clear_progress(ds)
        return snapshot, record

    def _say(self, done: Progress) -> None:
        rate = done.targets / max(done.seconds, 1e-9)
        print(
            f"{self.model} {self.context.ds}: {done.targets:,} targets, {rate:,.0f} a second",
            flush=True,
        )

    # ---- gate

    def gate(self, candidate: Snapshot, champion: Snapshot | None) -> Gate:
        """Whether the candidate may publish: NE and embedding drift on the held-out users, whose rows are
        decoded once.

        A model of one domain is judged by the labels of that domain. A champion that does not fit the
        spec cannot be compared with.
        """

        learners, unfit = {"candidate": self._whole(candidate)}, ""
        if champion is not None:
            try:
                learners["champion"] = self._whole(champion)
            except NotWholeError as misfit:
                unfit = misfit.fact
        domain = learners["candidate"].domain
        limits = self.preset.training.inference
        rows = self._rows(Users.HELD_OUT, self.day.today, *learners.values())
        scored, embeddings = {}, {}
        for side, (found, users) in score_and_embed(self.dataset, learners, rows, limits).items():
            scored[side], embeddings[side] = self._known(learners[side], found), users
            if domain is not None:
                scored[side] = scored[side].where(scored[side].domain == domain)
        moved = drift(embeddings["candidate"], embeddings.get("champion"))
        decided = decide(
            self.dataset, scored["candidate"], scored.get("champion"), candidate.base_rates(),
            moved, self.preset.gate,
        )  # fmt: skip
        if unfit and decided.verdict is Verdict.NOT_JUDGED:
            return replace(decided, reason=unfit)
        return decided


def _label_counts(
    dataset: Dataset, parent: Snapshot | None, done: Progress
) -> dict[str, list[int]]:
    counts = {t.name: [0, 0] for t in dataset.tasks}
    if parent is not None:
        counts |= {k: list(v) for k, v in parent.label_counts.items() if k in counts}
    for i, task in enumerate(dataset.tasks):
        if done.labels:
            counts[task.name][0] += done.positives[i]
            counts[task.name][1] += done.labels[i]
    return counts


def _record(dataset: Dataset, done: Progress, learner: Learner) -> Training:
    names = [t.name for t in dataset.tasks]
    totals = zip(names, done.loss_sum, done.labels, strict=False)
    return Training(
        steps=done.steps,
        targets=done.targets,
        rows=done.rows,
        events=done.events,
        seconds=round(done.seconds, 3),
        targets_per_second=round(done.targets / max(done.seconds, 1e-9), 1),
        resumed=done.resumed,
        labels=dict(zip(names, done.labels, strict=False)),
        loss={name: total / count for name, total, count in totals if count},
        fresh_weights=learner.taken.fresh(),
        finished=int(time.time()),
    )


def write_evaluation(dataset: Dataset, scored: Scored, path: Path) -> None:
    """Predictions of the evaluation: user_id and target_id as the source has them, task, label,
    prediction, domain, held_out.
    """

    names = np.array([t.name for t in dataset.tasks], dtype=object)
    table = pa.table(
        {
            "user_id": pa.array(scored.stored_user_id.tolist(), id_type(dataset.user_id_type)),
            "target_id": pa.array(scored.target_id.tolist(), id_type(dataset.target_id_type)),
            "task": pa.array(names[scored.task], pa.string()),
            "label": scored.label.astype(np.int32),
            "prediction": scored.prediction,
            "domain": scored.domain,
            "held_out": held_out(scored.user_id, dataset.held_out_share),
        }
    )
    with replacing(path) as staging:
        pq.write_table(table, staging, compression="zstd")
