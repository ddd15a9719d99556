"""What embeddings bring, as tables: NE of each arm, and what is left of a gain at each lag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.globo.results import Metric, Result, by_model, by_seed, difference, interval_text
from jobs.training.downstream import REFERENCE
from models.metrics import Interval, normalized_entropy, shifted_normalized_entropy

CONTEXT = "context"
_NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One arm of one task; means over its seeds.

    Args:
        ne: by part.
        shifted_ne: on the test days, after an intercept shift: a base rate that moved is taken out.
        to_context, to_aggregates: NE on the test days less that of context and item, and of these with
            the aggregates, with its 95 % interval by a paired bootstrap over users.
        recovered, shifted_recovered: the gain over context and item as a share of what the
            aggregates gain, by NE and by shifted NE; NaN where the aggregates gain nothing.
    """

    task: str
    arm: str
    title: str
    seeds: int
    ne: dict[str, float]
    shifted_ne: float
    to_context: Interval
    to_aggregates: Interval
    recovered: float
    shifted_recovered: float


class Lag(NamedTuple):
    """How old a model's embeddings are, and the arm that reads them."""

    model: str
    age: str
    arm: str


@dataclass(frozen=True, kw_only=True)
class LagLine:
    """What a model's embeddings of some age gain over context and item: NE, with its 95 % interval.

    Args:
        of_day, of_fresh: the gain as a share of that at 1 day, and of that at 0 hours; NaN where
            there is none.
    """

    task: str
    model: str
    age: str
    arm: str
    gain: Interval
    of_day: float
    of_fresh: float


def share(gain: float, whole: float) -> float:
    """`gain` / `whole`; NaN where `whole` is no gain."""
    return gain / whole if whole > 0 else _NAN


def lines(results: Sequence[Result]) -> list[Line]:
    """One for each task and arm, in the order of the results.

    Raises:
        DataError: two arms were not tested on the same labels.
    """
    tasks = dict.fromkeys(r.tasks[0] for r in results)
    of_task = {task: by_model(r for r in results if r.tasks == (task,)) for task in tasks}
    return [line for task, arms in of_task.items() for line in _of_task(task, arms)]


def _of_task(task: str, arms: dict[str, list[Result]]) -> list[Line]:
    rate = arms[CONTEXT][0].facts["base_rate"]

    def ne(labels: np.ndarray, predictions: np.ndarray) -> float:
        return normalized_entropy(labels, predictions, rate)

    def means(part: str, metric: Metric) -> dict[str, float]:
        return {a: float(by_seed(of, task, part, metric).mean()) for a, of in arms.items()}

    def recovered(of: dict[str, float], arm: str) -> float:
        return share(of[CONTEXT] - of[arm], of[CONTEXT] - of[REFERENCE])

    validation, test = means("validation", ne), means("test", ne)
    shifted = means("test", shifted_normalized_entropy)
    return [
        Line(
            task=task, arm=arm, title=of[0].facts["title"], seeds=len(of),
            ne={"validation": validation[arm], "test": test[arm]}, shifted_ne=shifted[arm],
            to_context=difference(of, arms[CONTEXT], task, rate),
            to_aggregates=difference(of, arms[REFERENCE], task, rate),
            recovered=recovered(test, arm), shifted_recovered=recovered(shifted, arm),
        )
        for arm, of in arms.items()
    ]  # fmt: skip


def lag_lines(found: Sequence[Line], lags: Sequence[Lag]) -> list[LagLine]:
    """One for each task and lag."""
    out = []
    for task in dict.fromkeys(line.task for line in found):
        lost = {line.arm: line.to_context for line in found if line.task == task}
        whole = {(lag.model, lag.age): -lost[lag.arm].mean for lag in lags}
        for lag in lags:
            of = lost[lag.arm]
            gain = Interval(mean=-of.mean, low=-of.high, high=-of.low)
            out.append(
                LagLine(
                    task=task, **lag._asdict(), gain=gain,
                    of_day=share(gain.mean, whole[lag.model, "1 d"]),
                    of_fresh=share(gain.mean, whole.get((lag.model, "0 h"), _NAN)),
                )
            )  # fmt: skip
    return out


def markdown(found: Sequence[Line], lags: Sequence[LagLine]) -> str:
    """Two tables for each task. Arms that only the table of lags is about are left to it."""
    out = []
    only_lags = {y.arm for y in lags} - {f"context_{y.model}" for y in lags}
    for task in dict.fromkeys(line.task for line in found):
        out += [
            f"\n### {task}\n",
            "| arm | NE validation | NE test | to context and item, 95 % | to + aggregates, 95 % "
            "| recovered | NE test, shifted | recovered, shifted | seeds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for x in (x for x in found if x.task == task and x.arm not in only_lags):
            to_context = "" if x.arm == CONTEXT else interval_text(x.to_context)
            to_aggregates = "" if x.arm == REFERENCE else interval_text(x.to_aggregates)
            out.append(
                f"| {x.title} | {x.ne['validation']:.4f} | {x.ne['test']:.4f} | {to_context} | "
                f"{to_aggregates} | {_percent(x.recovered)} | {x.shifted_ne:.4f} | "
                f"{_percent(x.shifted_recovered)} | {x.seeds} |"
            )
        out += [
            "\n| model | age of its embeddings | gain over context and item, 95 % | of that at 1 d "
            "| of that at 0 h |",
            "|---|---|---|---|---|",
        ]
        out += [
            f"| {y.model} | {y.age} | {interval_text(y.gain)} | {_percent(y.of_day)} | "
            f"{_percent(y.of_fresh)} |"
            for y in lags
            if y.task == task
        ]
    return "\n".join(out).lstrip() + "\n"


def _percent(value: float) -> str:
    return f"{value:.0%}" if np.isfinite(value) else "-"
