"""The Globo source on a made-up log of the same format: nothing lost, no trap stepped into."""

from __future__ import annotations

import gzip
import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from feature_store.datasets import get
from feature_store.days import DAY_US, day_of, day_range, end_us, start_us
from feature_store.errors import DataError
from feature_store.tables import contracts
from jobs.sources import SourceDay, globo
from jobs.sources.globo import files, targets

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

DATASET = get("globo")
OFFSET = DATASET.utc_offset
FIRST_MS = start_us("2017-10-01", OFFSET) // 1000
HOUR_MS = 3_600_000
DAYS = day_range("2017-10-01", "2017-10-04")

Line = dict[str, int]
Row = dict[str, Any]


def session_lines(
    user: int, start_ms: int, articles: list[int], gaps_ms: list[int], *, referrer: int = 1
) -> list[Line]:
    """A session as the log has it: the final click 30 s after the one before, referrer copied."""
    times = [start_ms + 1000]
    for gap in (*gaps_ms, 30_000):
        times.append(times[-1] + gap)
    return [
        {
            "user_id": user,
            "session_id": start_ms * 1000 + user,
            "session_start": start_ms,
            "session_size": len(articles),
            "click_article_id": article,
            "click_timestamp": time,
            "click_environment": 4,
            "click_deviceGroup": 1 + user % 3,
            "click_os": 17,
            "click_country": 1,
            "click_region": user % 28,
            "click_referrer_type": referrer,
        }
        for article, time in zip(articles, times, strict=True)
    ]


def made_up_log(seed: int = 0, sessions: int = 300) -> list[Line]:
    """Sessions of two days; some go on hours or days later, some end just before midnight."""
    draw = random.Random(seed)
    lines: list[Line] = []
    for n in range(sessions):
        start_ms = FIRST_MS + draw.randrange(48 * 60) * 60_000 + n
        size = draw.choice([2, 2, 2, 3, 4, 7])
        gaps = [draw.choice([5_000, 90_000, 2 * HOUR_MS, 26 * HOUR_MS]) for _ in range(size - 2)]
        articles = draw.sample(range(0, 30_000, 700), size)
        lines += session_lines(
            draw.randrange(60), start_ms, articles, gaps, referrer=draw.choice([1, 1, 2, 2, 2, 7])
        )
    return lines


def write_log(folder: Path, lines: list[Line], *, zipped: bool = True) -> Path:
    """`clicks_hour_NNN.csv[.gz]`, each with the sessions that start in its hour."""
    folder.mkdir(parents=True, exist_ok=True)
    hours: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        hours[(line["session_start"] - FIRST_MS) // HOUR_MS].append(line)
    for hour in range(max(hours) + 1):
        text = ",".join(files.COLUMNS) + "\n"
        text += "".join(",".join(str(x[c]) for c in files.COLUMNS) + "\n" for x in hours[hour])
        path = folder / f"clicks_hour_{hour:03}.csv"
        if zipped and hour % 5:  # one in five is not
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
    return folder


def rows(frame: DataFrame) -> list[Row]:
    """The frame's rows as dictionaries."""
    found: list[Row] = frame.toArrow().to_pylist()
    return found


def read(spark: SparkSession, folder: Path, day: str) -> SourceDay:
    """What the source gives for `day`."""
    return globo.read(spark, str(folder), day, DATASET)


@pytest.fixture
def all_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user-day is scored: the made-up log is small."""
    monkeypatch.setattr(targets, "SCORED_USER_DAYS", 1000)


@pytest.fixture(scope="module")
def log() -> list[Line]:
    """The log that most tests read."""
    return made_up_log()


@pytest.fixture(scope="module")
def folder(log: list[Line], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files."""
    return write_log(tmp_path_factory.mktemp("globo"), log)


# --- what is read ------------------------------------------------------------------------------


def test_each_click_is_an_event_of_the_day_that_holds_it(
    spark: SparkSession, folder: Path, log: list[Line]
) -> None:
    last = max(x["click_timestamp"] for x in log) * 1000
    found: Counter[tuple[str, int, int, int]] = Counter()
    ids: set[int] = set()
    for day in day_range("2017-10-01", day_of(last, OFFSET)):
        for row in rows(read(spark, folder, day).events["clicks"]):
            found[day, row["user_id"], row["event_time"], row["article_id"]] += 1
            ids.add(row["event_id"])
    want = Counter(
        (day_of(t, OFFSET), x["user_id"], t, x["click_article_id"])
        for x in log
        for t in [x["click_timestamp"] * 1000]
    )
    assert found == want
    assert len(ids) == len(log)


def test_a_session_is_an_event_of_the_day_on_which_it_has_ended(
    spark: SparkSession, folder: Path, log: list[Line]
) -> None:
    sessions: dict[int, list[Line]] = defaultdict(list)
    for x in log:
        sessions[x["session_id"]].append(x)
    day = "2017-10-02"
    want = sorted(
        (
            s[-1]["user_id"],
            s[-1]["click_timestamp"] * 1000,
            float(len(s)),
            s[0]["click_referrer_type"],
        )
        for s in sessions.values()
        if day_of(s[-1]["click_timestamp"] * 1000 + files.SESSION_END_US, OFFSET) == day
    )
    found = rows(read(spark, folder, day).events["sessions"])
    got = [(r["user_id"], r["event_time"], r["session_clicks"], r["referrer"]) for r in found]
    assert sorted(got) == want
    late = [t for _, t, _, _ in want if day_of(t, OFFSET) < day]
    assert late, "the log has no session that clicks before midnight and ends after it"


def test_a_repeated_line_is_read_once_and_counted(spark: SparkSession, tmp_path: Path) -> None:
    lines = session_lines(1, FIRST_MS + HOUR_MS, [700, 1400, 2100], [9000])
    source = write_log(tmp_path / "log", [*lines, lines[1]])
    day = read(spark, source, "2017-10-01")
    assert sorted(r["session_position"] for r in rows(day.events["clicks"])) == [1, 2, 3]
    assert day.notes["duplicate_lines"] == 1


def test_missing_hours_are_counted_and_the_rest_is_read(
    spark: SparkSession, tmp_path: Path, log: list[Line]
) -> None:
    source = write_log(tmp_path / "log", log, zipped=False)
    whole = read(spark, source, "2017-10-01")
    assert whole.notes["hour_files_missing"] == 0
    for hour in (3, 7):
        (source / f"clicks_hour_{hour:03}.csv").unlink()
    less = read(spark, source, "2017-10-01")
    assert less.notes["hour_files_missing"] == 2
    assert 0 < less.events["clicks"].count() < whole.events["clicks"].count()


# --- what is scored ----------------------------------------------------------------------------


def naive_sessions(log: list[Line]) -> dict[int, list[Line]]:
    """Session -> its clicks in order."""
    sessions: dict[int, list[Line]] = defaultdict(list)
    for x in sorted(log, key=lambda x: (x["session_id"], x["click_timestamp"])):
        sessions[x["session_id"]].append(x)
    return sessions


@pytest.mark.usefixtures("all_scored")
def test_candidates_are_the_click_and_articles_that_others_clicked_nearby(
    spark: SparkSession, folder: Path, log: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "POOL_CLICKS", 60)
    monkeypatch.setattr(targets, "MATCHED_POOL_CLICKS", 30)
    day = "2017-10-02"
    sessions = naive_sessions(log)
    on_day = sorted(
        (
            (x["click_timestamp"], s, i, x)
            for s, clicks in sessions.items()
            for i, x in enumerate(clicks)
            if day_of(x["click_timestamp"] * 1000, OFFSET) == day
        ),
        key=lambda c: c[:3],
    )
    groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows(read(spark, folder, day).impressions):
        if row["target"] == "candidate":
            groups[row["user_id"], row["time"]].append(row)
    assert len(groups) == len(on_day)
    drawn = Counter[str]()
    for rank, (time, session, _, click) in enumerate(on_day):
        group = groups[click["user_id"], time * 1000]
        same = [
            n
            for n, c in enumerate(on_day)
            if c[3]["click_referrer_type"] == click["click_referrer_type"]
        ]
        place = same.index(rank)
        near = {
            "click": on_day[max(rank - 60, 0) : rank + 61],
            "click_matched": [on_day[n] for n in same[max(place - 30, 0) : place + 31]],
        }
        own = {x["click_article_id"] for x in sessions[session]}
        for task, pool in near.items():
            allowed = {
                c[3]["click_article_id"] for c in pool if c[3]["user_id"] != click["user_id"]
            } - own
            negatives = [r["item_id"] for r in group if r[task] == 0]
            assert set(negatives) <= allowed
            assert len(set(negatives)) == len(negatives) <= targets.NEGATIVES
            positives = [r["item_id"] for r in group if r[task] == 1]
            assert positives == [click["click_article_id"]]
            drawn[task] += len(negatives)
        assert len({r["item_id"] for r in group}) == len(group)
    assert drawn["click"] > 3.8 * len(on_day)


@pytest.mark.usefixtures("all_scored")
def test_candidates_of_a_click_differ_in_nothing_but_the_article(
    spark: SparkSession, folder: Path
) -> None:
    frame = read(spark, folder, "2017-10-01").impressions
    assert frame is not None
    assert "referrer" not in frame.columns
    shared: dict[tuple[int, int], set[tuple[int, ...]]] = defaultdict(set)
    for r in rows(frame):
        if r["target"] == "candidate":
            assert r["as_of"] == r["time"]
            assert (r["topic"], r["section"]) == (r["item_id"] // 256, r["item_id"] // 2048)
            context = tuple(r[c] for c in ("device", "os", "region", "hour", "session_position"))
            shared[r["user_id"], r["time"]].add(context)
    assert {len(contexts) for contexts in shared.values()} == {1}


@pytest.mark.usefixtures("all_scored")
def test_continue_knows_of_the_current_click_only_article_and_position(
    spark: SparkSession, tmp_path: Path
) -> None:
    """The gap, the referrer and the device of a final click are made up: none may move a target."""
    lines = session_lines(5, FIRST_MS + HOUR_MS, [700, 1400, 2100], [50_000])
    other = [dict(x) for x in lines]
    other[2]["click_timestamp"] += 77_000
    other[2] |= {"click_referrer_type": 7, "click_deviceGroup": 4, "click_os": 2, "click_region": 9}

    def positions(name: str, log: list[Line]) -> list[Row]:
        day = read(spark, write_log(tmp_path / name, log), "2017-10-01")
        found = [r for r in rows(day.impressions) if r["target"] == "position"]
        return sorted(found, key=lambda r: r["as_of"])

    found = positions("a", lines)
    assert found == positions("b", other)
    assert [r["continue"] for r in found] == [1, 0]
    assert [r["session_position"] for r in found] == [2, 3]
    assert [r["item_id"] for r in found] == [1400, 2100]
    before = [x["click_timestamp"] * 1000 + 1 for x in lines[:2]]
    assert [r["time"] for r in found] == [r["as_of"] for r in found] == before


@pytest.mark.usefixtures("all_scored")
def test_continue_is_known_by_the_end_of_the_next_day(spark: SparkSession, tmp_path: Path) -> None:
    early = session_lines(1, FIRST_MS + HOUR_MS, [1, 2, 3], [40 * HOUR_MS])
    early[1]["click_timestamp"] = early[0]["click_timestamp"] + 60_000
    late = session_lines(2, FIRST_MS + HOUR_MS, [1, 2, 3], [60_000])
    late[2]["click_timestamp"] = late[1]["click_timestamp"] + 60 * HOUR_MS
    source = write_log(tmp_path / "log", [*early, *late])
    answers = {
        (r["user_id"], r["session_position"]): r["continue"]
        for r in rows(read(spark, source, "2017-10-01").impressions)
        if r["target"] == "position"
    }
    # user 1 clicks again within the next day; user 2 does so after the answer had to be final
    assert answers == {(1, 2): 1, (2, 2): 0}


@pytest.mark.usefixtures("all_scored")
def test_a_session_is_scored_when_its_own_event_has_just_become_visible(
    spark: SparkSession, folder: Path
) -> None:
    day = read(spark, folder, "2017-10-02")
    ends = sorted(
        (r["user_id"], r["as_of"]) for r in rows(day.impressions) if r["target"] == "session_end"
    )
    delay = files.SESSION_END_US
    available = sorted(
        (r["user_id"], r["event_time"] + delay) for r in rows(day.events["sessions"])
    )
    assert ends == [(user, time + 1) for user, time in available]
    assert available


def test_scored_user_days_are_whole_and_a_share_of_all(
    spark: SparkSession, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "SCORED_USER_DAYS", 300)
    day = read(spark, folder, "2017-10-01")
    clicks: dict[int, set[int]] = defaultdict(set)
    for r in rows(day.events["clicks"]):
        clicks[r["user_id"]].add(r["event_time"])
    scored: dict[int, set[int]] = defaultdict(set)
    for r in rows(day.impressions):
        if r["target"] == "candidate":
            scored[r["user_id"]].add(r["time"])
    assert 0.15 < len(scored) / len(clicks) < 0.45
    assert all(scored[user] == clicks[user] for user in scored)
    tomorrow = {r["user_id"] for r in rows(read(spark, folder, "2017-10-02").impressions)}
    assert tomorrow != set(scored), "the same users are scored every day"


@pytest.mark.usefixtures("all_scored")
@pytest.mark.parametrize("day", DAYS)
def test_everything_lies_on_its_day_and_has_an_id_of_its_own(
    spark: SparkSession, folder: Path, day: str
) -> None:
    span = range(start_us(day, OFFSET), end_us(day, OFFSET))
    found = rows(read(spark, folder, day).impressions)
    assert all(r["as_of"] in span and r["as_of"] <= r["time"] for r in found)
    assert len({r["target_id"] for r in found}) == len(found)
    local = [(r["as_of"] - span.start) * 24 // DAY_US for r in found]
    assert [r["hour"] for r in found] == local


@pytest.mark.usefixtures("all_scored")
def test_both_engines_give_the_same_day(spark_of: Any, folder: Path) -> None:
    def everything(engine: str) -> dict[str, list[Row]]:
        day = read(spark_of(engine), folder, "2017-10-02")
        frames = {**day.events, "impressions": day.impressions}
        key = {"clicks": "event_id", "sessions": "event_id", "impressions": "target_id"}
        return {n: sorted(rows(f), key=lambda r: r[key[n]]) for n, f in frames.items() if f}

    assert everything("sail") == everything("spark")


def test_frames_have_the_columns_and_types_of_the_spec(spark: SparkSession, folder: Path) -> None:
    tables = contracts(DATASET)
    day = read(spark, folder, "2017-10-01")
    assert day.impressions is not None
    want = {f.name.removeprefix("label__"): f.type for f in tables["impressions"].schema}
    got = {f.name: f.type for f in day.impressions.toArrow().schema}
    assert got == {n: t for n, t in want.items() if n != "ds"}
    events = {f.name: f.type for f in tables["events"].schema}
    for stream in DATASET.streams:
        schema = day.events[stream.name].toArrow().schema
        assert {"user_id", "event_time", "event_id"} | {a.name for a in stream.attributes} == set(
            schema.names
        )
        assert all(events[f.name] == f.type for f in schema)


# --- files -------------------------------------------------------------------------------------


def index(folder: Path, tmp_path: Path) -> list[files.HourFile]:
    """The index of `folder`."""
    return files.index_files(folder, tmp_path / "cache", OFFSET)


def one_file(folder: Path, text: str) -> Path:
    """A folder with one hourly file."""
    folder.mkdir()
    (folder / "clicks_hour_000.csv").write_text(text)
    return folder


HEADER = ",".join(files.COLUMNS)
GOOD = "1,10,1506826800000,2,157541,1506827017951,4,3,20,1,20,2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read"),
        (HEADER + "\n" + GOOD + ",9", "cannot be read"),
        (HEADER + "\n" + GOOD.replace("157541", "abc"), "cannot be read .*abc"),
        (HEADER.replace("click_os", "os") + "\n" + GOOD, "has the columns .*os"),
        (HEADER + ",extra\n" + GOOD + ",1", "has the columns .*extra"),
        (HEADER.removesuffix(",click_referrer_type") + "\n" + GOOD[:-2], "has the columns"),
        (HEADER + "\n" + GOOD.replace("157541", ""), "click_article_id is empty in 1 lines"),
        (HEADER + "\n-" + GOOD, "user_id has -1"),
        (HEADER + "\n" + GOOD.replace("1506827017951", "1506827017"), "not milliseconds"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    folder = one_file(tmp_path / "log", text)
    with pytest.raises(DataError, match=f"clicks_hour_000.csv.*{says}"):
        index(folder, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_truncated_gzip_is_named(tmp_path: Path, log: list[Line]) -> None:
    source = write_log(tmp_path / "log", log)
    victim = source / "clicks_hour_004.csv.gz"
    victim.write_bytes(victim.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"clicks_hour_004\.csv\.gz cannot be read"):
        index(source, tmp_path)


def test_a_wrong_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SOURCE is not set"):
        files.folder_of(None)
    with pytest.raises(DataError, match="not a folder"):
        files.folder_of(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no clicks_hour_NNN"):
        index(tmp_path, tmp_path)


def test_an_hour_given_twice_is_refused(tmp_path: Path, log: list[Line]) -> None:
    source = write_log(tmp_path / "log", log)
    (source / "clicks_hour_004.csv").write_text(HEADER + "\n")
    with pytest.raises(DataError, match=r"clicks_hour_004\.csv and clicks_hour_004\.csv\.gz"):
        index(source, tmp_path)


@pytest.mark.parametrize("day", ["2017-09-30", "2017-11-20"])
def test_a_day_outside_of_the_files_is_refused(folder: Path, tmp_path: Path, day: str) -> None:
    with pytest.raises(DataError, match=f"day is {day}, but .* holds from 2017-10-01 to"):
        files.files_of_day(index(folder, tmp_path), day, folder)


def test_only_changed_files_are_read_again(
    tmp_path: Path, log: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_log(tmp_path / "log", log, zipped=False)
    first = index(source, tmp_path)
    changed = source / "clicks_hour_005.csv"
    changed.write_text(changed.read_text() + GOOD + "\n")
    os.utime(changed, ns=(1, 1))
    read_again: list[str] = []
    examine = files._examine
    monkeypatch.setattr(
        files, "_examine", lambda path, *rest: read_again.append(path.name) or examine(path, *rest)
    )
    second = index(source, tmp_path)
    assert read_again == ["clicks_hour_005.csv"]
    assert [b.rows - a.rows for a, b in zip(first, second, strict=True) if a != b] == [1]


def test_a_broken_index_is_made_again(tmp_path: Path, folder: Path) -> None:
    first = index(folder, tmp_path)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("[{")
    assert index(folder, tmp_path) == first


def test_a_session_cut_by_a_lost_line_is_counted(tmp_path: Path, log: list[Line]) -> None:
    source = write_log(tmp_path / "log", log[:-1])
    assert sum(f.cut_sessions for f in index(source, tmp_path)) == 1
