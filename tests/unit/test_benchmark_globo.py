"""The comparison on Globo.com's clicks: its rows are what was visible, and a run goes on where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.globo import compare, lightgbm_peer, table
from benchmarks.globo.compare import Comparison, arguments
from benchmarks.globo.data import WINDOW, Flat, concat, flat_day, flatten
from benchmarks.globo.encoded import Batches, Encoder, Pad
from benchmarks.globo.fuxictr_peers import FuxiCtr
from benchmarks.results import (
    Predictions,
    Result,
    Store,
    difference,
    interval_text,
    mean_ne,
    trial,
)
from benchmarks.split import Split, base_rates, rows_of, shown_on
from feature_store.days import shift
from feature_store.errors import DataError, SpecError
from feature_store.tables import NO_LABEL
from models.metrics import calibration, logloss
from tests.synthetic import FIRST_DAY, MemoryLake, dataset, tables

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

DAYS = [shift(FIRST_DAY, i) for i in range(7)]
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
        assert (rows.events["available"][start : start + end] < flat.as_of[t]).all()
        known = [(n, e) for n, e in enumerate(events) if batch.event_ids["ad"][e] != -1]
        ads = [int(batch.event_ids["ad"][e]) for _, e in known]
        numbers = batch.pair_numbers[pair : pair + end].numpy()[[n for n, _ in known]]
        pair += end
        kept = range(flat.start[t], flat.end[t])
        assert flat.events["ad"][kept].tolist() == ads[-WINDOW:]
        assert (flat.events["time"][kept] < flat.as_of[t]).all()
        if not known:
            assert np.isnan(column(flat, "distance_min")[t])
            continue
        seen += 1
        far = sorted(abs(int(batch.item_id[t]) - a) for a in ads)
        signed = int(batch.item_id[t]) - ads[-1]
        minutes = [(flat.as_of[t] - int(batch.event_time[e])) / 6e7 for _, e in known]
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
    from models.features import feature_plan

    return feature_plan(SPEC).pair_numbers


def test_what_became_available_later_changes_nothing(lake) -> None:
    rows = decoded(lake)
    clean = flatten(SPEC, rows, 0, len(rows))
    for t in range(0, len(clean), 9):
        later = rows.events["available"] >= clean.as_of[t]
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
        for name, of in found.events.items():
            mine = of[found.start[t] : found.end[t]]
            assert mine.tolist() == clean.events[name][clean.start[t] : clean.end[t]].tolist()


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


def test_days_join_and_each_target_keeps_its_events(lake) -> None:
    parts = [flatten(SPEC, decoded(lake, ds), 0, 4) for ds in DAYS[3:6]]
    whole = concat(parts)
    before = 0
    for part in parts:
        for t in range(len(part)):
            mine = slice(whole.start[before + t], whole.end[before + t])
            theirs = slice(part.start[t], part.end[t])
            assert whole.events["ad"][mine].tolist() == part.events["ad"][theirs].tolist()
        before += len(part)


@pytest.mark.parametrize("pad", list(Pad))
@pytest.mark.parametrize("trim", [True, False])
def test_padded_sequences_hold_the_newest_events_oldest_first(lake, pad: Pad, trim: bool) -> None:
    rows = decoded(lake)
    flat = flatten(SPEC, rows, 0, len(rows))
    encoder = Encoder.fit(flat, {"ad": "item", "category": "category"}, least=1)
    encoded = encoder.encode(flat, "click")
    known, window, seen = encoder.vocabularies["item"], 5, 0
    batches = Batches(encoded, size=16, window=window, pad=pad, trim=trim, seed=3)
    for batch in batches:
        ads = batch["seq_ad"]
        assert ads.shape[1] <= window if trim else ads.shape[1] == window
        assert ((ads == 0) == (batch["seq_age"] == 0)).all()
        seen += len(ads)
    assert seen == len(flat) and len(list(batches)) == len(batches)
    found = encoded.columns(torch.arange(len(flat)), window, pad, trim=trim)
    for t in range(len(flat)):
        visible = flat.events["ad"][flat.start[t] : flat.end[t]][-window:]
        inside = found["seq_ad"][t][found["seq_ad"][t] != 0].tolist()
        assert [known[i - 2] for i in inside] == visible.tolist()
        edge = 0 if pad is Pad.RIGHT else -1
        assert not len(visible) or found["seq_ad"][t][edge] != 0
    assert known[found["item"].numpy() - 2].tolist() == flat.ids[:, 0].tolist()


def test_rare_and_new_ids_are_one_index(lake) -> None:
    rows = decoded(lake)
    flat = flatten(SPEC, rows, 0, len(rows))
    encoder = Encoder.fit(flat, {"ad": "item"}, least=10**6)
    encoded = encoder.encode(flat, "click")
    assert (encoded.ids == 1).all() and (encoded.events == 1).all()
    assert torch.isfinite(encoded.numbers).all()


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
    lines = table.lines(results, ["lightgbm"], comparison.base_rates())
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
    results, rates = comparison.run(), comparison.base_rates()
    assert [(r.model, r.seed) for r in results] == [("lightgbm", 0), ("sum", 0), ("sum", 1)]
    peer, *ours = [mean_ne([r], "test", rates) for r in results]
    assert ours[0] != ours[1]
    found = difference(results[1:], "test", results[:1], "test", rates)
    assert found.mean == pytest.approx(np.mean(ours) - peer)
    assert interval_text(found) in table.markdown(table.lines(results, ["lightgbm"], rates))


def test_peers_may_be_trained_for_fewer_tasks_than_ours(lake, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lightgbm_peer, "CHOICES", ())
    flags = ("--tasks", "click,buy", "--peer-tasks", "click")
    comparison = run(lake, tmp_path, *flags)
    results = comparison.run()
    assert [(r.model, r.tasks) for r in results] == [
        ("lightgbm", ("click",)), ("sum", ("click", "buy"))
    ]  # fmt: skip
    lines = table.lines(results, ["lightgbm"], comparison.base_rates())
    against = {(x.task, x.model): x.difference for x in lines}
    assert against["buy", "sum"] == "" != against["click", "sum"]
    with pytest.raises(SpecError, match="--peer-tasks: 'buy' is none of click"):
        run(lake, tmp_path, "--tasks", "click", "--peer-tasks", "buy")


def test_the_difference_is_to_the_peer_that_is_best_on_the_validation_day() -> None:
    label = [0, 1] * 20

    def result(model: str, validation: float, test: float) -> Result:
        parts = [
            some(label, np.abs(np.array(label) - off), part=part)
            for part, off in (("validation", validation), ("test", test))
        ]
        both = {k: np.concatenate([getattr(p, k) for p in parts]) for k in parts[0].__dict__}
        facts = {"seconds": 1.0, "command": "x"}
        return Result(
            model=model, tasks=("click",), seed=0, config={}, facts=facts,
            predictions=Predictions(**both),
        )  # fmt: skip

    results = [result("a", 0.2, 0.4), result("b", 0.3, 0.1), result("ours", 0.1, 0.2)]
    lines = {x.model: x for x in table.lines(results, ["a", "b"], {"click": 0.5})}
    assert lines["a"].difference == "" and lines["ours"].difference.startswith("-")
    other = replace(results[2].predictions, target_id=results[2].predictions.target_id + 1)
    with pytest.raises(DataError, match="click: ours and a were tested on different labels"):
        table.lines([*results[:2], replace(results[2], predictions=other)], ["a"], {"click": 0.5})


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
    with pytest.raises(SpecError, match="git clone"):
        FuxiCtr(
            tmp_path, "din", tmp_path, tuning_share=1.0, about={}, tuning_task="click",
            tuning_rows=lambda part: None,
        )  # fmt: skip
    empty = MemoryLake(SPEC, {t: {} for t in lake.rows})
    with pytest.raises(DataError, match="make run"):
        flat_day(empty, SPEC, DAYS[0], share=1.0, folder=tmp_path)
    assert compare.FUXICTR == ("din", "dien", "transact", "bst")
