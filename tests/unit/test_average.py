"""The moving average of weights: what it is, that training does not feel it, and that it survives a stop."""

from __future__ import annotations

import torch

from jobs.training.average import Average


def _walk(average: Average, weight: torch.Tensor, values: list[float], step: int = 0) -> None:
    for value in values:
        with torch.no_grad():
            weight.fill_(value)
        average.update(step := step + 1)


def test_it_is_the_exponential_moving_average_that_the_docstring_names():
    weight = torch.full((2,), 5.0)
    average = Average({"w": weight}, 0.5)
    average.train()
    _walk(average, weight, [1.0, 2.0, 4.0])
    want = 5.0
    for n, value in enumerate([1.0, 2.0, 4.0], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * value
    assert weight.tolist() == [4.0, 4.0]
    torch.testing.assert_close(average.served()["w"], torch.full((2,), want))
    average.serve()
    torch.testing.assert_close(weight, torch.full((2,), want))
    assert average.trained()["w"].tolist() == [4.0, 4.0]
    average.train()
    assert weight.tolist() == [4.0, 4.0]


def test_without_decay_nothing_is_kept():
    weight = torch.zeros(1)
    average = Average({"w": weight}, 0.0)
    average.train()
    _walk(average, weight, [1.0, 2.0])
    average.serve()
    assert weight.item() == 2.0 and average.trained() == {} and average.other == {}


def test_a_stop_in_the_middle_changes_nothing():
    values = [1.0, 3.0, 2.0, 7.0]
    whole_weight = torch.zeros(1)
    whole = Average({"w": whole_weight}, 0.9)
    whole.train()
    _walk(whole, whole_weight, values)
    whole.serve()

    first_weight = torch.zeros(1)
    first = Average({"w": first_weight}, 0.9)
    first.train()
    _walk(first, first_weight, values[:2])
    kept = {"served": first.served()["w"].clone(), "trained": first.trained()["w"].clone()}

    second_weight = kept["served"].clone()
    second = Average({"w": second_weight}, 0.9)
    second.load({"w": kept["trained"]})
    second.train()
    assert second_weight.item() == 3.0
    _walk(second, second_weight, values[2:], step=2)
    second.serve()
    assert torch.equal(second_weight, whole_weight)
    assert torch.equal(second.trained()["w"], whole.trained()["w"])
