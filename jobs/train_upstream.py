"""One day of one upstream model: evaluate, train, gate.

*Evaluate*: the labels that became final on `ds` judge the snapshot that was live when their targets
were shown, before anything is trained on them (progressive validation). *Train*: from the champion
of the day before, one pass over the same labels without the held-out users; and over those of the
days before whose candidates were rejected, so that no day is lost to the model. *Gate*: the candidate
against that champion on the held-out users; where it is rejected, that champion stays the champion
of `ds`. Where they are too few the candidate is not judged, and becomes champion. Running a day again
gives the same snapshot and the same champion.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.days import shift
from feature_store.errors import QualityError
from feature_store.spec import Dataset
from feature_store.tables import definition
from jobs.context import JobContext, main
from jobs.text import number
from jobs.training.results import EVALUATION, RESULT

if TYPE_CHECKING:
    from jobs.training.checkpoints import Checkpoints, Snapshot
    from jobs.training.learner import Learner
    from jobs.training.loader import LabelledDay, Shown
    from jobs.training.presets import Preset
    from jobs.training.scoring import Scored
    from jobs.training.trainer import Progress


def run(context: JobContext) -> None:
    """Evaluate, train and gate `context.model` on `context.ds`.

    Raises:
        MissingPartitionError: labels or examples of the day have not been written, or an earlier day was
            not trained on.
        StalePartitionError: these tables, or what the day before was trained on, are not current.
        QualityError: the first candidate diverged, and there is no champion that could stay.
    """
    from jobs.training.checkpoints import Checkpoints
    from jobs.training.loader import labelled_day
    from jobs.training.parent import parent_of, untrained
    from jobs.training.presets import preset

    model, dataset, ds = context.require_model(), context.dataset, context.ds
    chosen = preset(dataset, model)
    root = context.settings.snapshot_dir(dataset.name, model, ds).parent
    parent = parent_of(context.lake, Checkpoints(root), ds)
    missed = untrained(context.lake, parent, ds)
    lost = missed[: -chosen.training.catch_up_days or None]
    day = labelled_day(context.lake, dataset, ds, also=missed[len(lost) :])
    trainer = UpstreamDay(context=context, model=model, preset=chosen, day=day, lost=tuple(lost))
    result = trainer.run()
    from jobs.training.upstream_run import log_day

    log_day(context, model=model, preset=chosen, day=day, result=result)
    print(summary(result), flush=True)


def summary(result: dict[str, Any]) -> str:
    """One line for the log."""
    parts = [f"{result['model']} {result['ds']}"]
    for task, found in result["evaluation"].items():
        if found["why_not"]:
            parts.append(f"{task} no NE ({found['why_not']})")
        else:
            parts.append(f"{task} NE {number(found['ne'])} AUC {number(found['auc'], 3)}")
    parts += [f"{ds} is not evaluated ({why})" for ds, why in result["not_evaluated"].items()]
    trained = result["training"]
    parts.append(f"{trained['targets']} targets in {trained['seconds']:.1f} s")
    if len(result["trained_on"]) > 1:
        parts.append(f"labels of {', '.join(result['trained_on'])}, as no champion knew them")
    if result["lost"]:
        parts.append(f"labels of {', '.join(result['lost'])} are lost to the model")
    gate = result["gate"]
    reason = f": {gate['reason']}" if gate["reason"] else ""
    parts.append(f"champion {result['champion']} (candidate {gate['verdict']}{reason})")
    return ", ".join(parts)


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
        from jobs.training.checkpoints import Checkpoints

        root = self.context.settings.snapshot_dir(self.dataset.name, self.model, self.context.ds)
        return Checkpoints(root.parent)

    def run(self) -> dict[str, Any]:
        """The three steps; the day's result, which is also kept as `result.json`.

        Raises:
            QualityError: the candidate is rejected, and there is no champion that could stay.
        """
        from jobs.training.checkpoints import write_atomically
        from jobs.training.judge import Verdict
        from jobs.training.parent import parent_of

        checkpoints, ds = self.checkpoints, self.context.ds
        parent = parent_of(self.context.lake, checkpoints, ds)
        evaluation, scored, not_evaluated = self.evaluate()
        candidate, progress = self.train(parent)
        gate = self.gate(candidate, parent)
        rejected = gate["verdict"] == Verdict.REJECTED
        if rejected and parent is None:
            raise QualityError(
                f"{candidate.id} is the first of {self.model}: {gate['reason']}; look at what {ds} holds, "
                "and at the model's learning rate"
            )
        champion = parent if rejected and parent else candidate
        lineage = self.context.lake.lineage()
        checkpoints.set_champion(
            ds, champion.id, verdict=gate["verdict"], candidate=candidate.id,
            definition=definition(self.dataset, "user_embeddings"),
            identity=lineage.identity("user_embeddings", ds),
        )  # fmt: skip
        folder = checkpoints.day(ds)
        write_evaluation(self.dataset, scored, folder / EVALUATION)
        result = {
            "dataset": self.dataset.name,
            "model": self.model,
            "ds": ds,
            "evaluation": evaluation,
            "not_evaluated": not_evaluated,
            "training": progress,
            "trained_on": self.day.final_days,
            "lost": list(self.lost),
            "gate": gate,
            "candidate": candidate.id,
            "champion": champion.id,
            "parent": parent.id if parent else None,
            "inputs": self.day.inputs,
        }
        write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())
        return result

    def learner(self, parent: Snapshot | None = None) -> Learner:
        """The model with its first weights, which its name fixes, or with those of a parent."""
        import torch

        from jobs.training.ids import seed_of
        from jobs.training.learner import Learner
        from jobs.training.trainer import choose_device

        device = choose_device()
        torch.set_num_threads(self.preset.training.threads)
        torch.manual_seed(seed_of("init", self.dataset.name, self.model))
        checkpoints = self.parents or self.checkpoints
        state = None if parent is None else checkpoints.load(parent.id)
        return Learner(self.dataset, self.preset, device, state)

    def _whole(self, snapshot: Snapshot) -> Learner:
        from jobs.training.whole import whole_learner

        return whole_learner(self.dataset, self.checkpoints, snapshot, ds=self.context.ds)

    def _rows(self, users: str, shown: tuple[Shown, ...], *learners: Learner) -> Any:
        from jobs.training.loader import Users, labelled_rows

        return labelled_rows(
            self.context.lake,
            self.dataset,
            shown,
            users=Users(users),
            history=any(learner.preset.kind.history for learner in learners),
            user_features=any(learner.preset.kind.user_features for learner in learners),
            limits=self.preset.training.inference,
        )

    def _known(self, learner: Learner, scored: Scored) -> Scored:
        """What of `scored` is of tasks that the learner's snapshot knows."""
        import numpy as np

        unknown = learner.taken.unknown_tasks()
        known = [i for i, task in enumerate(self.dataset.tasks) if task.name not in unknown]
        return scored.where(np.isin(scored.task, known))

    # ---- evaluate

    def evaluate(self) -> tuple[dict[str, Any], Scored, dict[str, str]]:
        """Metrics per task of the snapshot that was live when the targets were shown, its predictions; and
        days shown whose snapshot does not fit the spec, with the reason."""
        from jobs.training.judge import task_metrics
        from jobs.training.scoring import concat, score
        from jobs.training.whole import NotWholeError

        found: dict[str, Any] = {}
        parts, without = [], {}
        for shown in self.day.today:
            live = self.checkpoints.newest_champion(shift(shown.ds, -1))
            if live is None:  # shown before the first model
                continue
            try:
                learner = self._whole(live)
            except NotWholeError as misfit:
                without[shown.ds] = misfit.fact
                continue
            rows = self._rows("all", (shown,), learner)
            scored = score(self.dataset, learner, rows, self.preset.training.inference)
            scored = self._known(learner, scored)
            metrics = task_metrics(self.dataset, scored, live.base_rates())
            for name in shown.labels.tasks:
                if name in metrics:
                    found[name] = {**metrics[name], "snapshot": live.id, "shown_ds": shown.ds}
            parts.append(scored)
        return found, concat(parts), without

    # ---- train

    def train(self, parent: Snapshot | None) -> tuple[Snapshot, dict[str, Any]]:
        """The candidate: trained now, resumed, or found where this very training was done before."""
        from jobs.training.checkpoints import run_hash

        checkpoints, ds = self.checkpoints, self.context.ds
        config = self.preset.plain()
        key = run_hash(
            model=self.model, ds=ds, config=config, spec=self.dataset.hash,
            parent=parent.id if parent else None,
            inputs=self.context.lake.lineage().identities(self.day.inputs),
        )  # fmt: skip
        known = checkpoints.trained(ds, key)
        if known is not None:
            return known, known.metadata["training"]
        return self._train(parent, key, config)

    def _train(
        self, parent: Snapshot | None, key: str, config: dict[str, Any]
    ) -> tuple[Snapshot, dict[str, Any]]:
        from jobs.training.checkpoints import Snapshot, state_hash
        from jobs.training.ids import seed_of
        from jobs.training.loader import labelled_batches
        from jobs.training.trainer import train

        checkpoints, ds, training = self.checkpoints, self.context.ds, self.preset.training
        learner = self.learner(parent)
        if parent is not None:
            # of another spec first weights speak in every prediction of the parent
            learner.keep_parent([] if learner.taken.misfit() else parent.trained_tasks())
        seed = seed_of("train", self.dataset.name, self.model, ds)

        def batches(epoch: int, skip: int) -> Any:
            from jobs.training.loader import Users

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
            metadata={"training": _training_record(self.dataset, done, learner)},
        )
        checkpoints.save(snapshot, learner.state())
        checkpoints.clear_progress(ds)
        return snapshot, snapshot.metadata["training"]

    def _say(self, done: Progress) -> None:
        rate = done.targets / max(done.seconds, 1e-9)
        print(
            f"{self.model} {self.context.ds}: {done.targets:,} targets, {rate:,.0f} a second",
            flush=True,
        )

    # ---- gate

    def gate(self, candidate: Snapshot, champion: Snapshot | None) -> dict[str, Any]:
        """Whether the candidate may publish: NE and embedding drift on the held-out users, whose rows are
        decoded once.

        A model of one domain is judged by the labels of that domain. A champion that does not fit the
        spec cannot be compared with.
        """
        from jobs.training.judge import Verdict, decide, drift, score_and_embed
        from jobs.training.whole import NotWholeError

        learners, unfit = {"candidate": self._whole(candidate)}, ""
        if champion is not None:
            try:
                learners["champion"] = self._whole(champion)
            except NotWholeError as misfit:
                unfit = misfit.fact
        domain = learners["candidate"].domain
        limits = self.preset.training.inference
        rows = self._rows("held_out", self.day.today, *learners.values())
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
        if unfit and decided["verdict"] == Verdict.NOT_JUDGED:
            decided["reason"] = unfit
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


def _training_record(dataset: Dataset, done: Progress, learner: Learner) -> dict[str, Any]:
    seconds = max(done.seconds, 1e-9)
    return {
        "steps": done.steps,
        "targets": done.targets,
        "rows": done.rows,
        "events": done.events,
        "seconds": round(done.seconds, 3),
        "targets_per_second": round(done.targets / seconds, 1),
        "resumed": done.resumed,
        "labels": dict(zip([t.name for t in dataset.tasks], done.labels, strict=False)),
        "loss": {
            t.name: total / count
            for t, total, count in zip(dataset.tasks, done.loss_sum, done.labels, strict=False)
            if count
        },
        "fresh_weights": learner.taken.fresh(),
        "finished": int(time.time()),
    }


def write_evaluation(dataset: Dataset, scored: Scored, path: Path) -> None:
    """Predictions of the evaluation: user_id and target_id as the source has them, task, label,
    prediction, domain, held_out.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from feature_store.columns import id_type
    from jobs.training.checkpoints import replacing
    from jobs.training.ids import held_out

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


if __name__ == "__main__":
    main("train_upstream")
