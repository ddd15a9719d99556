"""Muon takes the step of torch's own, of the parameters that are matrices, and what a snapshot keeps of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from jobs.training.by_name import Taken
from jobs.training.learner import Learner
from jobs.training.muon import Muon, orthogonalised
from jobs.training.presets import Preset, preset
from jobs.training.trainer import train
from tests.synthetic import dataset

SHAPES = [(24, 96), (96, 24), (24, 24), (16, 40), (24, 96)]
JORDAN = (3.4445, -4.7750, 2.0315)


def iterated(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as it is written down, in float64."""
    a, b, c = JORDAN
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 24), (24, 30), (24, 96), (96, 24), (1, 40)])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-5])
def test_a_matrix_is_brought_near_orthogonality(shape: tuple[int, int], smallest: float) -> None:
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = (u * torch.logspace(0, torch.tensor(smallest).log10(), len(s))) @ v
    found, want = orthogonalised(matrix, JORDAN, 5, 1e-7), iterated(matrix)
    assert (found.double() - want).norm() < 2e-3 * want.norm()
    if smallest == 1.0:
        assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.35


def test_no_gradient_at_all_moves_nothing() -> None:
    assert torch.equal(orthogonalised(torch.zeros(8, 20), JORDAN, 5, 1e-7), torch.zeros(8, 20))


def test_steps_are_those_of_torch() -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    start = [p.detach().clone() for p in mine]
    ours = Muon(mine, lr=0.01)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step == 2:  # what a batch does not reach stays where it is
            mine[1].grad = theirs[1].grad = None
        ours.step()
        reference.step()
    for p, q, was in zip(mine, theirs, start, strict=True):
        # torch orthogonalises in bfloat16
        assert (p - q).norm() < 0.04 * (q - was).norm()
        assert torch.equal(ours.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])


def test_only_matrices_are_taken() -> None:
    with pytest.raises(ValueError, match="2D parameters"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


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
    def learner(*, muon: bool, of: Learner | None = None) -> Learner:
        state = None if of is None else of.state()
        made = Learner(dataset(), with_muon("sum", muon=muon), torch.device("cpu"), state)
        assert made.taken == Taken()
        return made

    def moved(one: Learner) -> Learner:
        for parameter in one.dense.values():
            parameter.grad = torch.ones_like(parameter)
        for optimizer in one.optimizers.values():
            optimizer.step()
        return one

    by_muon = moved(learner(muon=True))
    same, other = learner(muon=True, of=by_muon), learner(muon=False, of=by_muon)
    name, first = next((n, p) for n, p in same.dense.items() if p in same.optimizers["muon"].state)
    kept = by_muon.optimizers["muon"].state[by_muon.dense[name]]["momentum_buffer"]
    assert torch.equal(same.optimizers["muon"].state[first]["momentum_buffer"], kept)
    assert kept is not same.optimizers["muon"].state[first]["momentum_buffer"]
    assert other.dense[name] not in other.optimizers["adam"].state  # it begins anew
    back = learner(muon=True, of=moved(learner(muon=False)))
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
