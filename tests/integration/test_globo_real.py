"""Globo on the log itself: HEADWATER_GLOBO names the folder of its hourly files."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyspark.sql import functions as F
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from feature_store.datasets import get
from feature_store.days import HOUR_US, add_days, start_us
from feature_store.tables import contract
from jobs import build_aggregates, build_examples, build_item_aggregates, build_sequences, ingest
from jobs.frames import conform, newest
from jobs.sources import globo
from jobs.sources.globo import files

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from pyspark.sql import DataFrame, SparkSession

pytestmark = pytest.mark.skipif(
    not os.environ.get("HEADWATER_GLOBO"),
    reason="HEADWATER_GLOBO is not set: the folder of clicks_hour_NNN.csv[.gz]",
)

DATASET = get("globo")
DAY = "2017-10-14"  # the smallest whole day


def _pandas(frame: DataFrame | None) -> pd.DataFrame:
    assert frame is not None
    return frame.toArrow().to_pandas()


@pytest.fixture(scope="module")
def day(spark_of: Callable[[str], SparkSession]) -> dict[str, pd.DataFrame]:
    """What the source gives for DAY, on Sail."""
    read = globo.read(spark_of("sail"), os.environ["HEADWATER_GLOBO"], DAY, DATASET)
    frames = {name: _pandas(frame) for name, frame in read.events.items()}
    return frames | {"impressions": _pandas(read.impressions)}


def test_every_line_is_a_click_of_some_day(tmp_path: Path) -> None:
    folder = files.folder_of(os.environ["HEADWATER_GLOBO"])
    index = files.index_files(folder, tmp_path, DATASET.utc_offset)
    assert sum(f.rows for f in index) == sum(n for f in index for n in f.days.values()) == 2_988_181


def test_the_day_has_all_its_clicks(day: dict[str, pd.DataFrame]) -> None:
    assert len(day["clicks"]) == 91_117
    assert day["clicks"].event_id.is_unique
    assert day["impressions"].target_id.is_unique


def test_one_click_in_five_candidates(day: dict[str, pd.DataFrame]) -> None:
    scored = day["impressions"]
    assert scored["click"].mean() == pytest.approx(0.2, abs=0.002)
    assert scored["click_matched"].mean() == pytest.approx(0.2, abs=0.003)


@pytest.mark.parametrize("task", ["click", "click_matched", "continue"])
def test_the_moment_alone_does_not_give_the_answer_away(
    day: dict[str, pd.DataFrame], task: str
) -> None:
    scored = day["impressions"]
    scored = scored[scored[task].notna()].assign(
        gap=lambda x: x.time - x.as_of, second=lambda x: x.as_of // 1_000_000 % 60
    )
    features = ["gap", "second", "device", "os", "region", "hour", "session_position"]
    held_out = scored.user_id % 3 == 0
    model = HistGradientBoostingClassifier(max_iter=40, random_state=0)
    model.fit(scored.loc[~held_out, features], scored.loc[~held_out, task])
    answer = model.predict_proba(scored.loc[held_out, features])[:, 1]
    auc = roc_auc_score(scored.loc[held_out, task], answer)
    # position in the session is the one honest hint, and only about its going on
    assert auc < (0.65 if task == "continue" else 0.52)


def test_both_engines_give_the_same_day(
    day: dict[str, pd.DataFrame], spark_of: Callable[[str], SparkSession]
) -> None:
    read = globo.read(spark_of("spark"), os.environ["HEADWATER_GLOBO"], DAY, DATASET)
    for name, frame in {**read.events, "impressions": read.impressions}.items():
        key = "target_id" if name == "impressions" else "event_id"
        ours, theirs = (x.sort_values(key, ignore_index=True) for x in (day[name], _pandas(frame)))
        assert ours.equals(theirs), name


# ---- poisoning: what a target before a moment of the day can reach


def _known_at(
    frame: Callable[[pa.Table], DataFrame], tables: dict[str, pa.Table], moment: int
) -> dict[str, list[dict[str, object]]]:
    """What of the day's tables a target before `moment` can reach, in an order of its own.

    All of `aggregates` and `sequences` that it reads are of the evening before; what it sees of the day
    is in `item_aggregates`, hours that closed, and in `examples`, each target's prefix of its row.
    """
    events, state = frame(tables["events"]), newest(frame(tables["sequences"]))
    items = build_item_aggregates.transform(
        events, frame(tables["earlier"]), state, DATASET, DAY
    ).toArrow()
    examples = build_examples.transform(
        events=events,
        impressions=frame(tables["impressions"]),
        state=state,
        aggregates=frame(tables["aggregates"]),
        item_aggregates=frame(pa.concat_tables([tables["earlier"], items])),
        dataset=DATASET,
        ds=DAY,
    ).toArrow()
    closed = items.filter(pc.less_equal(items["hour"], moment // HOUR_US - 1))
    seen = []
    for row in examples.to_pylist():
        lists = {k: v for k, v in row.items() if isinstance(v, list)}
        of_user = {k: str(v) for k, v in row.items() if k not in lists and k != "part"}
        of_user |= {k: str(v) for k, v in lists.items() if k.startswith("sparse__")}
        for i, as_of in enumerate(row["targets__as_of"]):
            if as_of >= moment:
                continue
            target = {k: str(v[i]) for k, v in lists.items() if k.startswith("targets__")}
            for s in DATASET.streams:
                end = row[f"targets__history_end__{s.name}"][i]
                prefix = f"history__{s.name}__"
                target |= {k: str(v[:end]) for k, v in lists.items() if k.startswith(prefix)}
            seen.append(of_user | target)
    return {
        "item_aggregates": sorted(closed.to_pylist(), key=lambda r: (r["item_id"], r["hour"])),
        "examples": sorted(seen, key=lambda r: str(r["targets__target_id"])),
    }


def _poisoned(table: pa.Table, column: str, moment: int, seed: int) -> pa.Table:
    """Rows at or after `moment` deleted, or given to other users."""
    rng = np.random.default_rng(seed)
    late = table[column].to_numpy() >= moment
    keep = ~late | (rng.random(len(late)) < 0.6)
    users = table["user_id"].to_numpy().copy()
    users[late] = rng.permutation(users[late])
    moved = table.set_column(
        table.schema.get_field_index("user_id"), table.schema.field("user_id"), pa.array(users)
    )
    return moved.filter(pa.array(keep))


def test_nothing_before_a_moment_moves_when_what_comes_after_it_does(
    spark_of: Callable[[str], SparkSession], tmp_path: Path
) -> None:
    spark = spark_of("sail")
    yesterday = add_days(DAY, -1)
    files_of = (tmp_path / f"{i}.parquet" for i in count())

    def frame(table: pa.Table) -> DataFrame:  # through a file: a message to the engine is too small
        path = next(files_of)
        pq.write_table(table, path)
        return spark.read.parquet(str(path))

    tables: dict[str, pa.Table] = {}
    for ds in (yesterday, DAY):
        read = globo.read(spark, os.environ["HEADWATER_GLOBO"], ds, DATASET)
        for name, marked in ingest.transform(read, DATASET, ds).items():
            key = contract(DATASET, name).key
            rows = marked.dropDuplicates(list(key)).where(~F.col("_outside"))
            tables[f"{name}/{ds}"] = conform(rows, contract(DATASET, name), ds).toArrow()
    before = frame(tables[f"events/{yesterday}"])
    nothing = frame(contract(DATASET, "item_aggregates").schema.empty_table())
    sequences = build_sequences.rebuild(before, DATASET, yesterday, base=True).toArrow()
    no_state = frame(sequences.schema.empty_table()).drop("ds")
    tables |= {
        "sequences": sequences,
        "aggregates": build_aggregates.transform(before, DATASET, yesterday).toArrow(),
        "earlier": build_item_aggregates.transform(
            before, nothing, no_state, DATASET, yesterday
        ).toArrow(),
    }
    # one user in twenty keeps the examples of a day within memory; their items are everybody's
    tables["events"] = tables[f"events/{DAY}"]
    shown = tables[f"impressions/{DAY}"]
    tables["impressions"] = shown.filter(pa.array(shown["user_id"].to_numpy() % 20 == 0))
    for hour in (9, 15):
        moment = start_us(DAY, DATASET.utc_offset) + hour * HOUR_US + HOUR_US // 4
        want = _known_at(frame, tables, moment)
        other = tables | {
            "events": _poisoned(tables["events"], "available_time", moment, hour),
            "impressions": _poisoned(tables["impressions"], "as_of", moment, hour),
        }
        found = _known_at(frame, other, moment)
        for name, rows in want.items():
            assert rows, name
            assert found[name] == rows, f"{name} at {hour}:15"
