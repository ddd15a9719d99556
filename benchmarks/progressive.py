"""An upstream model trained day by day, as the pipeline trains it, and the user embeddings of its days.

    <out>/upstream/<model>/models/<dataset>/seed-<n>/<ds>/
        embeddings.npz    user_id (n,) int64 (strings hashed); served, held (n, K, D) float16
        ...               what jobs/train_upstream.py keeps of a day

A day whose file was made from the same configuration, the same partitions and the same days before
it is read and not trained again. Seeds are the same for every model: two models differ in their
configuration only. There is no gate: each day's snapshot serves the day after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.ours import variant
from feature_store.days import shift
from feature_store.embeddings import EmbeddingKind, UserEmbeddings, pooled
from feature_store.errors import DataError, SpecError
from feature_store.ledger import pin
from feature_store.spec import Dataset
from jobs.context import JobContext
from jobs.publish_embeddings import POOLED_DAYS, UserRows, embed
from jobs.settings import Settings
from jobs.train_upstream import UpstreamDay, summary
from jobs.training.checkpoints import replacing, run_hash
from jobs.training.config import GateConfig, to_plain
from jobs.training.ids import int64_ids
from jobs.training.loader import labelled_day
from jobs.training.presets import Preset
from jobs.training.whole import whole_learner

EMBEDDINGS = "embeddings.npz"
_NO_GATE = GateConfig(ne_tolerance=1e9, min_cosine=-2.0, max_l2=1e9)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """One day of an upstream model.

    Args:
        served: raw embeddings by the snapshot of the day.
        held: of the same users and features, by the snapshot of the day before; None on the first day.
        ne: task -> NE in progressive validation; tasks that could not be judged are left out.
    """

    served: UserEmbeddings
    held: UserEmbeddings | None
    ne: dict[str, float]


def publishable(dataset: Dataset, model: str) -> Preset:
    """What a name of `benchmarks/ours.py` stands for.

    Raises:
        SpecError: the name does not make a model, or one of other histories than are published of.
    """
    found, seen = variant(dataset, model)
    if seen:
        raise SpecError(
            f"--models: {model!r} has other histories, and embeddings are published of whole ones; leave "
            "that out"
        )
    return found


class Progressive:
    """One training of one upstream model over every day of a lake.

    Args:
        settings: of the lake.
        dataset: the spec.
        model: name of a preset, with changes of its fields as in `benchmarks/ours.py`.
        seed: of the first weights and of the order of batches.
        out: folder that everything is kept under.

    Raises:
        SpecError: the name does not make a model that can be published.
        DataError: the lake has no day to train on.
    """

    def __init__(
        self, settings: Settings, dataset: Dataset, model: str, *, seed: int, out: Path
    ) -> None:
        self.settings = replace(settings, home=out / "upstream" / model)
        self.dataset, self.model, self.name = dataset, model, f"seed-{seed}"
        self.preset = replace(publishable(dataset, model), gate=_NO_GATE)
        self.lake = JobContext(dataset=dataset, ds=dataset.first_day, settings=settings).lake
        tables = ("labels", "examples", self.preset.user_table)
        known = {t: self.lake.partitions(t) for t in (*tables, "item_aggregates")}
        self.days: list[str] = sorted(set.intersection(*(set(known[t]) for t in tables)))
        if not self.days:
            raise DataError(
                f"the lake of {dataset.name} has no day with {', '.join(tables)}: build it with `make "
                f"run DATASET={dataset.name}`, and name its HEADWATER_HOME"
            )
        self.inputs = {
            pin(table, ds): found.version for table, by in known.items() for ds, found in by.items()
        }

    def config(self) -> dict[str, Any]:
        """What the embeddings depend on."""
        plain = to_plain(self.preset)
        return {"spec": self.dataset.hash, "inputs": self.inputs, "preset": plain}

    def run(self) -> dict[str, Embedded]:
        """Every day, ascending: those that are kept are read, the others are trained."""
        found: dict[str, Embedded] = {}
        key = None
        for ds in self.days:
            before = {k: v for k, v in self.inputs.items() if k.rpartition("/")[2] <= ds}
            key = run_hash(
                model=self.name, ds=ds, config=to_plain(self.preset), spec=self.dataset.hash,
                parent=key, inputs={k: str(v) for k, v in before.items()},
            )  # fmt: skip
            known = self._read(ds, key)
            if known is None:
                self._train(ds, key)
                known = self._read(ds, key)
                assert known is not None
            found[ds] = known
        return found

    def _path(self, ds: str) -> Path:
        return self.settings.snapshot_dir(self.dataset.name, self.name, ds) / EMBEDDINGS

    def _read(self, ds: str, key: str) -> Embedded | None:
        path = self._path(ds)
        if not path.exists():
            return None
        with np.load(path) as found:
            about = json.loads(str(found["about"]))
            if about["key"] != key:
                return None
            ids = pa.array(found["user_id"])
            sides = {side: found[side] for side in about["snapshots"]}
        embeddings = {
            side: UserEmbeddings(
                model=self.model, ds=ds, kind=EmbeddingKind.RAW, snapshot=about["snapshots"][side],
                ids=ids, values=values,
            )
            for side, values in sides.items()
        }  # fmt: skip
        return Embedded(served=embeddings["served"], held=embeddings.get("held"), ne=about["ne"])

    def _train(self, ds: str, key: str) -> None:
        context = JobContext(dataset=self.dataset, ds=ds, settings=self.settings)
        day = UpstreamDay(
            context=context, model=self.name, preset=self.preset,
            day=labelled_day(context.lake, self.dataset, ds),
        )  # fmt: skip
        result = day.run()
        print(f"{self.model} {summary(result)}", flush=True)
        users = UserRows.of(context.lake, self.preset, ds)
        snapshots = {"served": result["champion"], "held": result["parent"]}
        snapshots = {side: snapshot for side, snapshot in snapshots.items() if snapshot}
        arrays: dict[str, Any] = {}
        for side, snapshot in snapshots.items():
            of = day.checkpoints.get(snapshot)
            learner = whole_learner(self.dataset, day.checkpoints, of, ds=ds)
            ids, arrays[side] = embed(learner, context.lake, ds, users)
        ne = {t: of["ne"] for t, of in result["evaluation"].items() if of["ne"] is not None}
        about = json.dumps({"key": key, "snapshots": snapshots, "ne": ne})
        with replacing(self._path(ds)) as staging, staging.open("wb") as file:
            np.savez(file, about=np.array(about), user_id=int64_ids(ids), **arrays)


def published(
    days: Mapping[str, Embedded], ds: str, kind: EmbeddingKind, *, held: bool = False
) -> UserEmbeddings:
    """What `ds` publishes for the day after it.

    Args:
        days: what `Progressive.run` gave.
        kind: raw, or pooled over `ds` and the days before it.
        held: as if there were no snapshot of `ds` yet: the newest features, by the snapshot of the day
            before. Of the pooled embeddings that is one part of three.

    Raises:
        DataError: `held` is asked of the first day.
    """
    now = days[ds].held if held else days[ds].served
    if now is None:
        raise DataError(f"held embeddings of {ds}: no snapshot is older; choose a later day")
    if kind is EmbeddingKind.RAW:
        return now
    earlier = [shift(ds, -i) for i in range(1, POOLED_DAYS)]
    values, _ = pooled(now.ids, now.values, [days[d].served for d in earlier if d in days])
    return replace(now, kind=kind, values=values)


def progressive_ne(days: Mapping[str, Embedded], chosen: Sequence[str]) -> dict[str, float]:
    """Task -> mean NE of the upstream model in progressive validation over the days `chosen`."""
    judged = [days[ds].ne for ds in chosen if ds in days]
    names = dict.fromkeys(name for ne in judged for name in ne)
    return {name: float(np.mean([ne[name] for ne in judged if name in ne])) for name in names}
