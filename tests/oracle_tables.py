"""The feature tables as the oracle has them; see `oracle.py`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from feature_store.days import HOUR_US, add_days, micros
from feature_store.spec import (
    Aggregate,
    Dataset,
    DenseFeature,
    EventLabel,
    EventStream,
    GivenLabel,
    SparseFeature,
    Task,
    UserAttribute,
)
from tests.oracle import ByDay, Row, bounds, f32, no_id, packed

State = dict[Any, dict[str, list[Row]]]  # user -> stream -> the last max_events, in timeline order

SEEN_DAYS = 30
NOT_ASKED = -1

# -- sequences -------------------------------------------------------------------------------------


def timeline(rows: Iterable[Row]) -> list[Row]:
    """Events of one stream in order of availability, ties by id."""
    return sorted(rows, key=lambda e: (e["available_time"], e["event_id"]))


def of_user(rows: Iterable[Row], user: Any) -> list[Row]:
    """The rows of one user."""
    return [r for r in rows if r["user_id"] == user]


def first_deliveries(user_state: dict[str, list[Row]], rows: list[Row]) -> list[Row]:
    """A user's events of a day, without those that their state of the evening before holds."""
    held = {e["event_id"] for es in user_state.values() for e in es}
    return timeline(e for e in rows if e["event_id"] not in held)


def state(dataset: Dataset, days: ByDay, ds: str) -> State:
    """Every user's last `max_events` of each stream at the end of `ds`, from all days until then."""
    found: State = {}
    for day in sorted(d for d in days if d <= ds):
        for user in {e["user_id"] for e in days[day]}:
            before = found.get(user, {s.name: [] for s in dataset.streams})
            new = first_deliveries(before, of_user(days[day], user))
            found[user] = {
                s.name: [*before[s.name], *(e for e in new if e["stream"] == s.name)][
                    -s.max_events :
                ]
                for s in dataset.streams
            }
    return found


def history(dataset: Dataset, by_stream: dict[str, list[Row]], *columns: str) -> Row:
    """The `history__` columns of events in timeline order."""
    found: Row = {}
    for stream in dataset.streams:
        for column in columns:
            found[f"history__{stream.name}__{column}"] = [e[column] for e in by_stream[stream.name]]
        for a in stream.attributes:
            values = [packed(a, e[a.name]) for e in by_stream[stream.name]]
            found[f"history__{stream.name}__{a.name}"] = values
    return found


def sequences(dataset: Dataset, days: ByDay, ds: str, *, base: bool) -> list[Row]:
    """`sequences(ds)`: the users that `ds` touched; on a base day all of them."""
    touched = {e["user_id"] for e in days.get(ds, ())}
    return [
        {
            "user_id": user,
            **history(dataset, held, "event_id", "event_time", "available_time"),
            "ds": ds,
        }
        for user, held in state(dataset, days, ds).items()
        if base or user in touched
    ]


# -- aggregates ------------------------------------------------------------------------------------


def in_window(rows: Iterable[Row], stream: str, cutoff: int, window_days: int) -> list[Row]:
    """Events of a stream in the `window_days` before the cutoff, in timeline order."""
    since = cutoff - window_days * 24 * HOUR_US
    return timeline(
        e for e in rows if e["stream"] == stream and since <= e["available_time"] < cutoff
    )


def user_attribute(dataset: Dataset, f: UserAttribute, rows: list[Row], cutoff: int) -> Row:
    attribute = dataset.stream(f.stream).attribute(f.attribute)
    known = [
        e[f.attribute]
        for e in in_window(rows, f.stream, cutoff, dataset.window_days)
        if e[f.attribute] is not None
    ]
    return {f"user__{f.name}": packed(attribute, known[-1] if known else None)}


def sparse(f: SparseFeature, rows: list[Row], cutoff: int) -> Row:
    held = [
        e for e in in_window(rows, f.stream, cutoff, f.window_days) if e[f.attribute] is not None
    ]
    newest = {e[f.attribute]: e["available_time"] for e in held}  # the last one stays
    count = Counter(e[f.attribute] for e in held)
    rank = count if f.scored else newest
    ids = sorted(rank, key=lambda i: (-rank[i], i))[: f.max_ids]
    found: Row = {f"sparse__{f.name}": ids}
    if f.scored:
        found[f"sparse__{f.name}__scores"] = [float(count[i]) for i in ids]
    return found


def dense(f: DenseFeature, rows: list[Row], cutoff: int) -> Row:
    held = in_window(rows, f.stream, cutoff, f.window_days)
    if f.aggregate is Aggregate.COUNT:
        value = float(len(held))
    elif f.aggregate is Aggregate.SUM:
        value = math.fsum(e[f.attribute] for e in held if e[f.attribute] is not None)
    elif f.aggregate is Aggregate.RATE:
        per = in_window(rows, str(f.per), cutoff, f.window_days)
        value = len(held) / len(per) if per else 0.0
    elif held:
        value = (cutoff - held[-1]["available_time"]) / HOUR_US
    else:
        value = float(f.window_days * 24)
    return {f"dense__{f.name}": f32(value)}


def user_features(dataset: Dataset, rows: list[Row], cutoff: int) -> Row:
    """The nightly features of a user with these events."""
    found: Row = {}
    for ua in dataset.user_attributes:
        found |= user_attribute(dataset, ua, rows, cutoff)
    for sf in dataset.sparse_features:
        found |= sparse(sf, rows, cutoff)
    for df in dataset.dense_features:
        found |= dense(df, rows, cutoff)
    return found


def no_user_features(dataset: Dataset) -> Row:
    """What stands for the features of a user without aggregates."""
    found: Row = {}
    for ua in dataset.user_attributes:
        attribute = dataset.stream(ua.stream).attribute(ua.attribute)
        found[f"user__{ua.name}"] = packed(attribute, None)
    for sf in dataset.sparse_features:
        found[f"sparse__{sf.name}"] = []
        if sf.scored:
            found[f"sparse__{sf.name}__scores"] = []
    return found | {f"dense__{df.name}": math.nan for df in dataset.dense_features}


def aggregates(dataset: Dataset, days: ByDay, ds: str) -> list[Row]:
    """`aggregates(ds)`: users with an event in the longest window. What came twice counts twice."""
    cutoff = bounds(dataset, ds)[1] - micros(dataset.serve_delay)
    rows = [e for day in days.values() for e in day]
    found = []
    for user in {e["user_id"] for e in rows}:
        theirs = of_user(rows, user)
        if any(in_window(theirs, s.name, cutoff, dataset.window_days) for s in dataset.streams):
            found.append({"user_id": user, **user_features(dataset, theirs, cutoff), "ds": ds})
    return found


# -- item_aggregates -------------------------------------------------------------------------------


def item_aggregates(dataset: Dataset, days: ByDay, ds: str) -> list[Row]:
    """`item_aggregates(ds)`: what is counted about each item by the hour of availability."""
    declared = dataset.item_features
    assert declared is not None
    hours: dict[tuple[Any, int], Counter[str]] = defaultdict(Counter)
    for stream, attribute in declared.streams:
        for e in days[ds]:
            if e["stream"] == stream and e[attribute] is not None:
                hours[e[attribute], e["available_time"] // HOUR_US][stream] += 1
    pairs = together(dataset, days, ds)
    found = []
    for (item, hour), counts in hours.items():
        row: Row = {"item_id": item, "hour": hour}
        row |= {f"events__{s}": counts[s] for s, _ in declared.streams}
        for column, by_hour in pairs.items():
            values = sorted(by_hour[item, hour].items())
            row[column] = [v for v, _ in values]
            row[f"{column}__counts"] = [n for _, n in values]
        found.append({**row, "first_seen": first_seen(dataset, days, ds, item), "ds": ds})
    return found


def first_seen(dataset: Dataset, days: ByDay, ds: str, item: Any) -> int:
    """When an item that is seen on `ds` was first seen, gaps of up to `SEEN_DAYS` days included."""
    assert dataset.item_features is not None
    times = [
        e["available_time"]
        for day, rows in days.items()
        if add_days(ds, -SEEN_DAYS) <= day <= ds
        for e in rows
        for stream, attribute in dataset.item_features.streams
        if e["stream"] == stream and e[attribute] == item
    ]
    return min(times)


def together(
    dataset: Dataset, days: ByDay, ds: str
) -> dict[str, dict[tuple[Any, int], Counter[Any]]]:
    """By column and (item, hour): with which values the item's events of `ds` come, how often."""
    declared = dataset.co_occurrence
    if declared is None:
        return {}
    columns: dict[str, dict[tuple[Any, int], Counter[Any]]] = {}
    for name in declared.beside:
        columns[f"beside__{name}"] = defaultdict(Counter)
    for name in declared.before:
        for lag in declared.lags:
            columns[f"before_{lag}__{name}"] = defaultdict(Counter)
    stream = dataset.stream(declared.stream)
    yesterday = state(dataset, days, add_days(ds, -1))
    for user in {e["user_id"] for e in days[ds]}:
        held = yesterday.get(user, {s.name: [] for s in dataset.streams})
        new = first_deliveries(held, of_user(days[ds], user))
        line = [*held[stream.name], *(e for e in new if e["stream"] == stream.name)]
        for at in range(len(held[stream.name]), len(line)):
            item = line[at][declared.attribute]
            if item is None:
                continue
            key = item, line[at]["available_time"] // HOUR_US
            for name in declared.beside:
                _count(columns[f"beside__{name}"][key], stream, name, item, line[at : at + 1])
            for name in declared.before:
                for lag in declared.lags:
                    earlier = line[max(at - lag, 0) : at]
                    _count(columns[f"before_{lag}__{name}"][key], stream, name, item, earlier)
    return columns


def _count(
    counts: Counter[Any], stream: EventStream, name: str, item: Any, rows: list[Row]
) -> None:
    """Count the values of `name`, of which the item itself is none."""
    is_item = stream.attribute(name).vocabulary == "item"
    values = [e[name] for e in rows]
    counts.update(v for v in values if v is not None and not (is_item and v == item))


# -- examples --------------------------------------------------------------------------------------


def item_features(dataset: Dataset, days: ByDay, item: Any, as_of: int) -> Row:
    """The `targets__item__` values of one target, from the hours that closed before its `as_of`."""
    declared = dataset.item_features
    if declared is None:
        return {}
    hour = as_of // HOUR_US  # the one that is not over yet
    seen: list[int] = []
    found: Row = {}
    for stream, attribute in declared.streams:
        events_on = [
            (e["available_time"], e[attribute])
            for rows in days.values()
            for e in rows
            if e["stream"] == stream
            and e[attribute] is not None
            and e["available_time"] // HOUR_US < hour
        ]
        seen += [t for t, i in events_on if i == item]
        for window in declared.windows_hours:
            recent = [i for t, i in events_on if t // HOUR_US >= hour - window]
            ours = recent.count(item)
            share = ours / len(recent) if recent else 0.0
            found[f"{stream}_{window}h"] = f32(math.log1p(ours))
            found[f"{stream}_share_{window}h"] = f32(math.log1p(1e4 * share))
    age = f32(math.log1p((as_of - min(seen)) / HOUR_US)) if seen else -1.0
    return {**found, "age_h": age}


def user_day(
    dataset: Dataset, held: dict[str, list[Row]], new: list[Row], targets: list[Row]
) -> list[tuple[int, list[Row], list[Row], dict[str, list[Row]]]]:
    """The parts of a user-day that have targets: number, events, targets, and the base before it."""
    kinds = [t.name for t in dataset.targets]
    streams = [s.name for s in dataset.streams]
    line = [((e["available_time"], 1, streams.index(e["stream"]), e["event_id"]), e) for e in new]
    line += [((t["as_of"], 0, t["target_id"], kinds.index(t["target"])), t) for t in targets]
    line.sort(key=lambda pair: pair[0])
    rows = [row for _, row in line]
    found = []
    for part in range(-(-len(rows) // dataset.max_part_rows)):
        first = part * dataset.max_part_rows
        mine = rows[first : first + dataset.max_part_rows]
        earlier = [r for r in rows[:first] if "stream" in r]
        base = {
            s.name: [*held[s.name], *(e for e in earlier if e["stream"] == s.name)][-s.max_events :]
            for s in dataset.streams
        }
        own = [r for r in mine if "stream" in r], [r for r in mine if "stream" not in r]
        if own[1]:
            found.append((part, *own, base))
    return found


def examples(dataset: Dataset, days: ByDay, shown: ByDay, ds: str) -> list[Row]:
    """`examples(ds)`: one row per part of a user-day, its history once and its targets."""
    kinds = [t.name for t in dataset.targets]
    yesterday = state(dataset, days, add_days(ds, -1))
    served = {}
    if add_days(ds, -1) in days:
        served = {r["user_id"]: r for r in aggregates(dataset, days, add_days(ds, -1))}
    found = []
    for user in {t["user_id"] for t in shown[ds]}:
        held = yesterday.get(user, {s.name: [] for s in dataset.streams})
        new = first_deliveries(held, of_user(days[ds], user))
        nightly = {
            **no_user_features(dataset),
            **served.get(user, {}),
            "has_aggregates": int(user in served),
        }
        for part, own, targets, base in user_day(dataset, held, new, of_user(shown[ds], user)):
            by_stream = {
                s.name: [*base[s.name], *(e for e in own if e["stream"] == s.name)]
                for s in dataset.streams
            }
            row = {
                **nightly,
                "user_id": user,
                "part": part,
                **history(dataset, by_stream, "event_time", "available_time"),
                "targets__target_id": [t["target_id"] for t in targets],
                "targets__target": [kinds.index(t["target"]) for t in targets],
                "targets__time": [t["time"] for t in targets],
                "targets__as_of": [t["as_of"] for t in targets],
                "targets__item_id": [
                    no_id(dataset.item_id_type) if t["item_id"] is None else t["item_id"]
                    for t in targets
                ],
                "ds": ds,
            }
            for c in dataset.context_features:
                row[f"targets__context__{c.name}"] = [packed(c, t[c.name]) for t in targets]
            for s in dataset.streams:
                row[f"targets__history_end__{s.name}"] = [
                    sum(e["available_time"] < t["as_of"] for e in by_stream[s.name])
                    for t in targets
                ]
            counted = [item_features(dataset, days, t["item_id"], t["as_of"]) for t in targets]
            for name in dataset.item_features.names if dataset.item_features else ():
                row[f"targets__item__{name}"] = [c[name] for c in counted]
            found.append(row)
    return found


# -- labels ----------------------------------------------------------------------------------------


def answer(dataset: Dataset, task: Task, days: ByDay, target: Row, ds: str) -> int:
    """1 or 0 as known at the end of `ds`, or that the task is not asked of this target."""
    if target["target"] not in task.targets:
        return NOT_ASKED
    if task.domain is not None and target[str(dataset.domain)] != task.domain:
        return NOT_ASKED
    if isinstance(task.label, GivenLabel):
        given = target[f"label__{task.label.column}"]
        return NOT_ASKED if given is None else int(given)
    return int(any(_answers(task.label, target, e) for d in days if d <= ds for e in days[d]))


def _answers(label: EventLabel, target: Row, e: Row) -> bool:
    return (
        e["stream"] == label.stream
        and e["user_id"] == target["user_id"]
        and target["time"] < e["event_time"] <= target["time"] + micros(label.within)
        and all(
            target[ours] is not None and target[ours] == e[theirs] for ours, theirs in label.match
        )
    )


def labels(dataset: Dataset, days: ByDay, shown: ByDay, ds: str) -> list[Row]:
    """`labels(ds)`: of what was shown `matures_after` days before, what every task answers."""
    kinds = [t.name for t in dataset.targets]
    found = []
    for task in dataset.tasks:
        day = add_days(ds, -task.matures_after)
        if day not in shown:
            continue
        by_key = {(t["user_id"], t["target"], t["target_id"]): t for t in shown[day]}
        for row in examples(dataset, days, shown, day):
            answers = [
                answer(dataset, task, days, by_key[row["user_id"], kinds[kind], number], ds)
                for kind, number in zip(
                    row["targets__target"], row["targets__target_id"], strict=True
                )
            ]
            if any(a != NOT_ASKED for a in answers):
                found.append(
                    {
                        "user_id": row["user_id"],
                        "shown_ds": day,
                        "part": row["part"],
                        "task": task.name,
                        "labels": answers,
                        "ds": ds,
                    }
                )
    return found


def feature_tables(
    dataset: Dataset, days: ByDay, shown: ByDay, ds: str, *, base: bool
) -> dict[str, list[Row]]:
    """The tables of one day, from `events` and `impressions` of all days, later ones included."""
    until = {d: rows for d, rows in days.items() if d <= ds}
    found = {
        "sequences": sequences(dataset, until, ds, base=base),
        "aggregates": aggregates(dataset, until, ds),
        "examples": examples(dataset, until, shown, ds),
        "labels": labels(dataset, until, shown, ds),
    }
    if dataset.item_features is not None:
        found["item_aggregates"] = item_aggregates(dataset, until, ds)
    return found
