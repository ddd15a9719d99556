"""One day of one upstream model: evaluate, train, gate.

*Evaluate*: the labels that became final on `ds` judge the snapshot that was live when their targets
were shown, before anything is trained on them (progressive validation). *Train*: from the champion
of the day before, one pass over the same labels without the held-out users. *Gate*: the candidate
against that champion on the held-out users; where it is rejected, that champion stays the champion
of `ds`. Running a day again gives the same snapshot and the same champion.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.days import shift
from feature_store.spec import Dataset
from jobs.context import JobContext, main

if TYPE_CHECKING:
    from jobs.training.checkpoints import Checkpoints, Snapshot
    from jobs.training.loader import LabelledDay
    from jobs.training.loop import Learner, Progress, Scored
    from jobs.training.presets import Preset

EVALUATION, RESULT = "evaluation.parquet", "result.json"


def run(context: JobContext) -> None:
    """Evaluate, train and gate `context.model` on `context.ds`.

    Raises:
        MissingPartitionError: labels or examples of the day have not been written.
    """
    from jobs.training.loader import labelled_day
    from jobs.training.presets import preset

    model = context.require_model()
    chosen = preset(context.dataset, model)
    day = labelled_day(context.lake, context.dataset, context.ds)
    trainer = UpstreamDay(context=context, model=model, preset=chosen, day=day)
    result = trainer.run()
    from jobs.training.upstream_run import log_day

    log_day(context, model=model, preset=chosen, day=day, result=result)
    print(summary(result), flush=True)


def summary(result: dict[str, Any]) -> str:
    """One line for the log."""
    parts = [f"{result['model']} {result['ds']}"]
    for task, found in result["evaluation"].items():
        if found["ne"] is not None:
            parts.append(f"{task} NE {found['ne']:.4f} AUC {found['auc'] or float('nan'):.3f}")
    trained = result["training"]
    parts.append(f"{trained['targets']} targets in {trained['seconds']:.1f} s")
    gate = result["gate"]
    parts.append(
        "champion "
        + result["champion"]
        + ("" if gate["accepted"] else f" (rejected: {gate['reason']})")
    )
    return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class UpstreamDay:
    """What evaluates, trains and gates one model on one day, at pinned versions.

    Args:
        context: of the job.
        model: its name.
        preset: its configuration.
        day: labels and examples, at pinned versions.
        parents: where the parent snapshot is, if not where the new one goes.
    """

    context: JobContext
    model: str
    preset: Preset
    day: LabelledDay
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
        """The three steps; the day's result, which is also kept as `result.json`."""
        from jobs.training.checkpoints import write_atomically

        checkpoints, ds = self.checkpoints, self.context.ds
        learner = self.learner()
        parent = checkpoints.newest_champion(shift(ds, -1))
        evaluation, scored = self.evaluate(learner)
        candidate, progress = self.train(learner, parent)
        gate = self.gate(learner, candidate, parent)
        champion = candidate if gate["accepted"] or parent is None else parent
        checkpoints.set_champion(ds, champion.id, accepted=gate["accepted"], candidate=candidate.id)
        folder = checkpoints.day(ds)
        write_evaluation(self.dataset, scored, folder / EVALUATION)
        result = {
            "dataset": self.dataset.name,
            "model": self.model,
            "ds": ds,
            "evaluation": evaluation,
            "training": progress,
            "gate": gate,
            "candidate": candidate.id,
            "champion": champion.id,
            "parent": parent.id if parent else None,
            "inputs": self.day.inputs,
        }
        write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())
        return result

    def learner(self) -> Learner:
        """The model with its first weights, fixed by its name and the day."""
        import torch

        from jobs.training.ids import seed_of
        from jobs.training.loop import Learner, choose_device

        device = choose_device()
        torch.set_num_threads(self.preset.training.threads)
        torch.manual_seed(seed_of("init", self.dataset.name, self.model))
        return Learner(self.dataset, self.preset, device)

    def _rows(self, users: str, shown: tuple | None = None, **more: Any) -> Any:
        from jobs.training.loader import Users, labelled_rows

        return labelled_rows(
            self.context.lake,
            self.dataset,
            self.day.shown if shown is None else shown,
            users=Users(users),
            history=self.preset.history,
            user_features=self.preset.user_features,
            **more,
        )

    # ---- evaluate

    def evaluate(self, learner: Learner) -> tuple[dict[str, Any], Scored]:
        """Metrics per task of the snapshot that was live when the targets were shown."""
        from jobs.training.judge import task_metrics
        from jobs.training.loop import concat, score

        found: dict[str, Any] = {}
        parts = []
        for shown in self.day.shown:
            live = self.checkpoints.newest_champion(shift(shown.ds, -1))
            if live is None:  # shown before the first model
                continue
            learner.load(self.checkpoints.load(live.id))
            limits = self.preset.training.inference
            scored = score(
                self.dataset, learner, self._rows("all", (shown,), limits=limits), limits
            )
            metrics = task_metrics(self.dataset, scored, live.base_rates())
            for name in shown.labels.tasks:
                if name in metrics:
                    found[name] = {**metrics[name], "snapshot": live.id, "shown_ds": shown.ds}
            parts.append(scored)
        return found, concat(parts)

    # ---- train

    def train(self, learner: Learner, parent: Snapshot | None) -> tuple[Snapshot, dict[str, Any]]:
        """The candidate: trained now, resumed, or found where this very training was done before."""
        from jobs.training.checkpoints import run_hash
        from jobs.training.config import to_plain

        checkpoints, ds = self.checkpoints, self.context.ds
        config = to_plain(self.preset)
        key = run_hash(
            model=self.model, ds=ds, config=config, spec=self.dataset.hash,
            parent=parent.id if parent else None, inputs=self.day.inputs,
        )  # fmt: skip
        known = checkpoints.trained(ds, key)
        if known is not None:
            learner.load(checkpoints.load(known.id))
            return known, known.metadata["training"]
        return self._train(learner, parent, key, config)

    def _train(
        self, learner: Learner, parent: Snapshot | None, key: str, config: dict[str, Any]
    ) -> tuple[Snapshot, dict[str, Any]]:
        from jobs.training.checkpoints import Snapshot, state_hash
        from jobs.training.ids import seed_of
        from jobs.training.loader import labelled_batches
        from jobs.training.loop import train

        checkpoints, ds, training = self.checkpoints, self.context.ds, self.preset.training
        fresh: list[str] = []
        if parent is None:
            learner = self.learner()
        else:
            fresh = learner.load((self.parents or checkpoints).load(parent.id))
            # where a spec has grown, first weights speak in every prediction of the parent
            learner.keep_parent([] if fresh else parent.trained_tasks())
        seed = seed_of("train", self.dataset.name, self.model, ds)

        def batches(epoch: int, skip: int) -> Any:
            from jobs.training.loader import Users

            return labelled_batches(
                self.context.lake, self.dataset, self.day.shown, users=Users.TRAINING,
                history=self.preset.history, user_features=self.preset.user_features,
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
            metadata={"training": _training_record(self.dataset, done, fresh)},
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

    def gate(
        self, learner: Learner, candidate: Snapshot, champion: Snapshot | None
    ) -> dict[str, Any]:
        """Whether the candidate may publish: NE and embedding drift on the held-out users.

        A model of one domain is judged by the labels of that domain.
        """
        from jobs.training.judge import decide, drift, task_metrics
        from jobs.training.loop import embeddings_of, score

        limits = self.preset.training.inference
        sides: dict[str, Any] = {}
        embeddings: dict[str, Any] = {}
        rates = candidate.base_rates()
        for side, snapshot in (("candidate", candidate), ("champion", champion)):
            if snapshot is None:
                continue
            learner.load(self.checkpoints.load(snapshot.id))
            scored = score(self.dataset, learner, self._rows("held_out", limits=limits), limits)
            if learner.domain is not None:
                scored = scored.where(scored.domain == learner.domain)
            sides[side] = task_metrics(self.dataset, scored, rates, domains=False)
            decoded = self._rows("held_out", limits=limits)
            embeddings[side] = embeddings_of(learner, decoded, limits)[1]
        moved = drift(embeddings["candidate"], embeddings.get("champion"))
        return decide(sides["candidate"], sides.get("champion"), moved, self.preset.gate)


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


def _training_record(dataset: Dataset, done: Progress, fresh: list[str]) -> dict[str, Any]:
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
        "fresh_weights": fresh,
        "finished": int(time.time()),
    }


def write_evaluation(dataset: Dataset, scored: Scored, path: Path) -> None:
    """Predictions of the evaluation: user_id and target_id as the source has them, task, label,
    prediction, domain, held_out.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from feature_store.tables import id_type
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
