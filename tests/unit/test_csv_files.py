"""CSV files: what a writer wrote is read back to the letter, on every engine; all else is refused with its line."""

from __future__ import annotations

import csv
import gzip
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.errors import DataError
from jobs.sources import csv_files
from jobs.sources.csv_files import batches, files_of, read_csv

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

BOTH = pytest.mark.parametrize("engine", ["sail", "spark"], indirect=True)
Rows = list[dict[str, str | None]]
COLUMNS = {"who": "user_id", "what": "product"}


def _read(file: Path, columns: dict[str, str]) -> Rows:
    return [row for batch in batches(file, columns) for row in batch.to_pylist()]


def _rows(file: Path, raw: bytes, columns: dict[str, str] | None = None) -> Rows:
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    return _read(file, columns or COLUMNS)


# every character that is UTF-8, those that mean something in CSV often
letters = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
texts = st.text(st.one_of(st.sampled_from("\",\\\n\r;\t '#"), letters), max_size=8)
names = st.text(letters.filter(lambda c: c != "\ufeff"), min_size=1, max_size=4)


@st.composite
def written(draw: st.DrawFn) -> tuple[list[str], list[list[str]], bytes]:
    """Header, rows and bytes of a CSV file of some dialect that RFC 4180 knows."""
    header = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    rows = draw(st.lists(st.lists(texts, min_size=len(header), max_size=len(header)), max_size=6))
    rows = [row for row in rows if row != header and [row[0].lstrip("\ufeff"), *row[1:]] != header]
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    quoting = draw(st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
    out = io.StringIO()
    # the writer leaves a "\n" unquoted where lines end otherwise
    csv.writer(out, lineterminator="\r\n", quoting=quoting).writerows([header, *rows])
    text = out.getvalue()
    if end != "\r\n" and not any("\r" in v or "\n" in v for row in [header, *rows] for v in row):
        text = text.replace("\r\n", end)
    if rows and draw(st.booleans()):
        text = text.removesuffix("\n").removesuffix("\r")
    return header, rows, draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode()


@given(written(), st.sampled_from([".csv", ".csv.gz"]), st.integers(1, 4))
@settings(max_examples=150)
def test_what_a_writer_wrote_is_read_back(
    tmp_path: Path, case: tuple[list[str], list[list[str]], bytes], suffix: str, batch_rows: int
) -> None:
    header, rows, raw = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "_BATCH_ROWS", batch_rows)
        found = _rows(tmp_path / f"a{suffix}", raw, {name: name for name in header})
    assert found == [{n: v or None for n, v in zip(header, row, strict=True)} for row in rows]


@given(written(), st.data())
@settings(max_examples=150)
def test_a_quote_too_many_or_too_few_is_refused(
    tmp_path: Path, case: tuple[list[str], list[list[str]], bytes], data: st.DataObject
) -> None:
    header, _, raw = case
    text = raw.decode()
    if '"' in text and data.draw(st.booleans()):
        place = data.draw(st.sampled_from([m.start() for m in re.finditer('"', text)]))
        text = text[:place] + text[place + 1 :]
    else:
        place = data.draw(st.integers(1 if raw.startswith(b"\xef\xbb\xbf") else 0, len(text)))
        text = text[:place] + '"' + text[place:]
    with pytest.raises(DataError):
        _rows(tmp_path / "a.csv", text.encode(), {name: name for name in header})


@given(st.lists(st.lists(st.text("ab \\'", max_size=3), min_size=3, max_size=3)), st.data())
@settings(max_examples=100)
def test_a_comma_too_many_or_too_few_is_refused_with_its_line(
    tmp_path: Path, rows: list[list[str]], data: st.DataObject
) -> None:
    lines = [",".join(row) for row in [["x", "y", "z"], *rows]]
    number = data.draw(st.integers(1, len(lines) - 1)) if rows else 0
    if not number:
        return
    lines[number] = data.draw(
        st.sampled_from([lines[number] + ",", lines[number].replace(",", "", 1)])
    )
    with pytest.raises(DataError, match=rf"a\.csv, line {number + 1} has \d fields"):
        _rows(tmp_path / "a.csv", "\n".join(lines).encode(), {"y": "y"})


UGLY = (
    ["plain", "12.90f"],
    ['said "no", twice', "back\\slash"],
    ['\\"', "ends in a backslash\\"],
    ["two\nlines", "two\r\nlines"],
    [" space ", "\ttab\t"],
    ["é 木 🙂 \u2028 \x85 \x1c", "NULL"],
    ["", "nan"],
    ["'", "#comment"],
    ["a;b|c", "=1+1"],
)


@BOTH
def test_every_engine_gives_the_same_rows(spark: SparkSession, tmp_path: Path) -> None:
    for number, end, quoting in ((1, "\n", csv.QUOTE_ALL), (2, "\r\n", csv.QUOTE_MINIMAL)):
        out = io.StringIO()
        csv.writer(out, lineterminator=end, quoting=quoting).writerows(
            [["who", "what", "more"], *([*row, "x"] for row in UGLY)]
        )
        raw = out.getvalue().encode()
        (tmp_path / f"views-{number}.csv").write_bytes(raw)
    (tmp_path / "views-3.csv.gz").write_bytes(gzip.compress(b"what,who\r1,ann\r"))
    (tmp_path / "views-4.csv").write_bytes(b"who,what\n")
    found = read_csv(spark, str(tmp_path), "views-*", COLUMNS).collect()
    expected = [(a or None, b or None) for a, b in UGLY] * 2 + [("ann", "1")]
    assert sorted(map(str, found)) == sorted(
        f"Row(user_id={a!r}, product={b!r})" for a, b in expected
    )
    none = read_csv(spark, str(tmp_path), "orders-*", {"who": "user_id"}, may_be_absent=True)
    assert none.columns == ["user_id"] and none.count() == 0


def test_what_is_not_csv_is_refused_with_file_and_line(tmp_path: Path) -> None:
    for raw, sentence in {
        b'who,what\nann,1\n"bob,2\n': r"line 3 is not CSV \(unexpected end of data\)",
        b'who,what\nann,1\n"b" ob,2\n': "line 3 is not CSV",
        b'who,what\nann,1\nbob,5" disk\n': "line 3 is not CSV .*a quote inside a field",
        b'who,what\n"a\nb",1\n"b\\"ob",2\n': "line 4 is not CSV",
        b'who,what\n"'
        + b"a\n" * 70_000
        + b'",1\n': "line 2 is not CSV .*field larger than field limit",
        b"who,what\nann,1\nbob\n": "line 3 has 1 fields, and the header 2",
        b"who,what\nann,1,2\n": "line 2 has 3 fields",
        b"who,what\r\n\r\nann,1\r\nbob,1,\r\n": "line 4 has 3 fields",
        b"who,what\nann,1\nwho,what\nbob,2\n": "line 3 is the header once more",
        b"\xef\xbb\xbfwho,what\nann,1\n\xef\xbb\xbfwho,what\n": "line 3 is the header once more",
        b"who,what\n" + b"ann,1\n" * 9_999 + b"b\xf6b,2\n": r"line 10001 is not UTF-8 \(invalid",
        b"who,what\nb\xed\xa0\x80b,2\n": "line 2 is not UTF-8",
        "who,what\nann,1\n".encode("utf-16"): "line 1 is not UTF-8",
        "who,what\nann,1\n".encode("utf-16-le"): "line 1 holds a NUL byte",
        b"who,what\nann,1\nb\0b,1\n": "line 3 holds a NUL byte",
        b"": "is empty, without even a header",
        b"\n\n": "is empty, without even a header",
        b"who,who,what\n": "has two columns 'who'",
        b"u17,204\n": "has no column 'who': it has u17, 204",
        b"who;what\nann;1\n": "has no column 'who': it has who;what",
    }.items():
        for name in ("a.csv", "a.csv.gz"):
            with pytest.raises(DataError, match=rf"{re.escape(name)},? {sentence}") as error:
                _rows(tmp_path / name, raw)
            assert "\n" not in str(error.value)


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"who,what\n" + b"ann,1\n" * 100_000)
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in the checksum
    for raw in (
        whole[:-9],
        whole[: len(whole) // 2],
        bytes(flipped),
        b"who,what\n",
        whole + b"rest",
    ):
        file = tmp_path / "a.csv.gz"
        file.write_bytes(raw)
        with pytest.raises(DataError, match=r"a\.csv\.gz cannot be read \(.+\): put it right"):
            _read(file, COLUMNS)


@pytest.mark.parametrize("folder", ["logs[1]", "logs*x", "a b é#%41{x,y}?"])
def test_a_folder_is_no_pattern_and_what_lies_beside_a_file_is_not_the_file(
    tmp_path: Path, folder: str
) -> None:
    for other in (folder, "logs1", "logsyx"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "views-1.csv").touch()
    here = tmp_path / folder
    for name in (
        "views-1.csv.bak", "views-1.csv.tmp", "views-1.csv.crc", ".views-1.csv.crc", "views-1.csv~",
        ".views-3.csv", "views-1.csv.gz.part", "views-1.txt", "orders-1.csv", "views-2.csv.gz",
    ):  # fmt: skip
        (here / name).touch()
    (here / "views-9.csv").mkdir()
    for pattern in ("views-*", "views-*.csv*", "view*.csv*", "views-[12].csv*"):
        found = files_of(str(here), pattern)
        assert found == [here / "views-1.csv", here / "views-2.csv.gz"], pattern
    assert files_of(str(here), "views-1.t*") == []
    assert files_of(str(here), "views-1.txt*") == [here / "views-1.txt"]
    (here / "views-2.csv").touch()
    with pytest.raises(DataError, match=r"views-2\.csv\.gz is there without \.gz as well"):
        files_of(str(here), "views-*")


def test_folders_files_and_columns_that_are_missing_are_named(
    spark: SparkSession, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        read_csv(spark, str(tmp_path / "nowhere"), "*", {})
    with pytest.raises(DataError, match="SOURCE is None"):
        read_csv(spark, None, "*", {})
    with pytest.raises(DataError, match=r"has no file views-\*"):
        read_csv(spark, str(tmp_path), "views-*", {})
    (tmp_path / "views-1.csv").write_text("who,what\nann,1\n")
    with pytest.raises(DataError, match=r"views-1\.csv has no column 'price': it has who, what"):
        read_csv(spark, str(tmp_path), "views-*", {"price": "price"})
