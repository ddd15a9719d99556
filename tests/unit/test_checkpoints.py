"""Snapshots: atomic, found by what made them, loaded by name; champions by day."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from feature_store.errors import DataError, HeadwaterError, SpecError
from jobs.training.checkpoints import (
    Checkpoints,
    Snapshot,
    _record,
    _sum,
    is_whole,
    run_hash,
    state_hash,
    write_state,
)
from jobs.training.config import Shift
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

    def full(state, file):
        file.write(b"half")
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
    plain = json.loads(json.dumps(original.plain()))
    again = Preset.from_plain(plain, "x")
    assert again == original and type(again.training.shift) is Shift
    with pytest.raises(
        SpecError, match="x has 'colour', which is no setting: known are architecture"
    ):
        Preset.from_plain(plain | {"colour": "red"}, "x")


def test_a_model_without_a_configuration_is_named():
    with pytest.raises(SpecError, match="sum_k9"):
        preset(dataset(), "sum_k9")


# ---- files that rot

COMMAND = "python -m jobs train_upstream --dataset shop --model sum --ds 2024-05-01"
STATE = {"weights": {f"w{i}": torch.arange(200.0) + i for i in range(3)}, "axes": {}}


def _kept(tmp_path) -> tuple[Checkpoints, Path]:
    checkpoints = Checkpoints(tmp_path / "shop" / "sum")
    return checkpoints, checkpoints.save(_snapshot(DAYS[0], run="a"), STATE)


def _damages(data: bytes) -> Iterator[bytes]:
    """A flipped bit in every region, a cut at every region, and worse."""
    step = max(len(data) // 60, 1)
    for place in (*range(0, len(data), step), len(data) - 1):
        yield data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        yield data[:place]
    yield b"garbage"
    yield bytes(len(data))
    yield data + b"\0"


def test_a_state_that_is_not_what_was_written_is_refused(tmp_path):
    checkpoints, folder = _kept(tmp_path)
    path = folder / "state.pt"
    whole = path.read_bytes()
    for data in _damages(whole):
        path.write_bytes(data)
        with pytest.raises(DataError, match=COMMAND) as error:
            checkpoints.load(f"sum-x-{DAYS[0]}")
        assert str(path) in str(error.value) and "is damaged" in str(error.value)
        assert checkpoints.trained(DAYS[0], "a") is None
    path.unlink()
    with pytest.raises(DataError, match=COMMAND):
        checkpoints.load(f"sum-x-{DAYS[0]}")
    assert checkpoints.trained(DAYS[0], "a") is None
    path.write_bytes(whole)
    assert torch.equal(
        checkpoints.load(f"sum-x-{DAYS[0]}")["weights"]["w1"], STATE["weights"]["w1"]
    )
    assert checkpoints.trained(DAYS[0], "a") is not None


def test_the_whole_of_a_large_state_counts(tmp_path):
    path = tmp_path / "state.pt"
    write_state(path, {"w": torch.zeros(2**20)})
    assert is_whole(path)
    with path.open("r+b") as file:
        file.seek(3 * 2**20)
        file.write(b"rot")
    assert not is_whole(path)


def test_a_record_that_is_not_what_was_written_is_refused(tmp_path):
    checkpoints, folder = _kept(tmp_path)
    path = folder / "snapshot.json"
    other = {k: v for k, v in json.loads(path.read_bytes()).items() if k != "sha256"}
    other |= {"colour": "red"}  # of other code, and whole
    foreign = [b"[]", b"3", b"{}", json.dumps(other | {"sha256": _sum(other)}).encode()]
    for data in (*_damages(path.read_bytes()), *foreign):
        path.write_bytes(data)
        if checkpoints.snapshots(DAYS[0]):
            assert json.loads(data) == json.loads(_record(_snapshot(DAYS[0], run="a")))  # a blank
            continue
        with pytest.raises(DataError, match=COMMAND):
            checkpoints.get(f"sum-x-{DAYS[0]}")
        assert checkpoints.trained(DAYS[0], "a") is None
    path.unlink()
    with pytest.raises(DataError, match=COMMAND):
        checkpoints.get(f"sum-x-{DAYS[0]}")


@pytest.mark.parametrize("name", ["state.pt", "snapshot.json"])
def test_training_again_puts_a_damaged_snapshot_right(tmp_path, name):
    checkpoints, folder = _kept(tmp_path)
    whole = {f.name: f.read_bytes() for f in folder.iterdir()}
    (folder / name).write_bytes(whole[name][: len(whole[name]) // 2])
    checkpoints.save(_snapshot(DAYS[0], run="a"), STATE)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == whole
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_progress_that_is_damaged_is_no_progress_and_a_line_says_so(tmp_path, capsys):
    checkpoints, _ = _kept(tmp_path)
    checkpoints.save_progress(DAYS[0], {"run_hash": "a", **STATE})
    path = checkpoints.day(DAYS[0]) / "progress.pt"
    for data in _damages(path.read_bytes()):
        path.write_bytes(data)
        assert checkpoints.load_progress(DAYS[0], "a") is None
        assert (
            f"{path} is damaged: the training of {DAYS[0]} starts again" in capsys.readouterr().out
        )
    checkpoints.save_progress(DAYS[0], {"run_hash": "a", **STATE})
    assert checkpoints.load_progress(DAYS[0], "a") is not None


@pytest.mark.parametrize(
    "data", [b"", b'{"snapshot": "sum', b"[]", b"{}", b'{"snapshot": 3}', b"\xff\0"]
)
def test_a_champion_that_cannot_be_read_names_the_day_to_train(tmp_path, data):
    checkpoints, _ = _kept(tmp_path)
    checkpoints.set_champion(DAYS[0], f"sum-x-{DAYS[0]}")
    (checkpoints.day(DAYS[0]) / "champion.json").write_bytes(data)
    for ask in (checkpoints.champion, checkpoints.require_champion, checkpoints.newest_champion):
        with pytest.raises(DataError, match=COMMAND):
            ask(DAYS[0])
    assert checkpoints.newest_champion("2024-04-30") is None
    checkpoints.set_champion(DAYS[0], f"sum-x-{DAYS[0]}")
    assert checkpoints.champion(DAYS[0]) is not None
