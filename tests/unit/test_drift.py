"""What keeps embeddings near the parent snapshot's: the terms of the loss, and the training with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from feature_store.columns import NO_LABEL
from feature_store.errors import SpecError
from jobs.training.checkpoints import state_hash
from jobs.training.config import Shift, TrainingConfig
from jobs.training.learner import Learner
from jobs.training.presets import Preset, preset
from jobs.training.trainer import train
from models.batch import Batch
from models.loss import distillation, embedding_shift, multi_task_loss
from models.outputs import Outputs
from models.tables import TableConfig
from models.upstream.hybrid import HybridConfig
from models.upstream.sequence import SequenceConfig
from models.upstream.sum import SumConfig
from tests.batches import random_batch
from tests.synthetic import dataset

SPEC = dataset()
TABLES = TableConfig(dim=8, default_rows=64, item_rows=128)
MODELS = ("sum", "sequence", "hybrid")
SHIFTS = (Shift.REGULARISE, Shift.DISTIL)
PARENT = random_batch(SPEC, rows=24, seed=1)
TASKS = [t.name for t in SPEC.tasks]
DAY = [random_batch(SPEC, rows=12, seed=s) for s in range(2, 12)]


def small(model: str, **training: Any) -> Preset:
    return Preset(
        architecture=model,
        shape={
            "sum": SumConfig(tables=TABLES, dense_tokens=2),
            "sequence": SequenceConfig(tables=TABLES, width=16, head_dim=8),
            "hybrid": HybridConfig(tables=TABLES, width=16, head_dim=8, dense_tokens=2),
        }[model],
        training=TrainingConfig(checkpoint_every_s=0.0, epochs=2, **training),
    )


def fresh(model: str, *, state: dict[str, Any] | None = None, **training: Any) -> Learner:
    torch.set_num_threads(1)  # as training does
    torch.manual_seed(0)
    return Learner(SPEC, small(model, **training), torch.device("cpu"), state)


def parent_state(model: str) -> dict[str, Any]:
    """A parent that has been trained a little."""
    learner = fresh(model)
    for _ in range(5):
        learner.step(PARENT)
    return learner.state()


def started(model: str, **training: Any) -> Learner:
    """A learner at the start of a day that has a parent."""
    learner = fresh(model, state=parent_state(model), **training)
    learner.keep_parent(TASKS)
    return learner


def batches(epoch: int, skip: int) -> Iterator[Batch]:
    yield from (DAY if epoch == 0 else DAY[::-1])[skip:]


def all_positive(epoch: int, skip: int) -> Iterator[Batch]:
    """A day that says something else than the parent's did."""
    for batch in batches(epoch, skip):
        yield replace(batch, labels=torch.ones_like(batch.labels))


def embeddings(learner: Learner) -> Tensor:
    return torch.cat([learner.user_embeddings(b) for b in DAY])


def probabilities(learner: Learner) -> Tensor:
    return torch.cat([learner.probabilities(b) for b in DAY])


def moves(
    model: str,
    shift: Shift,
    of: Callable[[Learner], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """How far a day that contradicts the parent moves `of`, freely and held by a large weight."""
    found = []
    for training in ({}, {"shift": shift, "shift_weight": 100.0}):
        learner = started(model, **training)
        before = of(learner)
        train(learner, all_positive, seed=3)
        found.append(distance(before, of(learner)))
    return found


# ---- terms of the loss


def test_embedding_shift_is_the_mean_squared_distance() -> None:
    users = torch.randn(5, 2, 3, requires_grad=True)
    before = torch.randn(5, 2, 3, requires_grad=True)
    term = embedding_shift(users, before)
    distances = [(u - b).square().sum() / 6 for u, b in zip(users, before, strict=True)]
    torch.testing.assert_close(term, torch.stack(distances).mean())
    term.backward()
    assert users.grad is not None and before.grad is None
    assert embedding_shift(users[:0], before[:0]) == 0


def test_distillation_pulls_to_the_parents_probability_where_there_is_a_label() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]], requires_grad=True)
    before = torch.tensor([[0.5, -3.0], [1.0, 0.0]])
    labels = torch.tensor([[1, NO_LABEL], [0, 0]], dtype=torch.int32)
    users = torch.zeros(1, 2, 3)
    now, then = Outputs(logits, None, users), Outputs(before, None, users)
    distillation(now, then, labels, torch.tensor([3.0, 1.0])).backward()
    off = torch.sigmoid(logits.detach()) - torch.sigmoid(before)
    want = torch.tensor([[3.0 / 2, 0.0], [3.0 / 2, 1.0]]) * off
    torch.testing.assert_close(logits.grad, want)  # not a word of whether the label was 0 or 1


def test_distillation_covers_both_kinds_of_logits() -> None:
    logits, labels = torch.randn(4, 2), torch.ones(4, 2, dtype=torch.int32)
    users, ones = torch.zeros(1, 2, 3), torch.ones(2)
    one = distillation(Outputs(logits, None, users), Outputs(logits, None, users), labels, ones)
    two = Outputs(logits, logits, users)
    torch.testing.assert_close(distillation(two, two, labels, ones), 2 * one)
    soft = multi_task_loss(logits, labels, answers=torch.sigmoid(logits)).total
    torch.testing.assert_close(one, soft)


# ---- training with them


@pytest.mark.parametrize("model", MODELS)
def test_the_embeddings_of_the_loss_are_the_ones_that_are_served(model: str) -> None:
    learner = fresh(model)
    learner.model.eval()
    torch.testing.assert_close(learner.model(PARENT).users, learner.user_embeddings(PARENT))


@pytest.mark.parametrize("model", MODELS)
def test_a_large_weight_holds_the_embeddings(model: str) -> None:
    free, held = moves(model, Shift.REGULARISE, embeddings, lambda a, b: (b - a).norm() / a.norm())
    assert held < 0.3 * free, (held, free)


@pytest.mark.parametrize("model", MODELS)
def test_a_large_weight_of_distillation_holds_the_predictions(model: str) -> None:
    free, held = moves(model, Shift.DISTIL, probabilities, lambda a, b: (b - a).abs().mean())
    assert held < 0.3 * free, (held, free)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_parent_stays_as_it_was(shift: Shift) -> None:
    learner = started("hybrid", shift=shift)
    assert learner.parent is not None
    before = state_hash(learner.parent.state_dict())
    assert before == state_hash(learner.weights())
    train(learner, batches, seed=3)
    assert state_hash(learner.parent.state_dict()) == before != state_hash(learner.weights())
    assert not learner.parent.training


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_first_day_has_no_such_term(model: str, shift: Shift) -> None:
    found = []
    for training in ({}, {"shift": shift}):
        learner = fresh(model, **training)
        assert learner.parent is None
        train(learner, batches, seed=3)
        found.append(state_hash(learner.weights()))
    assert found[0] == found[1]


def test_without_a_shift_term_no_parent_is_kept() -> None:
    assert started("sum").parent is None


@pytest.mark.parametrize("shift", [Shift.NONE, *SHIFTS])
@pytest.mark.parametrize("model", MODELS)
def test_a_resumed_training_looks_back_at_the_parent_and_gives_the_same_bits(
    model: str, shift: Shift
) -> None:
    whole = started(model, shift=shift)
    done = train(whole, batches, seed=3)
    saved: list[Any] = []

    def dies(state: dict[str, Any]) -> None:
        if state["progress"]["steps"] == 13:
            saved.append(_copy(state))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(started(model, shift=shift), batches, seed=3, checkpoint=dies)
    again = started(model, shift=shift)
    resumed = train(again, batches, seed=3, restored=saved[0])
    assert state_hash(again.weights()) == state_hash(whole.weights())
    assert (resumed.steps, resumed.resumed) == (done.steps, 1) == (2 * len(DAY), 1)
    assert resumed.loss_sum == done.loss_sum


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("model", MODELS)
def test_distillation_leaves_out_what_the_parent_was_never_trained_on(model: str) -> None:
    """Its answer there is a guess of a half."""

    def weights_with(known: list[str], weight: float) -> dict[str, Tensor]:
        state = parent_state(model)
        learner = fresh(model, state=state, shift=Shift.DISTIL, shift_weight=weight)
        learner.keep_parent(known)
        train(learner, batches, seed=3)
        return {n: w.clone() for n, w in learner.weights().items()}

    alone, none = weights_with(TASKS, 0.0), weights_with([], 100.0)
    both, one = weights_with(TASKS, 100.0), weights_with(TASKS[:1], 100.0)
    assert state_hash(none) == state_hash(alone)
    assert len({state_hash(w) for w in (alone, both, one)}) == 3


def test_a_feature_that_the_parent_lacks_looks_back_at_its_first_values() -> None:
    """After a spec has grown: the parent is what the day starts from, new weights included."""
    state = parent_state("sum")
    name = "user_tower.norm.weight"
    state["weights"] = {k: v for k, v in state["weights"].items() if k != name}
    learner = fresh("sum", state=state, shift=Shift.REGULARISE)
    assert learner.taken.fresh() == [name]
    learner.keep_parent([])
    assert learner.parent is not None
    assert (learner.parent.state_dict()[name] == 1.0).all()


# ---- configuration


@pytest.mark.parametrize("model", ["hybrid", "sum_regularise", "sequence_distil"])
def test_a_variant_survives_being_recorded(model: str) -> None:
    original = preset(SPEC, model)
    assert original.training.shift == model.partition("_")[2] or model == "hybrid"
    assert Preset.from_plain(json.loads(json.dumps(original.plain())), "x") == original


def test_an_unknown_answer_is_refused() -> None:
    with pytest.raises(SpecError, match="known are none, regularise, distil"):
        TrainingConfig(shift="freeze")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="0 or more"):
        TrainingConfig(shift_weight=-1.0)


def test_progress_of_a_step_counts_labels_and_positives() -> None:
    learner = fresh("sum")
    done = train(learner, lambda e, s: iter(DAY[:2][s:]) if e == 0 else iter(()), seed=3)
    labels = torch.cat([b.labels for b in DAY[:2]])
    assert done.labels == [len(labels)] * 2
    assert done.positives == (labels == 1).sum(0).tolist()
