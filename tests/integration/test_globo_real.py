"""The Globo source on the log itself: HEADWATER_GLOBO names the folder of its hourly files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from feature_store.datasets import get
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
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score

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
