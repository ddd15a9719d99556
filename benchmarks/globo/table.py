"""The comparison as a table: NE, what of it is calibration, AUC and the difference to LightGBM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks.globo.lightgbm_peer import NAME
from benchmarks.globo.results import PARTS, Result, by_model, by_seed, difference, interval_text
from models.metrics import auc, calibration, logits, normalized_entropy


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model and task; means over its seeds.

    Args:
        ne, auc: by part.
        calibration: sum of predictions over sum of labels, of the test days.
        recalibrated: NE of `recalibrated` predictions for the test days.
        spread: largest less smallest NE on the test days over the seeds.
        difference: NE on the test days less LightGBM's, with its 95 % interval, as
            `results.difference` pairs their seeds; "" where there is none.
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


def lines(results: Sequence[Result], base_rates: Mapping[str, float]) -> list[Line]:
    """By task, best first.

    Raises:
        DataError: two models were not tested on the same labels.
    """
    found = []
    for task, base_rate in base_rates.items():
        models = by_model(r for r in results if task in r.tasks)
        peer = models.get(NAME)
        of_task = [_line(task, of, peer, base_rate) for of in models.values()]
        found += sorted(of_task, key=lambda line: line.ne["test"])
    return found


def _line(task: str, of: Sequence[Result], peer: Sequence[Result] | None, base_rate: float) -> Line:
    def ne(labels: np.ndarray, predictions: np.ndarray) -> float:
        return normalized_entropy(labels, predictions, base_rate)

    def ne_recalibrated(labels: np.ndarray, predictions: np.ndarray) -> float:
        return ne(labels, recalibrated(labels, predictions))

    against = ""
    if peer is not None and peer is not of:
        against = interval_text(difference(of, peer, task, base_rate))
    return Line(
        task=task, model=of[0].model, peer=of is peer, seeds=len(of),
        ne={part: float(by_seed(of, task, part, ne).mean()) for part in PARTS},
        auc={part: float(by_seed(of, task, part, auc).mean()) for part in PARTS},
        calibration=float(by_seed(of, task, "test", calibration).mean()),
        recalibrated=float(by_seed(of, task, "test", ne_recalibrated).mean()),
        spread=float(np.ptp(by_seed(of, task, "test", ne))),
        difference=against,
        seconds=float(np.mean([r.facts["seconds"] for r in of])),
        command=of[0].facts["command"],
    )  # fmt: skip


def markdown(found: Sequence[Line]) -> str:
    """The lines as tables, one per task."""
    out = []
    for task in dict.fromkeys(line.task for line in found):
        out += [
            f"\n### {task}\n",
            "| model | NE validation | NE test | less LightGBM, 95 % | predicted / true | NE recalibrated "
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
