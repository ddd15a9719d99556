"""Publish one model's user embeddings of one day: raw and pooled, from the day's champion.

Every user in the history window gets one, made from events available before the end of `ds` less
`serve_delay`, to be used on `ds + 1`. Coverage, norms and drift are checked, and kept with the
partition and in MLflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store import quality
from feature_store.days import add_days, day_range, end_us, micros
from feature_store.embeddings import decode, published_rows, read_embeddings
from feature_store.errors import QualityError, StalePartitionError
from feature_store.tables import contract
from jobs.context import JobContext, main
from jobs.training import tracking
from jobs.training.checkpoints import Checkpoints
from jobs.training.ids import int64_ids
from jobs.training.judge import moved, norms
from jobs.training.loader import user_batches
from jobs.training.rows import columns_of
from jobs.training.upstream_log import experiment, run_key
from jobs.training.whole import whole_learner

if TYPE_CHECKING:
    from feature_store.embeddings import UserEmbeddings
    from feature_store.lake import Lake
    from jobs.training.learner import Learner
    from jobs.training.presets import Preset

POOLED_DAYS = 3  # ds, ds - 1 and ds - 2
READ_ROWS = 8192


def run(context: JobContext) -> None:
    """Publish `context.model` on `context.ds`.

    Raises:
        HeadwaterError: the day has no champion, or one that is damaged or does not fit the spec.
        MissingPartitionError: the day's user table has not been written.
        StalePartitionError: the user table is not current, or the champion was chosen by tables that
            are not.
        QualityError: an embedding is not finite, or all zeros.
    """
    warm = quality.warm_up()
    dataset, ds, model, lake = context.dataset, context.ds, context.require_model(), context.lake
    root = context.settings.snapshot_dir(dataset.name, model, ds).parent
    checkpoints = Checkpoints(root)
    champion = checkpoints.require_champion(ds)
    lineage = lake.lineage()
    if checkpoints.decided_from(ds)[1] != lineage.identity("user_embeddings", ds):
        raise StalePartitionError(
            f"champion of {model} on {ds} was chosen by tables that were replaced since: run python -m "
            f"jobs train_upstream publish_embeddings --dataset {dataset.name} --ds {ds} --model {model}"
        )
    learner = whole_learner(dataset, checkpoints, champion, ds=ds)
    users = UserRows.of(lake, learner.preset, ds)
    ids, raw = embed(learner, lake, ds, users)
    before_days = [add_days(ds, -i) for i in range(1, POOLED_DAYS)]
    published = {day: lineage.get("user_embeddings", day, model) for day in before_days}
    before = [
        read_embeddings(lake, model, day, "raw")
        for day, partition in published.items()
        if partition and partition.rows and len(ids)
        if not lineage.stale("user_embeddings", day, model)
    ]
    notes = statistics(
        context, ids, raw, before[0] if before and before[0].ds == before_days[0] else None
    )
    notes["snapshot"] = champion.id
    inputs = dict(users.inputs)
    for day in before:
        inputs |= lake.require("user_embeddings", [day.ds], model)
    rows = published_rows(
        dataset, model=model, ds=ds, snapshot=champion.id, user_ids=ids, raw=raw, before=before
    )
    if notes["cosine"] is not None:
        notes["cosine_pooled"] = pooled_cosine(rows, read_embeddings(lake, model, add_days(ds, -1)))
    warm.join()
    lake.publish_arrow(
        "user_embeddings", ds, rows, inputs=inputs, model=model, notes=notes,
        code_version=context.code_version, engine="torch",
    )  # fmt: skip
    _log(context, model, notes)
    print(
        f"{model} {ds}: {len(ids):,} users published from {champion.id}, {coverage_text(notes)}",
        flush=True,
    )


@dataclass(frozen=True, kw_only=True)
class UserRows:
    """Where the users of a day are: one row each, over partitions at pinned versions.

    Args:
        table: `aggregates`, or `sequences`.
        days: newest first; a user's row is in the newest day that has them.
        inputs: {"<table>/<ds>": version}.
    """

    table: str
    days: tuple[str, ...]
    inputs: dict[str, int]

    @classmethod
    def of(cls, lake: Lake, preset: Preset, ds: str) -> UserRows:
        """The user rows that `preset` publishes from on `ds`.

        Raises:
            MissingPartitionError: a partition has not been written.
        """
        table = preset.kind.user_table
        inputs = lake.require(table, [ds])
        days = [ds]
        if table == "sequences":
            known = lake.partitions(table)
            bases = [d for d, p in known.items() if d <= ds and p.notes.get("base")]
            days = day_range(max(bases, default=min(known)), ds)
            inputs = lake.require(table, days)
        return cls(table=table, days=tuple(reversed(days)), inputs=inputs)

    def batches(self, lake: Lake, preset: Preset) -> Iterator[pa.RecordBatch]:
        """The newest row of each user, once. Holds 8 bytes per user, and a batch."""
        kind = preset.kind
        columns = columns_of(
            lake.dataset, self.table, history=kind.history, user_features=kind.user_features
        )
        seen = np.empty(0, np.int64)
        for day in self.days:
            today = []
            for batch in lake.batches(
                self.table, days=[day], columns=columns, version=self.inputs, batch_rows=READ_ROWS
            ):
                ids = int64_ids(batch.column("user_id"))
                place = np.minimum(np.searchsorted(seen, ids), max(len(seen) - 1, 0))
                keep = seen[place] != ids if len(seen) else np.ones(len(ids), bool)
                today.append(ids[keep])
                if keep.any():
                    yield batch if keep.all() else batch.filter(pa.array(keep))
            seen = np.sort(np.concatenate([seen, *today]))


def embed(learner: Learner, lake: Lake, ds: str, users: UserRows) -> tuple[pa.Array, np.ndarray]:
    """User ids, as stored, and embeddings (n, K, D) float16, in the order of the ids."""
    ids, values = [], []
    for user_ids, found in embedded(learner, ds, users.batches(lake, learner.preset)):
        with np.errstate(over="ignore"):
            values.append(found.astype(np.float16))
        ids.append(user_ids)
    if not ids:
        kind = contract(learner.dataset, users.table).schema.field("user_id").type
        return pa.array([], kind), np.empty((0, 0, 0), np.float16)
    joined = pa.concat_arrays(ids)
    order = pa.compute.sort_indices(joined)
    return joined.take(order), np.concatenate(values)[order.to_numpy()]


def embedded(
    learner: Learner, ds: str, users: Iterable[pa.RecordBatch]
) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """User ids, as stored, and embeddings (n, K, D) float32 at the end of `ds` less `serve_delay`, a batch
    of `users` after the other: rows of the table that the learner's preset publishes from."""
    dataset, preset = learner.dataset, learner.preset
    cutoff = end_us(ds, dataset.utc_offset) - micros(dataset.serve_delay)
    for ids, batch in user_batches(dataset, users, limits=preset.training.inference, cutoff=cutoff):
        found = learner.user_embeddings(batch, cutoff).numpy()
        if preset.kind.history:  # who has no event before the cutoff is not in the window yet
            some = batch.event_offsets.diff().numpy() > 0
            found, ids = found[some], ids.filter(pa.array(some))
        yield ids, found


def statistics(
    context: JobContext, ids: pa.Array, raw: np.ndarray, yesterday: UserEmbeddings | None
) -> dict[str, Any]:
    """Coverage, norms and drift.

    Returns:
        users; coverage (share of the day's impression users who have one, None without
        impressions); norm_mean, norm_min, norm_max, None without users; common_users, cosine, l2,
        l2_relative against the day before, None where it has none of these users.

    Raises:
        QualityError: an embedding is not finite in float16, or all zeros.
    """
    lengths = norms(raw)
    bad = ~np.isfinite(lengths) | (lengths == 0)
    if bad.any():
        few = [ids[int(i)].as_py() for i in np.nonzero(bad)[0][:3]]
        raise QualityError(
            f"user_embeddings of {context.model} on {context.ds}: norm has to be finite and above 0, "
            f"{int(bad.sum())} of {len(lengths)} are not (users {few}); look at the snapshot's training"
        )
    notes: dict[str, Any] = {
        "users": len(ids),
        "coverage": None,
        "norm_mean": float(lengths.mean()) if len(lengths) else None,
        "norm_min": float(lengths.min()) if len(lengths) else None,
        "norm_max": float(lengths.max()) if len(lengths) else None,
        "common_users": 0,
        "cosine": None,
        "l2": None,
        "l2_relative": None,
    }
    if context.ds in context.lake.partitions("impressions"):
        shown = context.lake.read("impressions", days=[context.ds], columns=["user_id"])["user_id"]
        users = pc.unique(shown)
        if len(users):
            notes["coverage"] = pc.sum(pc.is_in(users, value_set=ids)).as_py() / len(users)
    if yesterday is not None and yesterday.values.shape[1:] == raw.shape[1:]:
        notes["common_users"] = int((yesterday.places(ids) >= 0).sum())
        if notes["common_users"]:
            drift = moved(yesterday.beside(ids, raw))
            notes |= {k: getattr(drift, k) for k in ("cosine", "l2", "l2_relative")}
    return notes


def coverage_text(notes: Mapping[str, Any]) -> str:
    """Whom of the day's impressions it covers, for the log."""
    found = notes["coverage"]
    return "no impressions to cover" if found is None else f"coverage {found:.1%}"


def pooled_cosine(rows: pa.Table, yesterday: UserEmbeddings) -> float | None:
    """Mean cosine between users' pooled embeddings and those of the day before; None without any."""
    now = decode(rows["pooled"], *yesterday.values.shape[1:])
    ids = rows["user_id"].combine_chunks()
    return moved(yesterday.beside(ids, now)).cosine if (yesterday.places(ids) >= 0).any() else None


def _log(context: JobContext, model: str, notes: dict[str, Any]) -> None:
    """Beside the training of the day, in its run."""
    dataset = context.dataset
    day = context.settings.snapshot_dir(dataset.name, model, context.ds)
    checkpoints = Checkpoints(day.parent)
    record = checkpoints.champion_record(context.ds)
    assert record is not None  # what was published is the champion's
    candidate = checkpoints.get(record["candidate"])
    with tracking.Run(
        context.settings,
        experiment=experiment(dataset.name, model),
        name=f"{model} {context.ds}",
        key=run_key(dataset, candidate),
        tags={"published_snapshot": notes["snapshot"]},
    ) as run:
        run.metrics({f"published_{k}": v for k, v in notes.items() if k != "snapshot"})


if __name__ == "__main__":
    main("publish_embeddings")
