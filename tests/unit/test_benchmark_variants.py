"""Variants of an upstream model: each is trained as its name says, and judged twice, by the same targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import variants
from benchmarks.alone import AGGREGATES, ALL_TASKS, CONTEXT, Program, label_counts
from benchmarks.progressive import Progressive
from benchmarks.variants import Line, arguments, lines, markdown
from feature_store.days import shift
from feature_store.errors import SpecError
from jobs.settings import Settings
from jobs.training.loader import Users, labelled_day, labelled_rows
from models.metrics import normalized_entropy
from tests.embedded import numbered
from tests.synthetic import FIRST_DAY, MemoryLake, dataset, tables

pytestmark = pytest.mark.filterwarnings("ignore")

DAYS = [shift(FIRST_DAY, i) for i in range(6)]
USERS = 12
SPEC = dataset(name="simulated")
LAKE = MemoryLake(SPEC, tables(SPEC, days=len(DAYS), users=USERS))
UPSTREAM_NE = [{"click": 0.9 + i / 100, "buy": 0.7 + i / 50} for i in range(len(DAYS))]
MODELS = ["sum", "sum:mix.sizes=6", "sum:embeddings=4"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Progressive]:
    """The upstream trainings, in their order; every number of the raw embeddings of day i is i."""
    found: list[Progressive] = []

    def run(self: Progressive):
        found.append(self)
        days = numbered(DAYS, users=USERS).items()
        return {ds: replace(of, ne=ne) for (ds, of), ne in zip(days, UPSTREAM_NE, strict=True)}

    monkeypatch.setattr("feature_store.lake.Lake", lambda *_, **__: LAKE)
    monkeypatch.setattr(Progressive, "run", run)
    return found


def program(out: Path, models: list[str], seeds: str = "0") -> Program:
    flags = ["--dataset", SPEC.name, "--out", str(out), "--seeds", seeds]
    args = arguments([*flags, "--models", ",".join(models)])
    return Program("variants", Settings.from_env({}), SPEC, args)


def by_name(found: list[Line], task: str) -> dict[str, Line]:
    return {line.model: line for line in found if line.task == task}


def test_every_variant_is_trained_as_its_name_says_once_a_seed(tmp_path: Path, trained) -> None:
    mine = program(tmp_path, MODELS, seeds="0,1")
    text = markdown(lines(variants.run(mine)))
    wanted = [(m, f"seed-{s}") for m in MODELS for s in (0, 1)]
    assert [(t.model, t.name) for t in trained] == 2 * wanted, (
        "read alone, and beside the aggregates"
    )
    shapes = [
        (t.preset.sum.mix.sizes, t.preset.sum.embeddings) for t in trained[: 2 * len(MODELS) : 2]
    ]
    usual = shapes[0]
    assert shapes == [usual, ((6,), usual[1]), (usual[0], 4)] and len(set(shapes)) == 3
    assert len({t.settings.home for t in trained}) == len(MODELS)
    assert markdown(lines(variants.run(mine))) == text
    assert len(trained) == 2 * len(wanted), "what is done is read"


def test_figures_are_of_every_target_of_the_test_days(tmp_path: Path, trained) -> None:
    results = variants.run(program(tmp_path, MODELS[:2]))
    found = lines(results)
    shown = [t for d in DAYS[4:6] for t in LAKE.rows["impressions"][d]["target_id"].to_pylist()]
    for result in results:
        assert result.predictions.of("click", "test").target_id.tolist() == sorted(shown)
    days = {
        ds: list(
            labelled_rows(
                LAKE, SPEC, labelled_day(LAKE, SPEC, ds, tasks=["click"]).shown,
                users=Users.TRAINING, history=False,
            )
        )
        for ds in DAYS[1:5]
    }  # fmt: skip
    counts = sum(
        label_counts(SPEC, SPEC.task("click"), {d: days[d] for d in of})
        for of in (DAYS[1:4], DAYS[1:5])
    )
    rate = counts[0] / counts[1]
    of_click = by_name(found, "click")
    alone = [result for result in results if result.model in of_click]
    assert len(alone) == len(of_click) == len(results) - 2
    for result in alone:
        mine = result.predictions.of("click", "test")
        assert of_click[result.model].ne == pytest.approx(
            normalized_entropy(mine.label, mine.prediction, rate)
        )


def test_differences_are_to_no_embeddings_and_to_the_first_variant(tmp_path: Path, trained) -> None:
    found = lines(variants.run(program(tmp_path, MODELS)))
    tasks = dict.fromkeys(line.task for line in found)
    assert list(tasks) == [ALL_TASKS, "click", "buy"]
    for task in tasks:
        lines_of = by_name(found, task)
        assert list(lines_of) == [CONTEXT, *MODELS, AGGREGATES]
        context, first = lines_of[CONTEXT], lines_of[MODELS[0]]
        for line in lines_of.values():
            assert line.to_context.mean == pytest.approx(line.ne - context.ne, abs=1e-9)
            assert line.to_first.mean == pytest.approx(line.ne - first.ne, abs=1e-9)
        yardstick = lines_of[AGGREGATES]
        assert context.upstream_ne is None and context.to_context.mean == 0
        assert yardstick.upstream_ne is None and yardstick.recovered == 1 and context.recovered == 0
        gain, all_of_it = first.to_context.mean, yardstick.to_context.mean
        assert all_of_it != 0 and first.recovered == pytest.approx(gain / all_of_it, abs=1e-6)
        assert first.ne != context.ne
        # all of them read the same embeddings here
        assert lines_of[MODELS[1]].to_first.mean == 0
        # and of what reads both
        assert context.beside is None and yardstick.beside is None
        assert first.beside is not None and first.beside.mean not in (0, first.to_context.mean)
        assert lines_of[MODELS[1]].beside == first.beside
        chosen = ["click", "buy"] if task == ALL_TASKS else [task]
        wanted = np.mean([of[t] for of in UPSTREAM_NE[4:6] for t in chosen])
        assert first.upstream_ne == pytest.approx(wanted)
    text = markdown(found)
    assert f"| {CONTEXT} |  | {by_name(found, 'click')[CONTEXT].ne:.4f} |  |  |  |  |" in text


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ([], "--models is empty"),
        (["sum", "sum:nothing=1"], "nothing=1 cannot be set"),
        (["sum", "summ"], "summ"),
        (["sequence", "sequence:shuffled"], "other histories"),
        (["sum", "sum:mix.sizes=1"], "cannot be built"),
    ],
)
def test_a_name_that_cannot_be_published_is_said_before_anything_is_trained(
    tmp_path: Path, trained, models: list[str], says: str
) -> None:
    with pytest.raises(SpecError, match=says):
        variants.run(program(tmp_path, models))
    assert not trained and not list(tmp_path.rglob("*.parquet"))
