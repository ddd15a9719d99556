"""The comparison as a table: NE, AUC and the difference to the best peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.results import PARTS, Result, by_model, difference, interval_text
from models.metrics import auc, normalized_entropy


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model and task; means over its seeds.

    Args:
        ne, auc: by part.
        spread: largest less smallest NE on the test days over the seeds.
        difference: NE on the test days less the best peer's, with its 95 % interval, as
            `results.difference` pairs their seeds; "" for the best peer itself.
        seconds: of one training.
    """

    task: str
    model: str
    peer: bool
    seeds: int
    ne: dict[str, float]
    auc: dict[str, float]
    spread: float
    difference: str
    seconds: float
    command: str


def lines(
    results: Sequence[Result], peers: Sequence[str], base_rates: Mapping[str, float]
) -> list[Line]:
    """By task, best first. The best peer is the one of the lowest NE on the validation day.

    Raises:
        DataError: two models were not tested on the same labels.
    """
    found = []
    for task, base_rate in base_rates.items():
        models = by_model(r for r in results if task in r.tasks)
        scores = {m: _scores(of, task, base_rate) for m, of in models.items()}
        known = [m for m in models if m in peers]
        best = min(known, key=lambda m: float(np.mean(scores[m]["validation"][0])), default=None)
        task_lines = []
        for model, of in models.items():
            ne = {p: float(np.mean(scores[model][p][0])) for p in PARTS}
            against = ""
            if best is not None and model != best:
                rates = {task: base_rate}
                against = interval_text(difference(of, "test", models[best], "test", rates))
            task_lines.append(
                Line(
                    task=task, model=model, peer=model in peers, seeds=len(of), ne=ne,
                    auc={p: float(np.mean(scores[model][p][1])) for p in PARTS},
                    spread=float(np.ptp(scores[model]["test"][0])), difference=against,
                    seconds=float(np.mean([r.facts["seconds"] for r in of])),
                    command=of[0].facts["command"],
                )
            )  # fmt: skip
        found += sorted(task_lines, key=lambda line: line.ne["test"])
    return found


def _scores(
    results: Sequence[Result], task: str, base_rate: float
) -> dict[str, tuple[list[float], list[float]]]:
    """By part, NE and AUC of each seed."""
    found: dict[str, tuple[list[float], list[float]]] = {p: ([], []) for p in PARTS}
    for result in results:
        for part in PARTS:
            mine = result.predictions.of(task, part)
            found[part][0].append(normalized_entropy(mine.label, mine.prediction, base_rate))
            found[part][1].append(auc(mine.label, mine.prediction))
    return found


def markdown(found: Sequence[Line]) -> str:
    """The lines as tables, one per task."""
    out = []
    for task in dict.fromkeys(line.task for line in found):
        out += [
            f"\n### {task}\n",
            "| model | NE validation | NE test | AUC test | NE to the best peer, 95 % | seeds | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for line in (x for x in found if x.task == task):
            spread = f" (±{line.spread / 2:.4f})" if line.seeds > 1 else ""
            out.append(
                f"| {line.model} | {line.ne['validation']:.4f} | {line.ne['test']:.4f}{spread} | "
                f"{line.auc['test']:.4f} | {line.difference} | {line.seeds} | {line.seconds:.0f} |"
            )
    commands = dict.fromkeys((line.model, line.command) for line in found)
    out += ["", *(f"{model}: `{command}`  " for model, command in commands)]
    return "\n".join(out).lstrip() + "\n"
