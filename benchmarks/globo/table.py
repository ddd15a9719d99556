"""The comparison as a table: NE, what of it is calibration, AUC and the difference to the best peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks.results import PARTS, Result, by_model, difference, interval_text
from models.metrics import auc, calibration, logits, normalized_entropy


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model and task; means over its seeds.

    Args:
        ne, auc: by part.
        calibration: sum of predictions over sum of labels, of the test days.
        recalibrated: NE of `recalibrated` predictions for the test days.
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
    calibration: float
    recalibrated: float
    spread: float
    difference: str
    seconds: float
    command: str


def recalibrated(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Predictions with the intercept and slope of their logits fitted to these very labels (Platt, 1999).

    No model could have had them in advance: they tell what its ranking is worth from what its calibration
    costs.
    """
    x = logits(predictions)[:, None]
    return LogisticRegression(C=np.inf).fit(x, labels).predict_proba(x)[:, 1]


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
        scores = {m: [_scores(r, task, base_rate) for r in of] for m, of in models.items()}
        means = {
            m: {name: float(np.mean([x[name] for x in of])) for name in of[0]}
            for m, of in scores.items()
        }
        known = [m for m in models if m in peers]
        best = min(known, key=lambda m: means[m]["ne validation"], default=None)
        task_lines = []
        for model, of in models.items():
            against = ""
            if best is not None and model != best:
                rates = {task: base_rate}
                against = interval_text(difference(of, "test", models[best], "test", rates))
            task_lines.append(
                Line(
                    task=task, model=model, peer=model in peers, seeds=len(of),
                    ne={part: means[model][f"ne {part}"] for part in PARTS},
                    auc={part: means[model][f"auc {part}"] for part in PARTS},
                    calibration=means[model]["calibration"],
                    recalibrated=means[model]["recalibrated"],
                    spread=float(np.ptp([x["ne test"] for x in scores[model]])),
                    difference=against,
                    seconds=float(np.mean([r.facts["seconds"] for r in of])),
                    command=of[0].facts["command"],
                )
            )  # fmt: skip
        found += sorted(task_lines, key=lambda line: line.ne["test"])
    return found


def _scores(result: Result, task: str, base_rate: float) -> dict[str, float]:
    """NE and AUC by part; calibration and NE recalibrated, of the test."""
    found = {}
    for part in PARTS:
        mine = result.predictions.of(task, part)
        found[f"ne {part}"] = normalized_entropy(mine.label, mine.prediction, base_rate)
        found[f"auc {part}"] = auc(mine.label, mine.prediction)
    mine = result.predictions.of(task, "test")
    found["calibration"] = calibration(mine.label, mine.prediction)
    again = recalibrated(mine.label, mine.prediction)
    return found | {"recalibrated": normalized_entropy(mine.label, again, base_rate)}


def markdown(found: Sequence[Line]) -> str:
    """The lines as tables, one per task."""
    out = []
    for task in dict.fromkeys(line.task for line in found):
        out += [
            f"\n### {task}\n",
            "| model | NE validation | NE test | NE to the best peer, 95 % | predicted / true | NE recalibrated "
            "| AUC test | seeds | seconds |",
            "|---" * 9 + "|",
        ]
        for line in (x for x in found if x.task == task):
            spread = f" (±{line.spread / 2:.4f})" if line.seeds > 1 else ""
            out.append(
                f"| {line.model} | {line.ne['validation']:.4f} | {line.ne['test']:.4f}{spread} | "
                f"{line.difference} | {line.calibration:.3f} | {line.recalibrated:.4f} | "
                f"{line.auc['test']:.4f} | {line.seeds} | {line.seconds:.0f} |"
            )
    commands = dict.fromkeys((line.model, line.command) for line in found)
    out += ["", *(f"{model}: `{command}`  " for model, command in commands)]
    return "\n".join(out).lstrip() + "\n"
