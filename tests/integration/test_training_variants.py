"""Three days of a small lake through what is chosen by configuration: hybrid, domains, embedding shift."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_store.days import add_days, day_range
from feature_store.embeddings import read_embeddings
from feature_store.lake import Lake
from jobs import publish_embeddings, train_upstream
from jobs.context import JobContext
from jobs.reproduce import reproduce
from jobs.settings import Settings
from jobs.training import presets, tracking
from jobs.training.checkpoints import Checkpoints
from jobs.training.config import Shift
from jobs.training.ids import held_out
from jobs.training.loader import Limits, Users, labelled_day, labelled_rows
from jobs.training.presets import Preset
from jobs.training.upstream_day import UpstreamDay
from jobs.training.whole import whole_learner
from tests.synthetic import FIRST_DAY, dataset, publish, tables

DAYS = day_range(FIRST_DAY, add_days(FIRST_DAY, 2))
SPEC = replace(dataset(), models=("sum", "hybrid"))
RUN = ("sum", "hybrid")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def rows():
    return tables(SPEC, days=len(DAYS), users=40)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, rows) -> Settings:
    """A lake, and its days of SUM and the hybrid, trained and published."""
    found = Settings.from_env({"HEADWATER_HOME": str(tmp_path_factory.mktemp("home"))})
    publish(Lake(found.lake_root, SPEC), rows)
    for ds in DAYS:
        for model in RUN:
            context = JobContext(dataset=SPEC, ds=ds, settings=found, model=model)
            train_upstream.run(context)
            publish_embeddings.run(context)
    return found


def _checkpoints(settings: Settings, model: str) -> Checkpoints:
    return Checkpoints(settings.snapshot_dir(SPEC.name, model, FIRST_DAY).parent)


def test_the_hybrid_publishes_what_its_training_saw(settings, rows):
    lake, chosen = Lake(settings.lake_root, SPEC), presets.preset(SPEC, "hybrid")
    kind = chosen.kind
    assert kind.user_table == "sequences" and kind.history and kind.user_features
    published = read_embeddings(lake, "hybrid", DAYS[1], "raw")
    known = {u for d in DAYS[:2] for u in rows["sequences"][d]["user_id"].to_pylist()}
    assert len(published) > 20 and set(published.user_ids) <= known
    checkpoints = _checkpoints(settings, "hybrid")
    learner = whole_learner(SPEC, checkpoints, checkpoints.champion(DAYS[1]), ds=DAYS[1])
    day = labelled_day(lake, SPEC, DAYS[2], tasks=["click"])
    compared = 0
    for decoded in labelled_rows(lake, SPEC, day.shown, users=Users.ALL):
        batch = decoded.batch(0, len(decoded))
        stored, present = published.lookup(batch.user_id.numpy())
        # a later part has a later base, which may have lost events from before the cutoff
        whole = present & (decoded.part == 0)
        compared += int(whole.sum())
        seen = learner.user_embeddings(batch).numpy()
        assert np.allclose(seen[whole], stored[whole].astype(np.float32), atol=4e-3)
    assert compared > 20


def test_a_recorded_hybrid_trains_again_to_the_same_bits(settings):
    mlflow = tracking.client(settings)
    experiment = mlflow.get_experiment_by_name(f"{SPEC.name}/upstream/hybrid")
    (run,) = mlflow.search_runs([experiment.experiment_id], f"tags.ds = '{DAYS[2]}'")
    assert reproduce(settings, run.info.run_id, dataset=SPEC).same


def _day(settings: Settings, home: Path, model: str, chosen: Preset) -> UpstreamDay:
    """The second day, in a home of its own; the parent is the model's champion of the first."""
    elsewhere = replace(settings, home=home)
    context = JobContext(dataset=SPEC, ds=DAYS[1], settings=elsewhere, model=model)
    return UpstreamDay(
        context=context,
        model=model,
        preset=chosen,
        day=labelled_day(context.lake, SPEC, DAYS[1]),
        parents=_checkpoints(settings, model),
    )


@pytest.mark.parametrize(
    ("model", "shift_term"),
    [("hybrid", Shift.NONE), ("hybrid", Shift.REGULARISE), ("sum", Shift.DISTIL)],
)
def test_training_that_was_killed_goes_on_to_the_same_weights(
    settings, model, shift_term, tmp_path, monkeypatch
):
    usual = presets.preset(SPEC, model)
    training = replace(
        usual.training,
        limits=Limits(max_targets=24),
        checkpoint_every_s=0.0,
        shift=shift_term,
        muon=shift_term == Shift.NONE,  # goes on from a parent that Adam trained
    )
    short = replace(usual, training=training)
    parent = _checkpoints(settings, model).champion(DAYS[0])
    keep = Checkpoints.save_progress
    steps = iter(range(100))

    def dies(self, ds, state):
        if next(steps) == 5:
            keep(self, ds, state)
            raise KeyboardInterrupt

    def trained(home: str):
        day = _day(settings, tmp_path / home, model, short)
        return day.train(parent)[0]

    monkeypatch.setattr(Checkpoints, "save_progress", lambda *_: None)
    whole = trained("whole")
    monkeypatch.setattr(Checkpoints, "save_progress", dies)
    with pytest.raises(KeyboardInterrupt):
        trained("killed")
    monkeypatch.setattr(Checkpoints, "save_progress", lambda *_: None)
    killed = trained("killed")
    assert killed.metadata["training"]["resumed"] == 1 and whole.steps == killed.steps > 7
    assert killed.state_hash == whole.state_hash
    free = _day(settings, tmp_path / "free", model, _without_shift(short))
    same = free.train(parent)[0].state_hash == whole.state_hash
    assert same == (shift_term == Shift.NONE)


def _without_shift(chosen: Preset) -> Preset:
    return replace(chosen, training=replace(chosen.training, shift=Shift.NONE))


def test_a_model_of_one_domain_is_trained_and_gated_on_it_and_scored_on_all(
    settings, rows, tmp_path
):
    usual = presets.preset(SPEC, "sum")
    chosen = replace(usual, training=replace(usual.training, domain=1))
    day = _day(settings, tmp_path, "sum", chosen)
    parent = day.parents.champion(DAYS[0])
    snapshot, record = day.train(parent)
    want, gated = _labels_on(rows, DAYS[1], surface=1)
    assert record.labels == want
    assert snapshot.label_counts == {
        t: [snapshot.label_counts[t][0], parent.label_counts[t][1] + want[t]] for t in want
    }
    found = day.gate(snapshot, None)
    assert {t: sides.candidate.labels for t, sides in found.tasks.items()} == gated

    day.checkpoints.set_champion(FIRST_DAY, snapshot.id)
    evaluation, *_ = day.evaluate()
    assert set(evaluation["click"].domains) == {"0", "1"}


def _labels_on(rows, ds: str, *, surface: int) -> tuple[dict[str, int], dict[str, int]]:
    """Labels per task that became final on `ds` for targets on `surface`: trained on, held out."""
    surfaces = {
        (shown, r["user_id"], r["part"]): r["targets__context__surface"]
        for shown in DAYS
        for r in rows["examples"][shown].to_pylist()
    }
    counts = [{t.name: 0 for t in SPEC.tasks} for _ in range(2)]
    for row in rows["labels"][ds].to_pylist():
        shown = surfaces[row["shown_ds"], row["user_id"], row["part"]]
        side = int(held_out(np.array([row["user_id"]]), SPEC.held_out_share)[0])
        counts[side][row["task"]] += sum(s == surface for s in shown)
    return counts[0], counts[1]
