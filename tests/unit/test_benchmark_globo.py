"""The comparison on Globo.com's clicks: its rows are what was visible, and a run goes on where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.globo import lightgbm_peer, table
from benchmarks.globo.compare import Comparison, arguments
from benchmarks.globo.data import Flat, concat, flat_day, flatten
from benchmarks.globo.lightgbm_peer import trial
from benchmarks.globo.results import Predictions, Store, by_seed, difference, interval_text
from benchmarks.globo.split import Split, base_rates, rows_of, shown_on
from feature_store.columns import NO_LABEL
from feature_store.days import add_days
from feature_store.errors import DataError, SpecError
from models.features import feature_plan
from models.metrics import calibration, logloss, normalized_entropy
from tests.synthetic import FIRST_DAY, MemoryLake, dataset, tables

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

DAYS = [add_days(FIRST_DAY, i) for i in range(7)]
SPEC = dataset()
SPLIT = Split(train=(DAYS[1], DAYS[3]), validation=(DAYS[4], DAYS[4]), test=(DAYS[5], DAYS[6]))


@pytest.fixture(scope="module")
def lake() -> MemoryLake:
    return MemoryLake(SPEC, tables(SPEC, days=len(DAYS), users=12))


def decoded(lake: MemoryLake, ds: str = DAYS[4]):
    (rows,) = rows_of(lake, SPEC, shown_on(lake, SPEC, ds), share=1.0, seed=None)
    return rows


def column(flat: Flat, name: str) -> np.ndarray:
    return flat.numbers[:, flat.names["numbers"].index(name)]


def test_summaries_are_those_of_the_visible_events_with_an_item(lake) -> None:
    rows = decoded(lake)
    flat, batch = flatten(SPEC, rows, 0, len(rows)), rows.batch(0, len(rows))
    pair, seen = 0, 0
    for t in range(len(flat)):
        row, end = int(batch.row_of_target[t]), int(batch.history_end[t])
        start = int(batch.event_offsets[row])
        events = range(start, start + end)
        as_of = int(batch.as_of[t])
        assert (rows.events["available"][start : start + end] < as_of).all()
        known = [(n, e) for n, e in enumerate(events) if batch.event_ids["ad"][e] != -1]
        ads = [int(batch.event_ids["ad"][e]) for _, e in known]
        numbers = batch.pair_numbers[pair : pair + end].numpy()[[n for n, _ in known]]
        pair += end
        if not known:
            assert np.isnan(column(flat, "distance_min")[t])
            continue
        seen += 1
        far = sorted(abs(int(batch.item_id[t]) - a) for a in ads)
        signed = int(batch.item_id[t]) - ads[-1]
        minutes = [(as_of - int(batch.event_time[e])) / 6e7 for _, e in known]
        wanted = {
            "distance_newest_signed": signed,
            "distance_min": far[0],
            "distance_second": far[1] if len(far) > 1 else np.nan,
            "distance_min5": min(abs(int(batch.item_id[t]) - a) for a in ads[-5:]),
            "minutes_0": minutes[-1],
            "minutes_2": minutes[-3] if len(minutes) > 2 else np.nan,
            "events_120m": sum(m < 120 for m in minutes),
            "last_ad_1": ads[-2] if len(ads) > 1 else -1,
        }
        names = list(compare_names())
        for i, name in enumerate(names):
            of = numbers[:, i]
            wanted |= {
                f"{name}_newest": of[-1], f"{name}_max3": of[-3:].max(), f"{name}_max": of.max(),
                f"{name}_sum": of.sum(), f"{name}_mean": of.mean(),
            }  # fmt: skip
        for name, value in wanted.items():
            np.testing.assert_allclose(column(flat, name)[t], value, rtol=2e-4, atol=1e-5)
    assert seen > 20


def compare_names() -> tuple[str, ...]:
    return feature_plan(SPEC).pair_numbers


def test_what_became_available_later_changes_nothing(lake) -> None:
    rows = decoded(lake)
    clean = flatten(SPEC, rows, 0, len(rows))
    as_of = rows.batch(0, len(rows)).as_of.numpy()
    for t in range(0, len(clean), 9):
        later = rows.events["available"] >= as_of[t]
        assert later.any()
        events = {
            name: np.where(later.reshape(-1, *[1] * (v.ndim - 1)), 3, v).astype(v.dtype)
            if name.startswith(("ids/", "floats/"))
            else v
            for name, v in rows.events.items()
        }
        events["time"] = np.where(later, events["time"] + 10**9, events["time"])
        found = flatten(SPEC, replace(rows, events=events), 0, len(rows))
        np.testing.assert_array_equal(found.numbers[t], clean.numbers[t])


def test_labels_are_those_of_the_day_shown_however_late_they_came(lake) -> None:
    rows = decoded(lake)
    flat = flatten(SPEC, rows, 0, len(rows))
    truth = {
        r["target_id"]: (r["label__clicked"], r["label__bought"])
        for r in lake.rows["impressions"][DAYS[4]].to_pylist()
    }
    for task, place in (("click", 0), ("buy", 1)):
        mine = flat.where(flat.of_task(task))
        assert sorted(mine.target_id.tolist()) == sorted(truth)
        wanted = [truth[t][place] for t in mine.target_id.tolist()]
        assert mine.label(task).tolist() == wanted
    last = flatten(SPEC, decoded(lake, DAYS[6]), 0, 3)  # the lake ends before `buy` is final
    assert (last.label("buy") == NO_LABEL).all() and (last.label("click") != NO_LABEL).all()


def test_base_rates_are_of_the_labels_of_what_the_days_showed(lake) -> None:
    shown = [r for ds in DAYS[1:3] for r in lake.rows["impressions"][ds].to_pylist()]
    found = base_rates(lake, SPEC, DAYS[1:3], ["click", "buy"])
    for task, label in (("click", "label__clicked"), ("buy", "label__bought")):
        assert found[task] == pytest.approx(np.mean([r[label] for r in shown]))
    with pytest.raises(DataError, match="buy has no label"):  # its answers come a day later
        base_rates(lake, SPEC, [DAYS[-1]], ["click", "buy"])
    assert list(base_rates(lake, SPEC, [DAYS[-1]], ["click"])) == ["click"]


def test_a_day_is_computed_once_for_the_same_inputs(lake, tmp_path: Path, monkeypatch) -> None:
    first = flat_day(lake, SPEC, DAYS[4], share=1.0, folder=tmp_path)
    less = flat_day(lake, SPEC, DAYS[4], share=0.5, folder=tmp_path)
    assert 0 < len(less) < len(first)
    monkeypatch.setattr("benchmarks.globo.data.flatten", None)
    again = flat_day(lake, SPEC, DAYS[4], share=1.0, folder=tmp_path)
    np.testing.assert_array_equal(first.numbers, again.numbers)
    assert again.names == first.names and not list(tmp_path.glob("*staging*"))
    monkeypatch.setattr("benchmarks.globo.data._VERSION", 0)
    with pytest.raises(TypeError):
        flat_day(lake, SPEC, DAYS[4], share=1.0, folder=tmp_path)


def test_days_join_in_order(lake) -> None:
    parts = [flatten(SPEC, decoded(lake, ds), 0, 4) for ds in DAYS[3:6]]
    whole = concat(parts)
    for name in ("target_id", "numbers"):
        wanted = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(getattr(whole, name), wanted)


def some(label, prediction=None, *, task="click", part="test") -> Predictions:
    n = len(label)
    return Predictions(
        task=np.full(n, task), part=np.full(n, part), user_id=np.arange(n) // 2,
        target_id=np.arange(n)[::-1].copy(), label=np.array(label, np.int8),
        prediction=np.full(n, 0.5) if prediction is None else np.array(prediction, float),
    )  # fmt: skip


def test_a_result_is_trained_once_per_configuration_and_half_a_result_is_none(tmp_path) -> None:
    store, runs = Store(tmp_path), []

    def train():
        runs.append(1)
        return some([0, 1]), {"seconds": 1.0}

    for config in ({"a": (1, 2)}, {"a": (1, 2)}, {"a": (1, 3)}):
        found = store.once("m", ["click"], 0, config, train)
        assert found.predictions.label.tolist() == [0, 1]
    assert len(runs) == 2
    store.path("m", ["click"], 0).unlink()  # the facts are written last
    store.once("m", ["click"], 0, {"a": (1, 3)}, train)
    store.once("m", ["click"], 1, {"a": (1, 3)}, train)
    assert len(runs) == 4 and not list(tmp_path.glob("*staging*"))


def test_trials_are_remembered_and_an_unfinished_line_is_not_one(tmp_path) -> None:
    path = tmp_path / "trials.jsonl"
    assert trial(path, {"a": 1}, lambda: {"x": 1}) == {"x": 1}
    with path.open("a") as out:
        out.write('\n{"config": {"a": 2}, "fou')
    assert trial(path, {"a": 2}, lambda: {"x": 2}) == {"x": 2}
    for a in (1, 2):
        assert trial(path, {"a": a}, dict) == {"x": a}


def run(lake, out: Path, *more: str):
    args = arguments(["--out", str(out), "--models", "sum", "--tuning-share", "1", *more])
    return Comparison(lake, SPEC, args, SPLIT)


def test_a_comparison_tests_all_on_the_same_labels_and_goes_on_where_it_was(
    lake, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(lightgbm_peer, "CHOICES", (("num_leaves", (7,)),))
    comparison = run(lake, tmp_path, "--tasks", "click,buy")
    results = comparison.run()
    lines = table.lines(results, comparison.base_rates())
    assert {(x.task, x.model) for x in lines} == {
        (t, m) for t in ("click", "buy") for m in ("lightgbm", "sum")
    }
    clicks = [r.predictions.of("click", "test") for r in results if "click" in r.tasks]
    assert clicks[0].target_id.tolist() == clicks[1].target_id.tolist()
    days = [lake.rows["impressions"][ds].num_rows for ds in SPLIT.days("test")]
    assert len(clicks[0]) == sum(days)
    assert "### click" in table.markdown(lines)
    monkeypatch.setattr(lightgbm_peer.LightGbm, "run", None)
    (done,) = (tmp_path / "results-1").glob("sum-*.json")
    facts = json.loads(done.read_text())["facts"]
    again = run(lake, tmp_path, "--tasks", "click,buy").run()
    assert again[-1].facts == facts
    (tmp_path / "results-1" / "lightgbm-buy-0.json").unlink()
    with pytest.raises(TypeError):
        run(lake, tmp_path, "--tasks", "click,buy").run()


def test_one_training_of_a_peer_stands_against_all_of_ours(lake, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lightgbm_peer, "CHOICES", ())
    flags = ("--tasks", "click", "--seeds", "0,1", "--peer-seeds", "0")
    comparison = run(lake, tmp_path, *flags)
    results, (rate,) = comparison.run(), comparison.base_rates().values()
    assert [(r.model, r.seed) for r in results] == [("lightgbm", 0), ("sum", 0), ("sum", 1)]

    def ne(label: np.ndarray, prediction: np.ndarray) -> float:
        return normalized_entropy(label, prediction, rate)

    peer, *ours = by_seed(results, "click", "test", ne)
    assert ours[0] != ours[1]
    found = difference(results[1:], results[:1], "click", rate)
    assert found.mean == pytest.approx(np.mean(ours) - peer)
    assert interval_text(found) in table.markdown(table.lines(results, {"click": rate}))


def test_peers_may_be_trained_for_fewer_tasks_than_ours(lake, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lightgbm_peer, "CHOICES", ())
    flags = ("--tasks", "click,buy", "--peer-tasks", "click")
    comparison = run(lake, tmp_path, *flags)
    results = comparison.run()
    assert [(r.model, r.tasks) for r in results] == [
        ("lightgbm", ("click",)), ("sum", ("click", "buy"))
    ]  # fmt: skip
    lines = table.lines(results, comparison.base_rates())
    against = {(x.task, x.model): x.difference for x in lines}
    assert against["buy", "sum"] == "" != against["click", "sum"]
    with pytest.raises(SpecError, match="--peer-tasks: 'buy' is none of click"):
        run(lake, tmp_path, "--tasks", "click", "--peer-tasks", "buy")


def test_without_the_peer_there_is_no_difference(lake, tmp_path) -> None:
    comparison = run(lake, tmp_path, "--tasks", "click", "--peers", "")
    results = comparison.run()
    assert [r.model for r in results] == ["sum"]
    (line,) = table.lines(results, comparison.base_rates())
    assert line.difference == ""


def test_recalibrated_predictions_are_as_good_as_those_that_were_spoilt() -> None:
    rng = np.random.default_rng(0)
    good = rng.uniform(0.05, 0.6, 20_000)
    labels = (rng.uniform(size=len(good)) < good).astype(np.int64)
    spoilt = 1 / (1 + np.exp(0.7 - 2 * np.log(good / (1 - good))))
    again = table.recalibrated(labels, spoilt)
    assert logloss(labels, spoilt) > logloss(labels, good) + 0.02
    assert logloss(labels, again) == pytest.approx(logloss(labels, good), abs=5e-4)
    assert calibration(labels, again) == pytest.approx(1, abs=1e-3)


def test_what_is_wrong_is_said_with_the_remedy(lake, tmp_path: Path) -> None:
    for flags, says in ((["--tasks", "x"], "--tasks"), (["--peers", "x"], "--peers")):
        with pytest.raises(SpecError, match=says):
            run(lake, tmp_path, *flags)
    empty = MemoryLake(SPEC, {t: {} for t in lake.rows})
    with pytest.raises(DataError, match="make run"):
        flat_day(empty, SPEC, DAYS[0], share=1.0, folder=tmp_path)
