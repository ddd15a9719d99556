"""Which parameters Muon moves, and what a snapshot keeps of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from jobs.training.loop import Learner, train
from jobs.training.presets import Preset, preset
from tests.synthetic import dataset


def with_muon(model: str, *, muon: bool = True) -> Preset:
    found = preset(dataset(), model)
    return replace(found, training=replace(found.training, muon=muon))


@pytest.mark.parametrize("model", ["sum", "sequence", "hybrid"])
def test_every_parameter_has_one_optimizer_and_tables_are_no_matrices(model: str) -> None:
    learner = Learner(dataset(), with_muon(model), torch.device("cpu"))
    of = {k: o.param_groups[0]["params"] for k, o in learner.optimizers.items()}
    assert sorted(map(id, [*of["adam"], *of["muon"]])) == sorted(map(id, learner.dense.values()))
    tables = {id(m.weight) for m in learner.model.modules() if isinstance(m, nn.Embedding)}
    linear = {
        id(m.weight)
        for m in learner.model.modules()
        if isinstance(m, nn.Linear) and min(m.weight.shape) >= 16
    }
    mine = set(map(id, of["muon"]))
    assert linear <= mine and not tables & mine
    assert all(p.ndim == 2 for p in of["muon"])


def test_a_snapshot_of_adam_goes_on_with_muon_and_back() -> None:
    def learner(*, muon: bool) -> Learner:
        return Learner(dataset(), with_muon("sum", muon=muon), torch.device("cpu"))

    def moved(one: Learner) -> Learner:
        for parameter in one.dense.values():
            parameter.grad = torch.ones_like(parameter)
        for optimizer in one.optimizers.values():
            optimizer.step()
        return one

    by_muon = moved(learner(muon=True))
    same, other = learner(muon=True), learner(muon=False)
    assert same.load(by_muon.state()) == other.load(by_muon.state()) == []
    name, first = next((n, p) for n, p in same.dense.items() if p in same.optimizers["muon"].state)
    kept = by_muon.optimizers["muon"].state[by_muon.dense[name]]["momentum_buffer"]
    assert torch.equal(same.optimizers["muon"].state[first]["momentum_buffer"], kept)
    assert kept is not same.optimizers["muon"].state[first]["momentum_buffer"]
    assert other.dense[name] not in other.optimizers["adam"].state  # it begins anew
    assert moved(other).load(by_muon.state()) == []
    back = learner(muon=True)
    back.load(moved(learner(muon=False)).state())
    assert not back.optimizers["muon"].state and back.optimizers["adam"].state
    moved(back)


def test_denormal_numbers_are_flushed_in_training_and_nowhere_else() -> None:
    tiny = torch.tensor([1e-39])
    seen = []

    class Fails(Learner):
        def step(self, batch: Any) -> Any:
            seen.append(float(tiny * 1.0))
            raise InterruptedError

    learner = Fails(dataset(), with_muon("sum"), torch.device("cpu"))
    with pytest.raises(InterruptedError):
        train(learner, lambda epoch, skip: [None], seed=0)
    assert seen == [0.0]
    assert float(tiny * 1.0) > 0
