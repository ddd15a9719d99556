"""Snapshots: atomic, found by what made them, loaded by name; champions by day."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from feature_store.errors import DataError, HeadwaterError, SpecError
from feature_store.spec import Attribute
from jobs.training.checkpoints import Checkpoints, Snapshot, run_hash, state_hash
from jobs.training.config import from_plain, to_plain
from jobs.training.loop import Learner
from jobs.training.presets import Preset, preset
from tests.synthetic import dataset

DAYS = ("2024-05-01", "2024-05-02", "2024-05-04")


def _snapshot(ds: str, *, name: str = "sum-x", run: str = "r", counts=None) -> Snapshot:
    return Snapshot(
        id=f"{name}-{ds}",
        model="sum",
        ds=ds,
        parent=None,
        run_hash=run,
        state_hash="s",
        config={},
        spec_hash="h",
        inputs={f"labels/{ds}": 3},
        label_counts=counts or {"click": [1, 4]},
        steps=2,
    )


def test_a_snapshot_is_found_again_by_id_and_by_what_made_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_snapshot(DAYS[0], run="a"), {"x": torch.ones(3)})
    checkpoints.save(_snapshot(DAYS[0], name="sum-y", run="b"), {"x": torch.zeros(3)})
    assert checkpoints.trained(DAYS[0], "b").id == f"sum-y-{DAYS[0]}"
    assert checkpoints.trained(DAYS[0], "c") is None
    assert checkpoints.trained(DAYS[1], "a") is None
    assert checkpoints.load(f"sum-x-{DAYS[0]}")["x"].tolist() == [1, 1, 1]
    assert checkpoints.get(f"sum-x-{DAYS[0]}") == _snapshot(DAYS[0], run="a")
    with pytest.raises(DataError, match="none of that id"):
        checkpoints.load("sum-z")


def test_a_snapshot_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        checkpoints.save(_snapshot(DAYS[0]), {"x": torch.ones(3)})
    with pytest.raises(OSError):
        checkpoints.save_progress(DAYS[0], {"run_hash": "a"})
    assert list((tmp_path / DAYS[0]).iterdir()) == []
    assert checkpoints.snapshots(DAYS[0]) == []


def test_weights_that_are_there_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_snapshot(DAYS[0], run="a"), {"x": torch.ones(3)})
    checkpoints.save(_snapshot(DAYS[0], run="b"), {"x": torch.zeros(3)})
    assert checkpoints.load(f"sum-x-{DAYS[0]}")["x"].tolist() == [1, 1, 1]
    assert checkpoints.trained(DAYS[0], "b") is not None


def test_progress_belongs_to_one_training(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_progress(DAYS[0], "a") is None
    checkpoints.save_progress(DAYS[0], {"run_hash": "a", "rng": torch.get_rng_state()})
    assert checkpoints.load_progress(DAYS[0], "b") is None
    assert torch.equal(checkpoints.load_progress(DAYS[0], "a")["rng"], torch.get_rng_state())
    checkpoints.clear_progress(DAYS[0])
    assert checkpoints.load_progress(DAYS[0], "a") is None


def test_the_champion_of_a_day_is_the_newest_up_to_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest_champion(DAYS[2]) is None
    with pytest.raises(HeadwaterError, match="no day has one"):
        checkpoints.require_champion(DAYS[0])
    for ds in DAYS[:2]:
        checkpoints.save(_snapshot(ds), {})
        checkpoints.set_champion(ds, f"sum-x-{ds}", verdict="accepted")
    checkpoints.set_champion(DAYS[2], f"sum-x-{DAYS[1]}", verdict="rejected")
    assert checkpoints.champion_days() == list(DAYS)
    assert checkpoints.champion(DAYS[2]).ds == DAYS[1]
    assert checkpoints.newest_champion("2024-05-03").ds == DAYS[1]
    assert checkpoints.newest_champion("2024-04-30") is None
    with pytest.raises(HeadwaterError, match="2024-05-01 to 2024-05-04"):
        checkpoints.require_champion("2024-05-03")
    assert json.loads((tmp_path / DAYS[2] / "champion.json").read_text())["verdict"] == "rejected"


def test_base_rates_need_both_answers():
    counts = {"click": [1, 4], "buy": [0, 9], "never": [0, 0]}
    assert _snapshot(DAYS[0], counts=counts).base_rates() == {"click": 0.25}


def test_a_run_hash_changes_with_everything_that_decides_a_training():
    base = {
        "model": "sum",
        "ds": DAYS[0],
        "config": {"a": 1},
        "spec": "s",
        "parent": None,
        "inputs": {"x": 1},
    }
    others = [
        {"model": "sequence"}, {"ds": DAYS[1]}, {"config": {"a": 2}}, {"spec": "t"},
        {"parent": "p"}, {"inputs": {"x": 2}},
    ]  # fmt: skip
    hashes = {run_hash(**base)} | {run_hash(**(base | other)) for other in others}
    assert len(hashes) == 1 + len(others)


def test_a_state_hash_sees_names_shapes_types_and_values():
    x = torch.arange(6.0)
    states = [
        {"a": x},
        {"b": x},
        {"a": x.view(2, 3)},
        {"a": x.double()},
        {"a": x + 1e-6},
        {"a": x, "b": x},
    ]
    assert len({state_hash(s) for s in states}) == len(states)
    assert state_hash({"a": x, "b": x + 1}) == state_hash({"b": x + 1, "a": x.clone()})


@pytest.mark.parametrize("model", ["sum", "sequence"])
def test_a_recorded_configuration_builds_the_same_preset(model):
    original = preset(dataset(), model)
    plain = json.loads(json.dumps(to_plain(original)))
    assert from_plain(Preset, plain) == original
    with pytest.raises(DataError, match=r"Preset\.colour"):
        from_plain(Preset, plain | {"colour": "red"})


def test_a_model_without_a_configuration_is_named():
    with pytest.raises(SpecError, match="sum_k9"):
        preset(dataset(), "sum_k9")


@pytest.mark.parametrize("model", ["sum", "sequence"])
def test_a_grown_spec_keeps_every_weight_that_it_had(model):
    small = dataset()
    surface, *context = small.targets[0].context
    target = replace(small.targets[0], context=(surface, *context, Attribute(name="slot")))
    grown = replace(small, targets=(target,))
    device = torch.device("cpu")
    torch.manual_seed(1)
    old = Learner(small, preset(small, model), device)
    torch.manual_seed(2)
    new = Learner(grown, preset(grown, model), device)
    fresh = set(new.load(old.state()))
    assert any("slot" in name for name in fresh)
    theirs, ours = old.weights(), new.weights()
    kept = [n for n in ours if n not in fresh]
    assert any("item" in name for name in kept)
    for name in kept:
        assert torch.equal(ours[name], theirs[name]), name
