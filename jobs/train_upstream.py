"""One day of one upstream model: evaluate, train, gate.

*Evaluate*: the labels that became final on `ds` judge the snapshot that was live when their targets
were shown, before anything is trained on them (progressive validation). *Train*: from the champion
of the day before, one pass over the same labels without the held-out users; and over those of the
days before whose candidates were rejected, so that no day is lost to the model. *Gate*: the candidate
against that champion on the held-out users; where it is rejected, that champion stays the champion
of `ds`. Where they are too few the candidate is not judged, and becomes champion. Running a day again
gives the same snapshot and the same champion.
"""

from __future__ import annotations

from jobs.context import JobContext, main
from jobs.text import number
from jobs.training import presets
from jobs.training.checkpoints import Checkpoints
from jobs.training.loader import labelled_day
from jobs.training.parent import parent_of, untrained
from jobs.training.results import UpstreamResult
from jobs.training.upstream_day import UpstreamDay
from jobs.training.upstream_log import log_day


def run(context: JobContext) -> None:
    """Evaluate, train and gate `context.model` on `context.ds`.

    Raises:
        MissingPartitionError: labels or examples of the day have not been written, or an earlier day was
            not trained on.
        StalePartitionError: these tables, or what the day before was trained on, are not current.
        QualityError: the first candidate diverged, and there is no champion that could stay.
    """
    model, dataset, ds = context.require_model(), context.dataset, context.ds
    chosen = presets.preset(dataset, model)
    root = context.settings.snapshot_dir(dataset.name, model, ds).parent
    parent = parent_of(context.lake, Checkpoints(root), ds)
    missed = untrained(context.lake, parent, ds)
    lost = missed[: -chosen.training.catch_up_days or None]
    day = labelled_day(context.lake, dataset, ds, also=missed[len(lost) :])
    result = UpstreamDay(
        context=context, model=model, preset=chosen, day=day, lost=tuple(lost)
    ).run()
    log_day(context, model=model, preset=chosen, day=day, result=result)
    print(summary(result), flush=True)


def summary(result: UpstreamResult) -> str:
    """One line for the log."""
    parts = [f"{result.model} {result.ds}"]
    for task, found in result.evaluation.items():
        if found.why_not:
            parts.append(f"{task} no NE ({found.why_not})")
        else:
            parts.append(f"{task} NE {number(found.ne)} AUC {number(found.auc, 3)}")
    parts += [f"{ds} is not evaluated ({why})" for ds, why in result.not_evaluated.items()]
    parts.append(f"{result.training.targets} targets in {result.training.seconds:.1f} s")
    if len(result.trained_on) > 1:
        parts.append(f"labels of {', '.join(result.trained_on)}, as no champion knew them")
    if result.lost:
        parts.append(f"labels of {', '.join(result.lost)} are lost to the model")
    reason = f": {result.gate.reason}" if result.gate.reason else ""
    parts.append(f"champion {result.champion} (candidate {result.gate.verdict}{reason})")
    return ", ".join(parts)


if __name__ == "__main__":
    main("train_upstream")
