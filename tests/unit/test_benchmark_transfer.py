"""What embeddings bring downstream: each arm sees what its name says, and nothing is trained twice."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.globo import transfer_table as table
from benchmarks.globo.results import Predictions, Result
from benchmarks.globo.split import Split
from benchmarks.globo.transfer import TaskData, Transfer, arguments, loaded, report, shown_users
from benchmarks.globo.user_sources import (
    Flag,
    Fresh,
    RandomSum,
    Snapshots,
    Stored,
    Unrounded,
    available_before,
    by_moment,
    moments,
    read_of,
)
from feature_store.days import HOUR_US, add_days
from feature_store.embeddings import EmbeddingKind, published_rows
from feature_store.errors import DataError, HeadwaterError, MissingPartitionError, SpecError
from jobs.publish_embeddings import UserRows, embedded
from jobs.settings import Settings
from jobs.training.checkpoints import Checkpoints, Snapshot
from jobs.training.config import DownstreamTraining
from jobs.training.downstream import Comparison
from jobs.training.learner import Learner
from jobs.training.loader import Limits, Users, labelled_day, labelled_rows, user_batches
from jobs.training.presets import preset
from models.downstream import Downstream, DownstreamConfig
from models.features import feature_plan
from models.metrics import normalized_entropy
from tests.synthetic import FIRST_DAY, MemoryLake, dataset, tables

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

DAYS = [add_days(FIRST_DAY, i) for i in range(8)]
SPEC = dataset()
SPLIT = Split(train=(DAYS[3], DAYS[4]), validation=(DAYS[5], DAYS[5]), test=(DAYS[6], DAYS[6]))
BUDGET = DownstreamTraining(batch_targets=64)
SHAPE = (2, 32)


class PublishedLake(MemoryLake):
    """A lake in memory in which models have published: (model, ds) -> rows of `user_embeddings`."""

    def __init__(self, rows: dict, published: dict[tuple[str, str], pa.Table]) -> None:
        super().__init__(SPEC, rows)
        self.published = published

    def require(self, table: str, days: list[str], model: str = "") -> dict[str, int]:
        if table != "user_embeddings":
            return super().require(table, days)
        for ds in days:
            if (model, ds) not in self.published:
                raise MissingPartitionError(f"user_embeddings of model {model} lacks {ds}")
        return {f"{table}/{model}/{ds}": 1 for ds in days}

    def read(self, table, *, days, columns=None, version=None, model=None) -> pa.Table:
        if table != "user_embeddings":
            return super().read(table, days=days, columns=columns)
        return self.published[model, days[0]].select(columns)


def published(ds: str, users: list[int], value: float, kind_offset: float = 0.25) -> pa.Table:
    """Every number is `value` in the raw embeddings, and `value + kind_offset` in the pooled."""
    values = np.full((len(users), *SHAPE), value, np.float16)
    rows = published_rows(
        SPEC, model="any", ds=ds, snapshot=f"of-{ds}", user_ids=pa.array(users), raw=values
    )
    shifted = published_rows(
        SPEC, model="any", ds=ds, snapshot="", user_ids=pa.array(users), raw=values + kind_offset
    )
    return rows.set_column(rows.column_names.index("pooled"), "pooled", shifted["raw"])


@pytest.fixture(scope="module")
def lake() -> PublishedLake:
    """What is published on day i is i everywhere; of user 0 only by `sum`, of user 1 by nobody."""
    rows = tables(SPEC, days=len(DAYS), users=12)
    return PublishedLake(
        rows,
        {
            (model, ds): published(ds, users, float(i))
            for i, ds in enumerate(DAYS)
            for model, users in (("sum", [0, *range(2, 12)]), ("sequence", list(range(2, 12))))
        },
    )


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    """Snapshots of both models with weights of their own for each day."""
    found = Settings.from_env({"HEADWATER_HOME": str(tmp_path_factory.mktemp("home"))})
    for model in ("sum", "sequence"):
        checkpoints = Checkpoints(found.snapshot_dir(SPEC.name, model, FIRST_DAY).parent)
        for i, ds in enumerate(DAYS):
            snapshot = Snapshot(
                id=f"{model}-{ds}", model=model, ds=ds, parent=None, run_hash="", state_hash="",
                config=preset(SPEC, model).plain(), spec_hash="", inputs={}, label_counts={}, steps=1,
            )  # fmt: skip
            checkpoints.save(snapshot, learner_of(i, model).state())
            checkpoints.set_champion(ds, snapshot.id)
    return found


def learner_of(day: int, model: str = "sequence") -> Learner:
    torch.manual_seed(day)
    return Learner(SPEC, preset(SPEC, model), torch.device("cpu"))


def shown(lake: MemoryLake, ds: str, max_targets: int = 64) -> list:
    """The batches of a day with their histories."""
    limits = Limits(max_targets=max_targets)
    day = labelled_day(lake, SPEC, ds, tasks=["click"])
    rows = labelled_rows(lake, SPEC, day.shown, users=Users.ALL, limits=limits)
    return [item for decoded in rows for item in loaded(decoded, limits)]


def stored(lake: MemoryLake, model: str, **of: Any) -> Stored:
    return Stored(lake, partial(read_of, lake, shown_users(lake, DAYS)), model, **of)


# ---- what each source is


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_a_lag_reads_what_was_published_so_many_days_before(lake, lag: int) -> None:
    raw = stored(lake, "sum", kind=EmbeddingKind.RAW, lag_days=lag)
    assert set(raw.pins(DAYS[3:7])) == {f"user_embeddings/sum/{d}" for d in DAYS[3 - lag : 7 - lag]}
    for day in (4, 5):
        items = shown(lake, DAYS[day])
        for item, found in zip(items, raw.of(DAYS[day], items), strict=True):
            assert found.present.tolist() == [u != 1 for u in item.batch.user_id.tolist()]
            assert found.values.shape == (item.batch.rows, *SHAPE)
            assert (found.values[found.present] == day - lag).all()


def test_what_is_served_is_pooled_and_of_the_day_before(lake) -> None:
    served = stored(lake, "sequence")
    items = shown(lake, DAYS[4])
    for item, found in zip(items, served.of(DAYS[4], items), strict=True):
        assert (found.values[found.present] == 3.25).all()
        assert found.present.tolist() == [u > 1 for u in item.batch.user_id.tolist()]
    assert served.name == "sequence"
    raw = stored(lake, "sequence", kind=EmbeddingKind.RAW)
    assert raw.name == "sequence_raw_1d"


def test_the_flag_tells_who_has_one_and_nothing_of_what_it_is(lake) -> None:
    source = stored(lake, "sum")
    items = shown(lake, DAYS[4])
    of_source, of_flag = source.of(DAYS[4], items), Flag(source).of(DAYS[4], items)
    for item, there, flag in zip(items, of_source, of_flag, strict=True):
        assert not flag.values.any() and flag.values.shape == there.values.shape
        assert flag.present.tolist() == [u != 1 for u in item.batch.user_id.tolist()]


def test_an_untrained_sum_publishes_the_mean_of_three_days_of_aggregates(lake) -> None:
    source = RandomSum(lake, shown_users(lake, DAYS), first_day=DAYS[1])
    items = shown(lake, DAYS[4])
    found = source.of(DAYS[4], items)
    users = torch.cat([item.batch.user_id for item in items]).tolist()
    values = torch.cat([p.values for p in found])
    present = torch.cat([p.present for p in found]).tolist()
    of_day = []
    for ds in (DAYS[3], DAYS[2], DAYS[1]):
        ((ids, batch),) = user_batches(SPEC, lake.batches("aggregates", days=[ds]))
        made = source._learner.user_embeddings(batch).half().float()
        of_day.append(dict(zip(ids.to_pylist(), made, strict=True)))
    assert len(set(users)) > 6
    for user, value, there in zip(users, values, present, strict=True):
        assert there == (user in of_day[0])
        if there:
            days = [d[user] for d in of_day if user in d]
            torch.testing.assert_close(value, torch.stack(days).mean(0), atol=2e-3, rtol=0)
    again = RandomSum(lake, np.array(users[:3]), first_day=DAYS[1])
    for one, other in zip(found, again.of(DAYS[4], items), strict=True):
        same = other.present
        torch.testing.assert_close(one.values[same], other.values[same])
    assert set(source.pins([DAYS[4]])) == {"model", *(f"aggregates/{d}" for d in DAYS[1:4])}


@pytest.mark.parametrize("model", ["sum", "sequence"])
def test_an_unrounded_embedding_is_of_the_day_before_and_rounds_to_what_is_published(
    lake, settings, model: str
) -> None:
    users = shown_users(lake, DAYS)
    source = Unrounded(lake, snapshots(settings, model), users[1:])
    items = shown(lake, DAYS[4])
    learner = learner_of(3, model)
    rows = UserRows.of(lake, learner.preset, DAYS[3])
    of_user = {}
    for ids, values in embedded(learner, DAYS[3], rows.batches(lake, learner.preset)):
        of_user |= dict(zip(ids.to_pylist(), torch.from_numpy(values), strict=True))
    some, rounded = 0, 0
    for item, found in zip(items, source.of(DAYS[4], items), strict=True):
        for user, value, there in zip(
            item.batch.user_id.tolist(), found.values, found.present.tolist(), strict=True
        ):
            assert there == (user in of_user and user != users[0])
            if there:
                torch.testing.assert_close(value, of_user[user], atol=1e-6, rtol=1e-5)
                some, rounded = some + 1, rounded + (value != value.half().float()).sum().item()
    assert some > 6 and rounded > 64
    pins = source.pins(DAYS[3:5])
    assert pins.items() >= {d: f"{model}-{d}" for d in DAYS[2:4]}.items()
    assert pins.items() >= rows.inputs.items()


# ---- embeddings of the moment


def whole(lake: MemoryLake, ds: str):
    (item,) = shown(lake, ds, max_targets=10**6)
    return item, item.rows.batch(item.lo, item.hi)


def test_at_no_lag_a_moment_sees_exactly_the_events_that_its_targets_may_see(lake) -> None:
    _, batch = whole(lake, DAYS[4])
    row, as_of, of_target = moments(batch)
    assert len(row) < batch.targets, "some targets share a moment"
    assert torch.equal(row[of_target], batch.row_of_target)
    assert torch.equal(as_of[of_target], batch.as_of)
    seen = available_before(batch, row, as_of)
    assert torch.equal(seen.event_offsets.diff()[of_target], batch.history_end)
    for m in range(len(row)):
        mine = slice(seen.event_offsets[m], seen.event_offsets[m + 1])
        start = batch.event_offsets[row[m]]
        theirs = slice(start, start + seen.event_offsets.diff()[m])
        assert torch.equal(seen.event_available[mine], batch.event_available[theirs])
        for name, values in batch.event_ids.items():
            assert torch.equal(seen.event_ids[name][mine], values[theirs])
    hour = available_before(batch, row, as_of - HOUR_US)
    assert (hour.event_offsets.diff() <= seen.event_offsets.diff()).all()
    for m in range(len(row)):
        start, end = batch.event_offsets[row[m]], batch.event_offsets[row[m] + 1]
        early = batch.event_available[start:end] < as_of[m] - HOUR_US
        assert hour.event_offsets.diff()[m] == early.sum()
    assert hour.events < seen.events


@pytest.mark.parametrize("hours", [0, 1])
def test_a_fresh_embedding_ignores_later_events_and_reads_earlier_ones(
    lake, settings, hours: int
) -> None:
    source = fresh(settings, hours)
    item, batch = whole(lake, DAYS[4])
    row, as_of, _ = moments(batch)
    (clean,) = source.of(DAYS[4], [item])
    available = item.rows.events["available"]
    changed = 0
    for m in range(0, len(row), 7):
        at = int(as_of[m]) - hours * HOUR_US
        later = available >= at
        for poisoned, same in ((later, True), (~later, False)):
            events = {
                name: np.where(poisoned, 3 - values, values) if name.startswith("ids/") else values
                for name, values in item.rows.events.items()
            }
            other = replace(item, rows=replace(item.rows, events=events))
            (found,) = source.of(DAYS[4], [other])
            if same:
                assert torch.equal(found.values[m], clean.values[m])
            else:
                changed += not torch.equal(found.values[m], clean.values[m])
    assert changed > 3


def fresh(settings, hours: int) -> Fresh:
    return Fresh(snapshots(settings, "sequence"), lag_hours=hours)


def snapshots(settings: Settings, model: str) -> Snapshots:
    return Snapshots(dataset=SPEC, settings=settings, model=model)


@pytest.mark.parametrize("hours", [0, 1])
def test_a_fresh_embedding_is_by_the_snapshot_of_the_day_before(lake, settings, hours) -> None:
    item, batch = whole(lake, DAYS[4])
    (found,) = fresh(settings, hours).of(DAYS[4], [item])
    row, as_of, _ = moments(batch)
    at = as_of - hours * HOUR_US
    seen = available_before(batch, row, at)
    end = seen.event_offsets.diff()
    wanted = {
        day: learner_of(day).model.eval().user_embeddings(seen, at).detach() for day in (3, 4)
    }
    torch.testing.assert_close(found.values, wanted[3], atol=2e-3, rtol=0)
    assert not torch.allclose(found.values, wanted[4], atol=2e-2)
    assert torch.equal(found.present, end > 0)
    pins = fresh(settings, hours).pins(DAYS[3:5])
    assert pins == {d: f"sequence-{d}" for d in DAYS[2:4]}


def test_rows_by_moment_change_no_logit_of_a_model_that_reads_no_user(lake) -> None:
    item, _ = whole(lake, DAYS[4])
    torch.manual_seed(0)
    model = Downstream(feature_plan(SPEC), {"context": DownstreamConfig(use_user_features=False)})
    model.eval()
    cut = by_moment(item.batch)
    assert torch.equal(model(cut), model(item.batch))
    assert torch.equal(cut.user_id[cut.row_of_target], item.batch.user_id[item.batch.row_of_target])
    assert cut.rows == cut.row_of_target.max() + 1 == len(cut.target_offsets) - 1


def test_a_model_that_reads_no_events_has_no_fresh_embeddings(lake, settings) -> None:
    with pytest.raises(SpecError, match="reads no events"):
        Fresh(snapshots(settings, "sum"), lag_hours=0)


# ---- the table


def result(arm: str, seed: int, prediction: np.ndarray, label: np.ndarray, rate=0.5) -> Result:
    n = len(label)
    both = {
        "task": np.full(2 * n, "click"), "part": np.repeat(["validation", "test"], n),
        "user_id": np.tile(np.arange(n) // 2, 2), "target_id": np.tile(np.arange(n), 2),
        "label": np.tile(label, 2), "prediction": np.tile(prediction, 2),
    }  # fmt: skip
    return Result(
        model=arm, tasks=("click",), seed=seed, predictions=Predictions(**both),
        facts={"base_rate": rate, "title": arm, "seconds": 1.0},
    )  # fmt: skip


LABEL = np.array([0, 1, 0, 0, 1, 1, 0, 1] * 20)


def right_by(much: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(-0.02, 0.02, len(LABEL))
    return 0.5 + (LABEL - 0.5) * much + noise


def test_a_share_is_of_what_the_aggregates_gain_over_context_averaged_over_seeds() -> None:
    much = {"context": 0.1, "aggregates": 0.5, "context_sum": 0.3, "flag": 0.05}
    results = [
        result(arm, seed, right_by(m, seed), LABEL) for arm, m in much.items() for seed in (0, 1)
    ]
    lines = {line.arm: line for line in table.lines(results)}
    ne = {
        arm: np.mean([normalized_entropy(LABEL, right_by(m, s), 0.5) for s in (0, 1)])
        for arm, m in much.items()
    }
    gain = ne["context"] - ne["aggregates"]
    for arm in much:
        assert lines[arm].ne["test"] == pytest.approx(ne[arm])
        assert lines[arm].recovered == pytest.approx((ne["context"] - ne[arm]) / gain)
        assert lines[arm].to_context.mean == pytest.approx(ne[arm] - ne["context"])
        assert lines[arm].to_aggregates.mean == pytest.approx(ne[arm] - ne["aggregates"])
        assert lines[arm].seeds == 2
    assert lines["aggregates"].recovered == 1 and lines["context"].recovered == 0
    assert lines["flag"].recovered < 0 < lines["context_sum"].recovered < 1
    found = lines["context_sum"].to_context
    assert found.low < found.mean < found.high < 0


def test_a_base_rate_that_moved_is_taken_out_of_the_shifted_figures() -> None:
    logit = np.log(right_by(0.5) / (1 - right_by(0.5)))
    moved = 1 / (1 + np.exp(-(logit + 1.5)))
    results = [
        result("context", 0, right_by(0.1), LABEL),
        result("aggregates", 0, right_by(0.5), LABEL),
        result("context_sum", 0, moved, LABEL),
    ]
    line = table.lines(results)[-1]
    assert line.recovered < 0.8
    assert line.shifted_recovered == pytest.approx(1.0, abs=1e-6)


def test_a_lag_keeps_a_share_of_the_gain_at_one_day_and_at_no_hours() -> None:
    much = {
        "context": 0.1, "aggregates": 0.5, "sequence_0h": 0.6, "sequence_raw_1d": 0.4,
        "sequence_raw_2d": 0.2, "sum_raw_1d": 0.3, "sum_raw_2d": 0.2,
    }  # fmt: skip
    lines = table.lines([result(arm, 0, right_by(m), LABEL) for arm, m in much.items()])
    lags = [
        *(table.Lag("sequence", age, f"sequence_{arm}")
          for age, arm in (("0 h", "0h"), ("1 d", "raw_1d"), ("2 d", "raw_2d"))),
        *(table.Lag("sum", f"{d} d", f"sum_raw_{d}d") for d in (1, 2)),
    ]  # fmt: skip
    found = {(x.model, x.age): x for x in table.lag_lines(lines, lags)}
    ne = {line.arm: line.ne["test"] for line in lines}
    gain = {arm: ne["context"] - value for arm, value in ne.items()}
    two = found["sequence", "2 d"]
    assert two.gain.mean == pytest.approx(gain["sequence_raw_2d"])
    assert two.gain.low < two.gain.mean < two.gain.high
    assert two.of_day == pytest.approx(gain["sequence_raw_2d"] / gain["sequence_raw_1d"])
    assert two.of_fresh == pytest.approx(gain["sequence_raw_2d"] / gain["sequence_0h"])
    assert found["sequence", "1 d"].of_day == 1 == found["sequence", "0 h"].of_fresh
    assert found["sum", "2 d"].of_day == pytest.approx(gain["sum_raw_2d"] / gain["sum_raw_1d"])
    assert np.isnan(found["sum", "1 d"].of_fresh)
    text = table.markdown(lines, table.lag_lines(lines, lags))
    assert "| sum_raw_1d |" not in text and "| sum | 1 d |" in text


def test_a_share_of_no_gain_is_none_and_different_labels_are_not_compared() -> None:
    results = [result(arm, 0, right_by(0.3), LABEL) for arm in ("context", "aggregates")]
    assert all(np.isnan(line.recovered) for line in table.lines(results))
    other = result("flag", 0, right_by(0.3), 1 - LABEL)
    with pytest.raises(DataError, match="different labels"):
        table.lines([*results, other])


# ---- the run


def run(lake, settings, out: Path, *more: str) -> Transfer:
    args = arguments(["--out", str(out), "--seeds", "0", "--tasks", "click", *more])
    return Transfer(lake, SPEC, settings, args, split=SPLIT, budget=BUDGET)


def test_a_run_has_every_arm_once_and_goes_on_where_it_was(
    lake, settings, tmp_path: Path, monkeypatch, capsys
) -> None:
    report(run(lake, settings, tmp_path))
    names = {
        "context", "flag", "random_sum", "aggregates",
        *(f"{kind}_{model}" for kind in ("context", "aggregates") for model in ("sum", "sequence")),
        *(f"{model}_raw_{days}d" for model in ("sum", "sequence") for days in (1, 2, 3)),
        "sequence_0h", "sequence_1h", "sum_float32", "sequence_float32",
    }  # fmt: skip
    folder = tmp_path / "transfer"
    assert {p.name for p in folder.glob("*-click-0.json")} == {f"{n}-click-0.json" for n in names}
    found = json.loads((folder / "table.json").read_text())
    assert {line["arm"] for line in found["arms"]} == names
    ages = [line["age"] for line in found["lags"] if line["model"] == "sequence"]
    assert ages == [*("0 h", "1 h", "1 d", "2 d", "3 d"), "1 d, float32", "1 d, pooled as served"]
    assert (folder / "table.md").read_text() in capsys.readouterr().out

    trained = []
    train = Comparison.train
    monkeypatch.setattr(
        Comparison,
        "train",
        lambda self, arms: trained.extend(a.name for a in arms) or train(self, arms),
    )
    (folder / "sequence_raw_2d-click-0.json").unlink()
    report(run(lake, settings, tmp_path))
    assert trained == ["sequence_raw_2d"]
    assert json.loads((folder / "table.json").read_text()) == found
    monkeypatch.setattr(TaskData, "__init__", None)  # all is there: nothing is loaded
    report(run(lake, settings, tmp_path))


def test_every_arm_is_tested_on_all_labels_of_the_test_day(lake, settings, tmp_path) -> None:
    results = run(lake, settings, tmp_path, "--models", "sum").run()
    wanted = sorted(lake.rows["impressions"][DAYS[6]]["target_id"].to_pylist())
    for found in results:
        assert found.predictions.of("click", "test").target_id.tolist() == wanted
    assert not [r for r in results if r.model.endswith("h")], "a SUM has no fresh embeddings"


def test_a_share_of_users_keeps_to_the_budget(lake) -> None:
    def targets(cap: int) -> int:
        data = TaskData(
            lake, SPEC, SPEC.task("click"),
            {f"{t}/{d}": 1 for t in ("examples", "labels", "item_aggregates") for d in DAYS},
            split=SPLIT, budget=replace(BUDGET, max_train_targets=cap), history=False,
        )  # fmt: skip
        return sum(item.batch.targets for item in data.items("train", None))

    everything = sum(lake.rows["impressions"][d].num_rows for d in SPLIT.days("train"))
    assert targets(10**6) == everything
    assert 0 < targets(everything // 2) < everything


def test_what_is_missing_is_said_before_anything_is_trained(
    lake, settings, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(Comparison, "train", None)
    less = {key: rows for key, rows in lake.published.items() if key != ("sum", DAYS[2])}
    with pytest.raises(MissingPartitionError, match=f"sum lacks {DAYS[2]}"):
        run(PublishedLake(lake.rows, less), settings, tmp_path)
    nowhere = Settings.from_env({"HEADWATER_HOME": str(tmp_path)})
    with pytest.raises(HeadwaterError, match="champion of sum"):
        run(lake, nowhere, tmp_path)
    for flags, says in ((["--tasks", "x"], "--tasks"), (["--models", ""], "--models")):
        with pytest.raises(SpecError, match=says):
            run(lake, settings, tmp_path, *flags)
    assert not list(tmp_path.rglob("*.parquet"))
