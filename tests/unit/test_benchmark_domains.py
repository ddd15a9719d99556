"""The cross-domain matrix: each cell trains and tests on one domain's targets, with the right embeddings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import alone
from benchmarks import domains as program
from benchmarks.alone import ALL_TASKS, CONTEXT, Program
from benchmarks.domains import arguments, cells, domains, markdown, of_domain
from benchmarks.progressive import Progressive
from feature_store.days import day_of, shift
from feature_store.embeddings import EmbeddingKind
from feature_store.errors import SpecError
from feature_store.tables import NO_LABEL
from jobs.settings import Settings
from jobs.training.config import DownstreamTraining
from jobs.training.loader import Users, labelled_day, labelled_rows
from tests.embedded import numbered
from tests.synthetic import FIRST_DAY, MemoryLake, dataset, tables

pytestmark = pytest.mark.filterwarnings("ignore")

DAYS = [shift(FIRST_DAY, i) for i in range(6)]
USERS = 12
SPEC = dataset(name="simulated")  # which has models of one surface
ROWS = tables(SPEC, days=len(DAYS), users=USERS)


def flipped(surface: int) -> dict[str, dict[str, pa.Table]]:
    """The same tables with the labels of one surface upside down."""
    surfaces = {
        (r["user_id"], ds, r["part"]): r["targets__context__surface"]
        for ds, of in ROWS["examples"].items()
        for r in of.to_pylist()
    }
    labels = {}
    for ds, of in ROWS["labels"].items():
        rows = of.to_pylist()
        for r in rows:
            where = surfaces[r["user_id"], r["shown_ds"], r["part"]]
            both = zip(r["labels"], where, strict=True)
            r["labels"] = [1 - x if s == surface else x for x, s in both]
        labels[ds] = pa.Table.from_pylist(rows, schema=of.schema)
    return {**ROWS, "labels": labels}


def upstream(rows: dict = ROWS) -> SimpleNamespace:
    days = numbered(DAYS, users=USERS)
    return SimpleNamespace(
        dataset=SPEC, lake=MemoryLake(SPEC, rows), days=DAYS, run=lambda: days
    )  # fmt: skip


def measure(progressive: SimpleNamespace, *, seed: int, embeddings: bool):
    parts = {str(surface): partial(of_domain, SPEC, surface) for surface in (0, 1)}
    return alone.measure(progressive, seed=seed, parts=parts, embeddings=embeddings)


def of_surface(surface: int, days: list[str]) -> list[int]:
    shown = (r for ds in days for r in ROWS["impressions"][ds].to_pylist())
    return sorted(r["target_id"] for r in shown if r["surface"] == surface)


def test_rows_of_a_domain_hold_its_targets_alone_with_their_labels() -> None:
    lake = upstream().lake
    day = labelled_day(lake, SPEC, DAYS[3], tasks=["click"])
    rows = list(labelled_rows(lake, SPEC, day.shown, users=Users.ALL, history=False))
    truth = {r["target_id"]: r["label__clicked"] for r in ROWS["impressions"][DAYS[3]].to_pylist()}
    for surface in (0, 1):
        (mine,) = of_domain(SPEC, surface, rows)
        targets = mine.target_id.tolist()
        assert sorted(targets) == of_surface(surface, [DAYS[3]])
        assert mine.labels[:, 0].tolist() == [truth[t] for t in targets]
        batch = mine.batch(0, len(mine))
        assert (batch.context_ids["surface"] == surface).all()
        assert (batch.labels[:, 1] == NO_LABEL).all()
        (before,), user = rows, batch.user_id[batch.row_of_target].tolist()
        whole = before.batch(0, len(before))
        of = dict(zip(before.target_id.tolist(), whole.user_id[whole.row_of_target], strict=True))
        assert user == [int(of[t]) for t in targets]


POOLED_FIRST = {(DAYS[1], 0.0), (DAYS[2], 0.5), (DAYS[3], 1.0)}, (DAYS[4], 2.0)
RAW_FIRST = {(DAYS[1], 0.0), (DAYS[2], 1.0), (DAYS[3], 2.0)}, (DAYS[4], 3.0)


@pytest.mark.parametrize(
    ("kind", "first"), [(EmbeddingKind.POOLED, POOLED_FIRST), (EmbeddingKind.RAW, RAW_FIRST)]
)
def test_each_domain_reads_the_embeddings_of_the_day_before(
    monkeypatch, kind: EmbeddingKind, first
) -> None:
    monkeypatch.setattr(alone, "downstream_training", lambda _: DownstreamTraining(kind=kind))
    seen: list[tuple[int, set[tuple[str, float]]]] = []
    fit = alone.fit

    def reads(batches) -> tuple[int, set[tuple[str, float]]]:
        found = set()
        surfaces = {int(s) for b in batches for s in b.batch.context_ids["surface"]}
        for item in batches:
            (of,) = item.published.values()
            for as_of, row in zip(item.batch.as_of, item.batch.row_of_target, strict=True):
                found.add((day_of(int(as_of), SPEC.utc_offset), float(of.values[row, 0, 0])))
        (surface,) = surfaces
        return surface, found

    def spied(spec, task, training, **reading):
        seen.append(reads(training))
        predict = fit(spec, task, training, **reading)

        def predicting(test):
            seen.append(reads(test))
            return predict(test)

        return predicting

    monkeypatch.setattr(alone, "fit", spied)
    measure(upstream(), seed=0, embeddings=True)
    learned, tested = first
    assert seen[:4] == [(0, learned), (0, {tested}), (1, learned), (1, {tested})]


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_other_domains_labels_change_nothing(embeddings: bool) -> None:
    usual, facts = measure(upstream(), seed=0, embeddings=embeddings)
    found, other = measure(upstream(flipped(0)), seed=0, embeddings=embeddings)
    for task in ("click", "buy"):
        mine, same = usual.of(task, "1"), found.of(task, "1")
        np.testing.assert_array_equal(mine.prediction, same.prediction)
        np.testing.assert_array_equal(mine.label, same.label)
        mine, moved = usual.of(task, "0"), found.of(task, "0")
        np.testing.assert_array_equal(mine.label, 1 - moved.label)
        assert (mine.prediction != moved.prediction).any()
        rates = (of["base_rates"]["0"][task] for of in (facts, other))
        assert sum(rates) == pytest.approx(1.0)
    assert facts["base_rates"]["1"] == other["base_rates"]["1"]


def test_context_and_item_alone_train_nothing_upstream() -> None:
    without = upstream()
    without.run = None
    found, _ = measure(without, seed=0, embeddings=False)
    for surface in (0, 1):
        tested = found.of("click", str(surface)).target_id.tolist()
        assert tested == of_surface(surface, DAYS[4:6])
        assert found.of("buy", str(surface)).target_id.tolist() == of_surface(surface, DAYS[4:5])


def test_the_matrix_is_measured_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("feature_store.lake.Lake", lambda *_, **__: upstream().lake)
    trained: list[str] = []

    def run(self: Progressive):
        trained.append(self.model)
        return numbered(DAYS, users=USERS)

    monkeypatch.setattr(Progressive, "run", run)
    args = arguments(["--dataset", SPEC.name, "--out", str(tmp_path)])
    mine = Program("domains", Settings.from_env({}), SPEC, args)
    found = cells(program.run(mine))
    models = ["sum", "sum_surface_0", "sum_surface_1"]
    surfaces = ["surface 0", "surface 1"]
    assert trained == models
    assert {(c.task, c.model, c.domain) for c in found} == {
        (t, m, d) for t in (ALL_TASKS, "click", "buy") for m in (CONTEXT, *models) for d in surfaces
    }
    by = {(c.task, c.model, c.domain): c for c in found}
    for (task, model, domain), c in by.items():
        context = by[task, CONTEXT, domain]
        assert c.to_context.mean == pytest.approx(c.ne - context.ne)
        assert c.to_context.low <= c.to_context.mean <= c.to_context.high
        if task == ALL_TASKS:
            tasks = [by[t, model, domain].ne for t in ("click", "buy")]
            assert c.ne == pytest.approx(np.mean(tasks))
    text = markdown(found)
    assert "| upstream | surface 0 | surface 1 |" in text
    assert f"| {CONTEXT} | NE {by[ALL_TASKS, CONTEXT, 'surface 0'].ne:.4f} |" in text
    again = cells(program.run(mine))
    assert trained == models and markdown(again) == text


def test_a_dataset_without_such_models_says_where_they_belong() -> None:
    assert domains(SPEC) == {"sum_surface_0": 0, "sum_surface_1": 1}
    with pytest.raises(SpecError, match=r"presets\.py"):
        domains(dataset())
