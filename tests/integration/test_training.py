"""Five days of a small lake through both models: train, gate, publish, compare, reproduce."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.days import add_days, day_range
from feature_store.embeddings import EmbeddingKind, read_embeddings
from feature_store.errors import DataError, StalePartitionError
from feature_store.lake import Lake
from feature_store.spec import Aggregate, DenseFeature
from feature_store.tables import contract
from jobs import publish_embeddings, train_downstream, train_upstream
from jobs.context import JobContext
from jobs.reproduce import reproduce
from jobs.settings import REPOSITORY, Settings
from jobs.training import presets, tracking
from jobs.training.checkpoints import Checkpoints
from jobs.training.config import DownstreamTraining, GateConfig
from jobs.training.ids import held_out
from jobs.training.loader import Limits, Users, labelled_day, labelled_rows
from jobs.training.results import upstream_results
from jobs.training.upstream_day import UpstreamDay
from jobs.training.whole import whole_learner
from tests.synthetic import FIRST_DAY, dataset, publish, tables

DAYS = day_range(FIRST_DAY, add_days(FIRST_DAY, 4))
MODELS = ("sum", "sequence")
SPEC = dataset()

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def rows():
    return tables(SPEC, days=len(DAYS), users=40)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, rows) -> Settings:
    """A lake, and five days of both models run once in order."""
    found = Settings.from_env({"HEADWATER_HOME": str(tmp_path_factory.mktemp("home"))})
    publish(Lake(found.lake_root, SPEC), rows)
    for ds in DAYS:
        for model in MODELS:
            _train_and_publish(found, model, ds)
    return found


def _context(settings: Settings, ds: str, **about: str) -> JobContext:
    return JobContext(dataset=SPEC, ds=ds, settings=settings, **about)


def _train_and_publish(settings: Settings, model: str, ds: str) -> None:
    context = _context(settings, ds, model=model)
    train_upstream.run(context)
    publish_embeddings.run(context)


def _elsewhere(settings: Settings, home: Path) -> Settings:
    """The same lake, models and MLflow of one's own."""
    return replace(settings, home=home, mlflow_uri=f"sqlite:///{home}/mlflow/mlflow.db")


def _checkpoints(settings: Settings, model: str) -> Checkpoints:
    return Checkpoints(settings.snapshot_dir(SPEC.name, model, FIRST_DAY).parent)


def _result(settings: Settings, model: str, ds: str) -> dict:
    return json.loads((_checkpoints(settings, model).day(ds) / "result.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_every_day_starts_from_the_champion_before_it(settings, model):
    checkpoints = _checkpoints(settings, model)
    assert checkpoints.champion_days() == DAYS
    assert [_result(settings, model, d)["parent"] for d in DAYS] == [
        None,
        *[checkpoints.champion(d).id for d in DAYS[:-1]],
    ]


@pytest.mark.parametrize("model", MODELS)
def test_labels_are_judged_by_the_snapshot_that_was_live_when_they_were_shown(
    settings, rows, model
):
    checkpoints = _checkpoints(settings, model)
    assert _result(settings, model, DAYS[0])["evaluation"] == {}
    for ds in DAYS[2:]:
        found = _result(settings, model, ds)["evaluation"]
        for task in SPEC.tasks:
            shown = add_days(ds, -task.matures_after)
            assert found[task.name]["shown_ds"] == shown
            assert found[task.name]["snapshot"] == checkpoints.champion(add_days(shown, -1)).id
        written = pq.read_table(checkpoints.day(ds) / "evaluation.parquet").to_pylist()
        want = {
            (t, task.name, label)
            for task in SPEC.tasks
            for row in rows["labels"][ds].to_pylist()
            if row["task"] == task.name
            for t, label in zip(
                _target_ids(rows, row["shown_ds"], row["user_id"], row["part"]),
                row["labels"],
                strict=True,
            )
        }
        assert {(r["target_id"], r["task"], r["label"]) for r in written} == want
        assert len(written) == len(want)


def _target_ids(rows, shown: str, user: int, part: int) -> list[int]:
    for row in rows["examples"][shown].to_pylist():
        if (row["user_id"], row["part"]) == (user, part):
            return row["targets__target_id"]
    raise AssertionError("labels without a row of examples")


@pytest.mark.parametrize("model", MODELS)
def test_labels_of_held_out_users_are_never_trained_on(settings, rows, model):
    want = {t.name: [0, 0] for t in SPEC.tasks}
    for ds in DAYS:
        for row in rows["labels"][ds].to_pylist():
            if not held_out(np.array([row["user_id"]]), SPEC.held_out_share)[0]:
                want[row["task"]][0] += sum(row["labels"])
                want[row["task"]][1] += len(row["labels"])
    last = _checkpoints(settings, model).champion(DAYS[-1])
    assert last.label_counts == want


@pytest.mark.parametrize("model", MODELS)
def test_running_a_day_again_changes_nothing_and_moves_no_alias_back(settings, model):
    checkpoints = _checkpoints(settings, model)
    before = {d: (_result(settings, model, d), checkpoints.champion(d)) for d in DAYS}
    embeddings = read_embeddings(Lake(settings.lake_root, SPEC), model, DAYS[1]).numpy().copy()
    _train_and_publish(settings, model, DAYS[1])
    assert before == {d: (_result(settings, model, d), checkpoints.champion(d)) for d in DAYS}
    again = read_embeddings(Lake(settings.lake_root, SPEC), model, DAYS[1]).numpy()
    assert np.array_equal(embeddings, again)

    mlflow = tracking.client(settings)
    name = f"{SPEC.name}.{model}"
    alias = mlflow.get_model_version_by_alias(name, "champion")
    assert alias.tags["snapshot"] == checkpoints.champion(DAYS[-1]).id
    assert mlflow.get_model_version_by_alias(name, "candidate").tags["ds"] == DAYS[-1]
    assert len(mlflow.search_model_versions(f"name = '{name}'")) == len(DAYS)
    experiment = mlflow.get_experiment_by_name(f"{SPEC.name}/upstream/{model}")
    runs = mlflow.search_runs([experiment.experiment_id])
    assert sorted(r.data.tags["ds"] for r in runs) == DAYS
    assert {r.info.status for r in runs} == {"FINISHED"}
    newest = next(r for r in runs if r.data.tags["ds"] == DAYS[-1])
    read = {d.dataset.name for d in newest.inputs.dataset_inputs}
    reach = SPEC.item_features.co_occurrence.window_days + 2  # two days shown and those before them
    items = {f"item_aggregates/{day}" for day in DAYS[-reach:]}
    assert read == items | {f"labels/{DAYS[-1]}"} | {f"examples/{day}" for day in DAYS[-2:]}
    assert (
        newest.data.metrics["click_live_ne"]
        == _result(settings, model, DAYS[-1])["evaluation"]["click"]["ne"]
    )
    assert newest.data.metrics["published_coverage"] > 0.9


@pytest.mark.parametrize("model", MODELS)
def test_training_that_was_killed_goes_on_to_the_same_weights(
    settings, model, tmp_path, monkeypatch
):
    usual = presets.preset(SPEC, model)
    training = replace(
        usual.training, limits=Limits(max_targets=24), checkpoint_every_s=0.0, epochs=2
    )
    short = replace(usual, training=training)

    def day(home: str) -> UpstreamDay:
        context = _context(_elsewhere(settings, tmp_path / home), DAYS[1], model=model)
        labelled = labelled_day(context.lake, SPEC, DAYS[1])
        return UpstreamDay(context=context, model=model, preset=short, day=labelled)

    keep = Checkpoints.save_progress
    monkeypatch.setattr(Checkpoints, "save_progress", lambda *_: None)
    day("whole").run()
    steps = iter(range(100))

    def dies(self, ds, state):
        if next(steps) == 9:
            keep(self, ds, state)
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save_progress", dies)
    with pytest.raises(KeyboardInterrupt):
        day("killed").run()
    killed = day("killed").checkpoints
    assert killed.snapshots(DAYS[1]) == []
    assert killed.champion_days() == []
    monkeypatch.setattr(Checkpoints, "save_progress", lambda *_: None)
    day("killed").run()

    first, second = day("whole").checkpoints.champion(DAYS[1]), killed.champion(DAYS[1])
    assert second.metadata["training"]["resumed"] == 1
    assert first.metadata["training"]["resumed"] == 0
    assert first.steps == second.steps > 10
    assert first.label_counts == second.label_counts
    assert first.state_hash == second.state_hash
    assert not (killed.day(DAYS[1]) / "progress.pt").exists()


def test_a_rejected_candidate_leaves_the_champion_to_publish_and_to_start_the_next_day(
    settings, tmp_path, monkeypatch
):
    usual = presets.preset(SPEC, "sum")
    mine = _elsewhere(settings, tmp_path)
    mine = replace(mine, lake_root=str(tmp_path / "lake"))
    source, lake = Lake(settings.lake_root, SPEC), Lake(mine.lake_root, SPEC)
    for table in ("impressions", "examples", "labels", "aggregates"):
        for ds in DAYS[:3]:
            data = source.read(table, days=[ds])
            lake.publish_arrow(table, ds, data, inputs={}, code_version="test")
    _train_and_publish(mine, "sum", DAYS[0])
    strict = replace(usual, gate=GateConfig(ne_tolerance=-10.0, min_labels=1, min_users=1))
    monkeypatch.setattr(presets, "preset", lambda *_: strict)
    _train_and_publish(mine, "sum", DAYS[1])
    monkeypatch.setattr(presets, "preset", lambda *_: usual)
    _train_and_publish(mine, "sum", DAYS[2])

    checkpoints = _checkpoints(mine, "sum")
    first = checkpoints.champion(DAYS[0])
    rejected = _result(mine, "sum", DAYS[1])
    assert rejected["gate"]["verdict"] == "rejected"
    assert "held-out NE is worse" in rejected["gate"]["reason"]
    assert rejected["candidate"] != first.id
    assert checkpoints.champion(DAYS[1]) == first
    assert read_embeddings(lake, "sum", DAYS[1]).snapshot == first.id
    assert checkpoints.champion(DAYS[2]).parent == first.id

    # no label is lost: what a run of days without a rejection is trained on
    third = _result(mine, "sum", DAYS[2])
    assert (third["trained_on"], third["lost"]) == (DAYS[1:3], [])
    assert checkpoints.champion(DAYS[2]).label_counts == (
        _checkpoints(settings, "sum").champion(DAYS[2]).label_counts
    )
    judged = _result(settings, "sum", DAYS[2])["evaluation"]
    for task, found in third["evaluation"].items():  # the day's labels only
        assert all(found[n] == judged[task][n] for n in ("shown_ds", "labels", "positives"))
    mlflow = tracking.client(mine)
    experiment = mlflow.get_experiment_by_name(f"{SPEC.name}/upstream/sum")
    runs = {r.data.tags["ds"]: r for r in mlflow.search_runs([experiment.experiment_id])}
    assert runs[DAYS[1]].data.tags["verdict"] == "rejected"
    assert (runs[DAYS[1]].data.metrics["judged"], runs[DAYS[1]].data.metrics["accepted"]) == (1, 0)
    assert {f"labels/{ds}" for ds in DAYS[1:3]} <= {
        d.dataset.name for d in runs[DAYS[2]].inputs.dataset_inputs
    }
    assert reproduce(mine, runs[DAYS[2]].info.run_id, dataset=SPEC).same

    # a bound on it, and what is beyond is said to be lost
    one_day = replace(usual, training=replace(usual.training, catch_up_days=0))
    monkeypatch.setattr(presets, "preset", lambda *_: one_day)
    train_upstream.run(_context(mine, DAYS[2], model="sum"))
    last = upstream_results(mine, SPEC.name, "sum").of(DAYS[2])
    assert (last.trained_on, last.lost) == ([DAYS[2]], [DAYS[1]])
    assert f"labels of {DAYS[1]} are lost to the model" in train_upstream.summary(last)


def test_published_embeddings_are_of_every_user_once_at_their_newest_state(settings, rows):
    lake = Lake(settings.lake_root, SPEC)
    newest = {}
    for ds in DAYS[:4]:
        newest |= {r["user_id"]: r for r in rows["sequences"][ds].to_pylist()}
    chosen = presets.preset(SPEC, "sequence")
    users = publish_embeddings.UserRows.of(lake, chosen, DAYS[3])
    found = [r for b in users.batches(lake, chosen) for r in b.to_pylist()]
    assert len(found) == len(newest)
    for row in found:
        want = newest[row["user_id"]]
        assert all(
            row[c] == want[c] or row[c] != row[c] for c in row if "time" in c or c == "user_id"
        )
    published = read_embeddings(lake, "sequence", DAYS[3], "raw")
    assert set(published.user_ids) <= set(newest)
    assert set(read_embeddings(lake, "sum", DAYS[3]).user_ids) == {
        r["user_id"] for r in rows["aggregates"][DAYS[3]].to_pylist()
    }
    notes = lake.partitions("user_embeddings", "sequence")[DAYS[3]].notes
    assert notes["users"] == len(published)
    assert notes["norm_min"] > 0
    assert notes["common_users"] > 0 and notes["cosine"] is not None


def test_a_served_embedding_is_the_one_that_the_training_saw(settings):
    """What is published for a day equals what the model makes of that user's rows of the next day."""
    lake = Lake(settings.lake_root, SPEC)
    for model in MODELS:
        checkpoints = _checkpoints(settings, model)
        learner = whole_learner(SPEC, checkpoints, checkpoints.champion(DAYS[2]), ds=DAYS[2])
        published = read_embeddings(lake, model, DAYS[2], "raw")
        day = labelled_day(lake, SPEC, DAYS[3], tasks=["click"])
        compared = 0
        for decoded in labelled_rows(lake, SPEC, day.shown, users=Users.ALL):
            batch = decoded.batch(0, len(decoded))
            seen = learner.user_embeddings(batch).numpy()
            stored, present = published.lookup(batch.user_id.numpy())
            # a later part has a later base, which may have lost events from before the cutoff
            whole = present & (decoded.part == 0)
            compared += int(whole.sum())
            assert np.allclose(seen[whole], stored[whole].astype(np.float32), atol=4e-3)
        assert compared > 20


@pytest.mark.parametrize("model", MODELS)
def test_a_recorded_run_trains_again_to_the_same_bits(settings, model):
    mlflow = tracking.client(settings)
    experiment = mlflow.get_experiment_by_name(f"{SPEC.name}/upstream/{model}")
    runs = mlflow.search_runs([experiment.experiment_id], f"tags.ds = '{DAYS[2]}'")
    assert len(runs) == 1
    found = reproduce(settings, runs[0].info.run_id, dataset=SPEC)
    assert found.snapshot == runs[0].data.tags["snapshot"]
    assert found.same


def test_downstream_compares_the_arms_on_the_newest_matured_day(settings, rows):
    context = _context(settings, DAYS[4], task="click")
    train_downstream.run(context)
    where = settings.downstream_dir(SPEC.name, "click") / DAYS[4]
    result = json.loads((where / "result.json").read_text())
    compared = result["compared"]
    assert (compared["test_day"], compared["train_days"]) == (DAYS[4], DAYS[1:4])
    assert set(result["arms"]) == {
        "context", "aggregates", "aggregates_sum", "aggregates_sequence", "aggregates_all",
        "context_sum", "context_sequence",
    }  # fmt: skip
    for model in MODELS:
        checkpoints = _checkpoints(settings, model)
        used = {d: checkpoints.champion(d).id for d in DAYS[:4]}
        assert compared["snapshots"][model] == used
    written = pq.read_table(where / "predictions.parquet").to_pydict()
    want = {}
    for row in rows["labels"][DAYS[4]].to_pylist():
        if row["task"] == "click":
            ids = _target_ids(rows, row["shown_ds"], row["user_id"], row["part"])
            want |= dict(zip(ids, row["labels"], strict=True))
    assert dict(zip(written["target_id"], written["label"], strict=True)) == want
    for name, arm in result["arms"].items():
        assert arm["labels"] == len(want)
        assert np.isfinite(written[name]).all()
        assert (arm["difference"] is None) == (name == "aggregates")
    ranking = compared["importance"]["ranking"]
    assert {
        "sum embeddings",
        "sequence embeddings",
        "user's likes_1d",
        "user's liked",
        "the item",
    } <= {r["feature"] for r in ranking}
    assert [r["rank"] for r in ranking] == list(range(1, len(ranking) + 1))

    first = (where / "predictions.parquet").read_bytes()
    train_downstream.run(context)
    assert (where / "predictions.parquet").read_bytes() == first
    mlflow = tracking.client(settings)
    experiment = mlflow.get_experiment_by_name(f"{SPEC.name}/downstream/click")
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert run.data.metrics["ne_aggregates"] == result["arms"]["aggregates"]["ne"]


def test_downstream_reads_raw_or_pooled_embeddings_as_its_budget_says(settings, monkeypatch):
    context = _context(settings, DAYS[4], task="click")
    where = settings.downstream_dir(SPEC.name, "click") / DAYS[4] / "predictions.parquet"
    found = {}
    for kind in EmbeddingKind:
        budget = DownstreamTraining(kind=kind)
        monkeypatch.setattr(presets, "downstream_training", lambda _, budget=budget: budget)
        train_downstream.run(context)
        found[kind] = pq.read_table(where)
    raw, pooled = found.values()
    for arm in ("context", "aggregates"):
        assert raw[arm] == pooled[arm]
    for arm in ("context_sum", "context_sequence", "aggregates_all"):
        assert raw[arm] != pooled[arm]


def test_too_few_days_end_with_one_line_and_without_torch(settings):
    program = (
        "import sys\n"
        "from jobs import train_downstream\n"
        "from jobs.context import JobContext\n"
        "from jobs.settings import Settings\n"
        "from tests.synthetic import dataset\n"
        "settings = Settings.from_env()\n"
        f"train_downstream.run(JobContext(dataset=dataset(), ds='{DAYS[4]}', settings=settings, task='buy'))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={"HEADWATER_HOME": str(settings.home), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") == 1
    assert "needs a test day and 3 before it, has a test day and 2" in done.stdout


def _days_of(settings: Settings, tmp_path) -> Settings:
    """A home with nothing but the tables that SUM reads."""
    mine = replace(_elsewhere(settings, tmp_path), lake_root=str(tmp_path / "lake"))
    _build_under(SPEC, settings, mine)
    return mine


def _build_under(spec, settings: Settings, mine: Settings) -> None:
    """Those tables as `spec` lays them out."""
    source, lake = Lake(settings.lake_root, SPEC), Lake(mine.lake_root, spec)
    for table in ("impressions", "examples", "labels", "aggregates"):
        for ds in DAYS[:3]:
            data = source.read(table, days=[ds])
            schema = contract(spec, table).schema
            columns = [
                data[f.name] if f.name in data.column_names else data["dense__likes_2d"]
                for f in schema
            ]
            rows = pa.table(columns, schema=schema)
            lake.publish_arrow(table, ds, rows, inputs={}, code_version="test")


def test_a_run_of_days_goes_on_after_a_feature_was_added(settings, tmp_path):
    """And nothing is scored, judged or published by a model that is half first weights."""
    more = DenseFeature(name="likes_9d", stream="likes", aggregate=Aggregate.COUNT, window_days=9)
    grown = replace(SPEC, dense_features=(*SPEC.dense_features, more))
    mine = _days_of(settings, tmp_path)

    def context(ds: str, spec) -> JobContext:
        return JobContext(dataset=spec, ds=ds, settings=mine, model="sum")

    for ds in DAYS[:2]:
        train_upstream.run(context(ds, SPEC))
    checkpoints = _checkpoints(mine, "sum")
    old = checkpoints.champion(DAYS[1])
    _build_under(grown, settings, mine)
    with pytest.raises(StalePartitionError, match=r"champion of sum .* that were replaced"):
        publish_embeddings.run(context(DAYS[1], grown))
    with pytest.raises(DataError, match=f"snapshot {old.id} of another spec lacks dense:likes_9d"):
        whole_learner(grown, checkpoints, old, ds=DAYS[1])

    train_upstream.run(context(DAYS[2], grown))
    result = _result(mine, "sum", DAYS[2])
    new = checkpoints.champion(DAYS[2])
    fact = f"snapshot {old.id} of another spec lacks dense:likes_9d"
    assert result["not_evaluated"][DAYS[2]] == fact and result["evaluation"] == {}
    assert (result["gate"]["verdict"], result["gate"]["reason"]) == ("not judged", fact)
    assert new.id == result["candidate"] and new.parent == old.id
    fresh = new.metadata["training"]["fresh_weights"]
    assert "user.dense.0.weight[dense:likes_9d]" in fresh
    assert not any("table" in name for name in fresh)
    publish_embeddings.run(context(DAYS[2], grown))
    assert read_embeddings(Lake(mine.lake_root, grown), "sum", DAYS[2]).snapshot == new.id


def test_a_snapshot_that_rots_stops_what_reads_it_and_is_trained_again_to_the_same(
    settings, tmp_path, capsys
):
    mine = _days_of(settings, tmp_path)
    contexts = [JobContext(dataset=SPEC, ds=ds, settings=mine, model="sum") for ds in DAYS[:2]]
    for context in contexts:
        train_upstream.run(context)
    checkpoints = _checkpoints(mine, "sum")
    first = checkpoints.champion(DAYS[0])
    state = checkpoints.path(first.id) / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2] + b"rot" + whole[len(whole) // 2 + 3 :])
    command = f"python -m jobs train_upstream --dataset {SPEC.name} --model sum --ds {DAYS[0]}"
    for job in (train_upstream.run, publish_embeddings.run):
        with pytest.raises(DataError, match=command):
            job(contexts[1 if job is train_upstream.run else 0])
    (checkpoints.day(DAYS[0]) / "champion.json").write_text('{"snapshot":')
    (checkpoints.day(DAYS[0]) / "progress.pt").write_bytes(b"garbage")
    train_upstream.run(contexts[0])
    assert "progress.pt is damaged" in capsys.readouterr().out
    assert checkpoints.champion(DAYS[0]).id == first.id and state.read_bytes() == whole
    assert not (checkpoints.day(DAYS[0]) / "progress.pt").exists()
    publish_embeddings.run(contexts[0])
    (checkpoints.day(DAYS[0]) / "result.json").write_text('{"ds":')
    with pytest.raises(DataError, match=rf"result\.json is damaged: run {command}"):
        train_upstream.run(contexts[1])
