"""Hand-made summaries of what each target sees of its history: counts, extremes and recency, per target.

Everything is computed over *pairs*, a target and an event that it sees, which lie target by target and
oldest first (`models.history.target_pairs`). A pair that a summary does not concern is left out
before it, so that "the 3 newest" are the 3 newest of those that it does.
"""

from __future__ import annotations

import numpy as np


class Segments:
    """Values per pair, reduced to one per target.

    Args:
        of: (P,) int64, each pair's target, ascending.
        targets: T.
    """

    def __init__(self, of: np.ndarray, targets: int) -> None:
        self.of = of
        self.counts = np.bincount(of, minlength=targets)
        self.ends = np.cumsum(self.counts)
        self.newer = self.ends[of] - 1 - np.arange(len(of))  # how many of the target's are newer

    def reduce(self, function: np.ufunc, values: np.ndarray, empty: float) -> np.ndarray:
        """(T,) float32: `function` over each target's values, `empty` where it has none."""
        out = np.full(len(self.counts), empty, np.float32)
        some = self.counts > 0
        if some.any():
            out[some] = function.reduceat(values, (self.ends - self.counts)[some])
        return out

    def newest(self, values: np.ndarray, back: int, empty: float) -> np.ndarray:
        """(T,) float32: the value of the newest pair (`back` 0), of the one before it (1), ..."""
        there = self.counts > back
        out = np.full(len(self.counts), empty, np.float32)
        out[there] = values[self.ends[there] - 1 - back]
        return out

    def within(self, newest: int) -> tuple[np.ndarray, Segments]:
        """Which pairs are among their target's `newest`, and the segments of those alone."""
        keep = self.newer < newest
        return keep, Segments(self.of[keep], len(self.counts))


Columns = dict[str, np.ndarray]


def together(segments: Segments, numbers: np.ndarray, names: tuple[str, ...]) -> Columns:
    """What is known of pairs of items: newest, largest of the 3 newest, largest, sum and mean over the
    history, of each number.

    Args:
        segments: of the P pairs.
        numbers: (P, C) float32, `FeaturePlan.pair_numbers`, which `jobs/training/co_occurrence.py`
            defines.
        names: of the C.
    """
    found: Columns = {}
    keep, recent = segments.within(3)
    for name, number in zip(names, numbers.T, strict=True):
        total = segments.reduce(np.add, number, 0.0)
        found[f"{name}_newest"] = segments.newest(number, 0, np.nan)
        found[f"{name}_max3"] = recent.reduce(np.maximum, number[keep], np.nan)
        found[f"{name}_max"] = segments.reduce(np.maximum, number, np.nan)
        found[f"{name}_sum"] = total
        found[f"{name}_mean"] = total / np.maximum(segments.counts, 1)
    return found


def distances(segments: Segments, signed: np.ndarray) -> Columns:
    """How far apart a candidate's id and those of the events are, which says how unlike they are where
    ids are ordered: to the newest (signed too), least of the 5 newest, least, second least.

    Args:
        signed: (P,) int64, candidate less event.
    """
    far = np.abs(signed).astype(np.float32)
    keep, recent = segments.within(5)
    order = np.lexsort((far, segments.of))
    nearest = far[order]
    second = np.full(len(segments.counts), np.nan, np.float32)
    two = segments.counts > 1
    second[two] = nearest[(segments.ends - segments.counts)[two] + 1]
    return {
        "distance_newest": segments.newest(far, 0, np.nan),
        "distance_newest_signed": segments.newest(signed.astype(np.float32), 0, np.nan),
        "distance_min5": recent.reduce(np.minimum, far[keep], np.nan),
        "distance_min": segments.reduce(np.minimum, far, np.nan),
        "distance_second": second,
        "distance_within_256": segments.reduce(np.add, (far < 256).astype(np.float32), 0.0),
    }


def recency(segments: Segments, minutes: np.ndarray) -> Columns:
    """Minutes since the newest events, and how many there were lately.

    Args:
        minutes: (P,) float32, age of each event as its target sees it.
    """
    found = {
        f"minutes_{back}": segments.newest(minutes, back, np.nan) for back in (0, 1, 2, 4, 9, 19)
    }
    for within in (30, 120, 1440):
        recent = (minutes < within).astype(np.float32)
        found[f"events_{within}m"] = segments.reduce(np.add, recent, 0.0)
    return found


def last_ids(segments: Segments, ids: dict[str, np.ndarray], backs: dict[str, int]) -> Columns:
    """Ids of the newest events, -1 where there is none.

    Args:
        ids: attribute -> its values of the P pairs.
        backs: attribute -> of how many of the newest; default 1.
    """
    return {
        f"last_{name}_{back}": segments.newest(values, back, -1.0)
        for name, values in ids.items()
        for back in range(backs.get(name, 1))
    }
