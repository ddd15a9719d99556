"""The feature tables computed naively, one target and one window at a time, in plain Python.

What the jobs do in windows and groupings is done here by going through lists; nothing is shared
with them but the spec and the days.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

from feature_store.columns import MISSING_ID, NO_LABEL, label_column, missing_value
from feature_store.days import DAY_US, HOUR_US, day_range, end_us, micros, shift
from feature_store.spec import Aggregate, Attribute, Dataset, EventLabel, Kind
from tests.tiny import Row

State = dict[object, dict[str, list[Row]]]


def f32(value: float) -> float:
    """`value` rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def bits(value: object) -> object:
    """`value` with every float replaced by its float32 bits, so that NaN equals NaN."""
    if isinstance(value, float):
        return struct.pack("<f", value) if not math.isnan(value) else "nan"
    if isinstance(value, list):
        return [bits(v) for v in value]
    return value


def keyed(rows: Iterable[Row], *key: str) -> dict[tuple, Row]:
    """Rows by their key, floats as bits; two rows of one key are an error."""
    result: dict[tuple, Row] = {}
    for row in rows:
        name = tuple(row[k] for k in key)
        assert name not in result, f"two rows of {name}"
        result[name] = {k: bits(v) for k, v in row.items()}
    return result


def timeline(events: Iterable[Row]) -> list[Row]:
    """Events of one stream in order of availability."""
    return sorted(events, key=lambda e: (e["available_time"], e["event_id"]))


def filled(row: Row, attribute: Attribute) -> object:
    """The attribute's value in a packed array."""
    value = row[attribute.name]
    if value is None:
        return missing_value(attribute)
    return [f32(v) for v in value] if attribute.kind is Kind.VECTOR else value


def states(events: dict[str, list[Row]], dataset: Dataset, last_day: str) -> State:
    """Each user's last events of each stream at the end of `last_day`, going through the days."""
    state: State = {}
    for day in sorted(d for d in events if d <= last_day):
        for user in {e["user_id"] for e in events[day]}:
            streams = state.setdefault(user, {s.name: [] for s in dataset.streams})
            for stream in dataset.streams:
                fresh = unseen(events[day], user, stream.name, streams[stream.name])
                streams[stream.name] = (streams[stream.name] + fresh)[-stream.max_events :]
    return state


def unseen(day: list[Row], user: object, stream: str, held: list[Row]) -> list[Row]:
    """A day's events of one user and stream that are not `held` already, in order."""
    ids = {e["event_id"] for e in held}
    ours = (e for e in day if e["user_id"] == user and e["stream"] == stream)
    return [e for e in timeline(ours) if e["event_id"] not in ids]


def history(events: list[Row], dataset: Dataset, stream: str, *, event_id: bool) -> Row:
    """Arrays of one stream, by column name."""
    names = (
        ("event_id", "event_time", "available_time")
        if event_id
        else ("event_time", "available_time")
    )
    arrays: Row = {f"history__{stream}__{n}": [e[n] for e in events] for n in names}
    for a in dataset.stream(stream).attributes:
        arrays[f"history__{stream}__{a.name}"] = [filled(e, a) for e in events]
    return arrays


def sequences(events: dict[str, list[Row]], dataset: Dataset, ds: str, *, base: bool) -> list[Row]:
    """The partition `ds` of `sequences`."""
    touched = {e["user_id"] for e in events.get(ds, ())}
    rows = []
    for user, streams in states(events, dataset, ds).items():
        if base or user in touched:
            row: Row = {"user_id": user, "ds": ds}
            for stream, held in streams.items():
                row |= history(held, dataset, stream, event_id=True)
            rows.append(row)
    return rows


def is_id(value: object) -> bool:
    """Whether an id is one."""
    return value is not None and value != MISSING_ID and value != ""


def aggregates(events: dict[str, list[Row]], dataset: Dataset, ds: str) -> list[Row]:
    """The partition `ds` of `aggregates`."""
    cutoff = end_us(ds, dataset.utc_offset) - micros(dataset.serve_delay)
    everything = [e for d in events.values() for e in d if e["available_time"] < cutoff]

    def window(user: object, stream: str, days: int) -> list[Row]:
        start = cutoff - days * DAY_US
        ours = (e for e in everything if e["user_id"] == user and e["stream"] == stream)
        return timeline(e for e in ours if e["available_time"] >= start)

    start = cutoff - dataset.window_days * DAY_US
    rows = []
    for user in {e["user_id"] for e in everything if e["available_time"] >= start}:
        row: Row = {"user_id": user, "ds": ds}
        for ua in dataset.user_attributes:
            attribute = dataset.stream(ua.stream).attribute(ua.attribute)
            known = [
                e for e in window(user, ua.stream, dataset.window_days) if is_id(e[ua.attribute])
            ]
            row[f"user__{ua.name}"] = (
                filled(known[-1], attribute) if known else missing_value(attribute)
            )
        for sf in dataset.sparse_features:
            last, count = {}, {}
            for e in window(user, sf.stream, sf.window_days):
                if is_id(e[sf.attribute]):
                    last[e[sf.attribute]] = e["available_time"]
                    count[e[sf.attribute]] = count.get(e[sf.attribute], 0) + 1
            rank = count if sf.scored else last
            best = sorted(rank, key=lambda i, r=rank: (-r[i], i))[: sf.max_ids]
            row[f"sparse__{sf.name}"] = best
            if sf.scored:
                row[f"sparse__{sf.name}__scores"] = [float(count[i]) for i in best]
        for df in dataset.dense_features:
            found = window(user, df.stream, df.window_days)
            if df.aggregate is Aggregate.SUM:
                numbers = [e[df.attribute] for e in found if e[df.attribute] is not None]
                value = sum(sorted(f32(n) for n in numbers if not math.isnan(n)))
            elif df.aggregate is Aggregate.RATE:
                per = len(window(user, df.per, df.window_days))
                value = len(found) / per if per else 0.0
            elif df.aggregate is Aggregate.RECENCY:
                newest = found[-1]["available_time"] if found else cutoff - df.window_days * DAY_US
                value = (cutoff - newest) / HOUR_US
            else:
                value = len(found)
            row[f"dense__{df.name}"] = f32(float(value))
        rows.append(row)
    return rows


def item_features(events: dict[str, list[Row]], dataset: Dataset, item: object, as_of: int) -> Row:
    """The item features of one target."""
    hour = as_of // HOUR_US
    closed = [e for d in events.values() for e in d if e["available_time"] // HOUR_US < hour]
    features: Row = {}
    seen: list[int] = []
    for stream, attribute in dataset.item_features.streams:
        items = [e for e in closed if e["stream"] == stream and is_id(e[attribute])]
        ours = [e for e in items if e[attribute] == item and is_id(item)]
        seen += [e["available_time"] for e in ours]
        for w in dataset.item_features.windows_hours:
            total = sum(e["available_time"] // HOUR_US >= hour - w for e in items)
            count = sum(e["available_time"] // HOUR_US >= hour - w for e in ours)
            features[f"targets__item__{stream}_{w}h"] = f32(math.log1p(count))
            features[f"targets__item__{stream}_share_{w}h"] = f32(
                math.log1p(1e4 * count / max(total, 1))
            )
    age = math.log1p((as_of - min(seen)) / HOUR_US) if seen else -1.0
    features["targets__item__age_h"] = f32(age)
    return features


def item_aggregates(events: dict[str, list[Row]], dataset: Dataset, ds: str) -> list[Row]:
    """The partition `ds` of `item_aggregates` (all of its days within what an item is remembered)."""
    rows: dict[tuple, Row] = {}
    seen: dict[object, int] = {}
    for day in sorted(d for d in events if d <= ds):
        for e in events[day]:
            for stream, attribute in dataset.item_features.streams:
                if e["stream"] != stream or not is_id(e[attribute]):
                    continue
                seen[e[attribute]] = min(
                    seen.get(e[attribute], e["available_time"]), e["available_time"]
                )
                if day == ds:
                    key = (e[attribute], e["available_time"] // HOUR_US)
                    row = rows.setdefault(
                        key, {f"events__{s}": 0 for s, _ in dataset.item_features.streams}
                    )
                    row[f"events__{stream}"] += 1
    for (item, hour), row in rows.items():
        row |= {"item_id": item, "hour": hour, "first_seen": seen[item], "ds": ds}
        row |= co_occurrences(events, dataset, ds, item, hour)
    return list(rows.values())


def co_occurrences(
    events: dict[str, list[Row]], dataset: Dataset, ds: str, item: object, hour: int
) -> Row:
    """The co-occurrence columns of one row of `item_aggregates`."""
    pairs = dataset.item_features.co_occurrence
    found: dict[str, dict] = {f"beside__{n}": {} for n in pairs.beside}
    found |= {f"before_{lags}__{n}": {} for n in pairs.before for lags in pairs.lags}
    state = states(events, dataset, shift(ds, -1))
    for user in {e["user_id"] for e in events[ds]}:
        held = state[user][pairs.stream] if user in state else []
        line = held + unseen(events[ds], user, pairs.stream, held)
        for i, e in enumerate(line):
            if i < len(held) or e[pairs.attribute] != item:
                continue
            if e["available_time"] // HOUR_US != hour:
                continue
            values = [(f"beside__{n}", e[n]) for n in pairs.beside]
            for lags in pairs.lags:
                earlier = line[max(i - lags, 0) : i]
                values += [(f"before_{lags}__{n}", b[n]) for n in pairs.before for b in earlier]
            for column, value in values:
                if is_id(value) and (not column.endswith("__article") or value != item):
                    found[column][value] = found[column].get(value, 0) + 1
    row: Row = {}
    for column, counts in found.items():
        row[column] = sorted(counts)
        row[f"{column}__counts"] = [counts[v] for v in sorted(counts)]
    return row


def examples(
    events: dict[str, list[Row]],
    impressions: dict[str, list[Row]],
    dataset: Dataset,
    ds: str,
    *,
    first: bool,
) -> list[Row]:
    """The partition `ds` of `examples`. `first`: there are no aggregates of the day before."""
    state = states(events, dataset, shift(ds, -1))
    served = {} if first else {r["user_id"]: r for r in aggregates(events, dataset, shift(ds, -1))}
    order = {s.name: i for i, s in enumerate(dataset.streams)}
    kinds = [t.name for t in dataset.targets]
    rows = []
    for user in {t["user_id"] for t in impressions[ds]}:
        held = state.get(user, {s.name: [] for s in dataset.streams})
        day = [
            ((t["as_of"], -1, t["target_id"], kinds.index(t["target"])), t)
            for t in impressions[ds]
            if t["user_id"] == user
        ]
        for s in dataset.streams:
            day += [
                ((e["available_time"], order[s.name], e["event_id"]), e)
                for e in unseen(events[ds], user, s.name, held[s.name])
            ]
        day.sort(key=lambda pair: pair[0])
        for part in range(-(-len(day) // dataset.max_part_rows)):
            chunk = [r for _, r in day[part * dataset.max_part_rows :][: dataset.max_part_rows]]
            sofar = {s.name: list(held[s.name])[-s.max_events :] for s in dataset.streams}
            targets: list[Row] = []
            for row in chunk:
                if "event_id" in row:
                    sofar[row["stream"]].append(row)
                else:
                    ends = {f"targets__history_end__{s}": len(rows_) for s, rows_ in sofar.items()}
                    targets.append(_target(row, events, dataset) | ends)
            if targets:
                row = {
                    "user_id": user,
                    "part": part,
                    "ds": ds,
                    **_user_features(served.get(user), dataset),
                }
                for stream, rows_ in sofar.items():
                    row |= history(rows_, dataset, stream, event_id=False)
                rows.append(row | {k: [t[k] for t in targets] for k in targets[0]})
            for s in dataset.streams:
                held[s.name] = sofar[s.name]
    return rows


def _target(row: Row, events: dict[str, list[Row]], dataset: Dataset) -> Row:
    kinds = [t.name for t in dataset.targets]
    result: Row = {f"targets__{n}": row[n] for n in ("target_id", "time", "as_of")}
    result["targets__target"] = kinds.index(row["target"])
    result["targets__item_id"] = row["item_id"] if is_id(row["item_id"]) else MISSING_ID
    for c in dataset.context_features:
        result[f"targets__context__{c.name}"] = filled(row, c)
    return result | item_features(events, dataset, row["item_id"], row["as_of"])


def _user_features(served: Row | None, dataset: Dataset) -> Row:
    if served is not None:
        return {"has_aggregates": 1} | {
            k: v for k, v in served.items() if k not in ("user_id", "ds")
        }
    row: Row = {"has_aggregates": 0}
    for ua in dataset.user_attributes:
        row[f"user__{ua.name}"] = missing_value(dataset.stream(ua.stream).attribute(ua.attribute))
    for sf in dataset.sparse_features:
        row[f"sparse__{sf.name}"] = []
        if sf.scored:
            row[f"sparse__{sf.name}__scores"] = []
    return row | {f"dense__{df.name}": float("nan") for df in dataset.dense_features}


def labels(
    events: dict[str, list[Row]],
    impressions: dict[str, list[Row]],
    example_rows: dict[str, list[Row]],
    dataset: Dataset,
    ds: str,
) -> list[Row]:
    """The partition `ds` of `labels`, for examples by the day shown."""
    rows = []
    for task in dataset.tasks:
        shown = shift(ds, -task.matures_after)
        targets = {
            (t["user_id"], t["target"], t["target_id"]): t for t in impressions.get(shown, ())
        }
        for example in example_rows.get(shown, ()):
            answers = []
            for kind, target_id in zip(
                example["targets__target"], example["targets__target_id"], strict=True
            ):
                target = targets[example["user_id"], dataset.targets[kind].name, target_id]
                asked = target["target"] in task.targets
                if task.domain is not None:
                    asked = asked and target[dataset.domain] == task.domain
                if not asked:
                    answers.append(NO_LABEL)
                elif isinstance(task.label, EventLabel):
                    answers.append(int(_happened(task.label, target, events, ds)))
                else:
                    given = target[label_column(task.label.column)]
                    answers.append(NO_LABEL if given is None else given)
            if any(a != NO_LABEL for a in answers):
                row = {"user_id": example["user_id"], "shown_ds": shown, "part": example["part"]}
                rows.append({**row, "task": task.name, "labels": answers, "ds": ds})
    return rows


def _happened(label: EventLabel, target: Row, events: dict[str, list[Row]], ds: str) -> bool:
    known = (e for day in day_range(str(target["ds"]), ds) for e in events.get(day, ()))
    return any(
        e["user_id"] == target["user_id"]
        and e["stream"] == label.stream
        and target["time"] < e["event_time"] <= target["time"] + micros(label.within)
        and all(is_id(e[theirs]) and e[theirs] == target[ours] for ours, theirs in label.match)
        for e in known
    )
