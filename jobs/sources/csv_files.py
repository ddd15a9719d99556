"""CSV files for sources, read strictly and by one reader: the same rows on every engine, or an error.

RFC 4180 in UTF-8, with or without a byte order mark: fields parted by commas; one that holds a
comma, a quote or a line break stands in quotes, and doubles the quotes inside; a backslash is a
letter like any other; a line ends with `\\n`, `\\r\\n` or `\\r`. The first line names the columns. A
field has up to 131,072 characters: more are a quote that was never closed.
"""

from __future__ import annotations

import atexit
import csv
import gzip
import re
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import DataError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_BATCH_ROWS, _BATCH_CHARACTERS = 2**16, 2**24
_FIELD = r'(?:"[^"]*+(?:""[^"]*+)*+"|[^",\r\n]*+)'
_RECORD = re.compile(rf"{_FIELD}(?:,{_FIELD})*+[\r\n]*+")
_BOM = "\ufeff"
_PREFIX = "headwater-csv-"


def read_csv(
    spark: SparkSession,
    source: str | None,
    pattern: str,
    columns: Mapping[str, str],
    *,
    may_be_absent: bool = False,
) -> DataFrame:
    """The files of folder `source` that match `pattern`, gzipped or not, as one frame of strings.

    An empty field, quoted or not, is null; blank lines hold no row; spaces stay. Files may have
    further columns, in any order; what comes back has only `columns`, by their new names. The
    engine, which has to reach it, reads a Parquet file in the temporary folder (`tmp` in
    `HEADWATER_HOME`) that lives as long as this process.

    Args:
        pattern: a glob such as `views-2024-05-01*.csv*`. Only names that end in its suffix (`.csv`
            where it has none), or in that and `.gz`, are taken, and no hidden ones.
        columns: name in the files -> name in the frame.
        may_be_absent: no such file is a day without rows; otherwise it is an error.

    Raises:
        DataError: no such folder or file, a file that cannot be read or lacks a column, or a line
            that is not CSV; names file and line.
    """
    files = files_of(source, pattern)
    if not files and not may_be_absent:
        raise DataError(
            f"SOURCE {source} has no file {pattern}: put it there, or choose a day that it has"
        )
    schema = pa.schema([(name, pa.string()) for name in columns.values()])
    staged = _folder() / f"{uuid.uuid4().hex}.parquet"
    with pq.ParquetWriter(staged, schema) as writer:
        for file in files:
            for batch in batches(file, columns):
                writer.write_batch(batch)
    types = ", ".join(f"`{name}` string" for name in columns.values())
    return spark.read.schema(types).parquet(str(staged))


def files_of(source: str | None, pattern: str) -> list[Path]:
    """The files of folder `source` that `pattern` means, by path; see `read_csv`.

    Raises:
        DataError: there is no such folder, or it has a file both gzipped and not.
    """
    if source is None or not Path(source).is_dir():
        raise DataError(
            f"SOURCE is {source!r}: there is no such folder; name the folder of the raw logs"
        )
    suffix = re.search(r"\.[A-Za-z]+$", pattern.rstrip("*").removesuffix(".gz"))
    ends = suffix[0] if suffix else ".csv"
    found = {
        path
        for path in Path(source).glob(pattern)
        if path.name.removesuffix(".gz").endswith(ends)
        and not path.name.startswith(".")
        and path.is_file()
    }
    for path in sorted(found):
        if path.suffix == ".gz" and path.with_suffix("") in found:
            raise DataError(f"{path} is there without .gz as well: remove one of the two")
    return sorted(found)


def batches(file: Path, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """The rows of one file in its order, as strings; memory is bounded by a batch.

    Raises:
        DataError: as `read_csv`.
    """
    records = _records(file)
    _, _, header = next(records, (1, "", []))
    if not header:
        raise DataError(f"{file} is empty, without even a header: write one, or take the file away")
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{file} has two columns {name!r}: rename one")
    for name in columns:
        if name not in header:
            raise DataError(
                f"{file} has no column {name!r}: it has {', '.join(header)}; rename one, or mend the source"
            )
    places = [header.index(name) for name in columns]
    rows: list[list[str]] = []
    characters = 0

    def batch() -> pa.RecordBatch:
        by_place = list(zip(*rows, strict=True))
        arrays = [pa.array([v or None for v in by_place[p]], pa.string()) for p in places]
        return pa.RecordBatch.from_arrays(arrays, names=list(columns.values()))

    for line, text, fields in records:
        if len(fields) != len(header):
            raise DataError(
                f"{file}, line {line} has {len(fields)} fields, and the header {len(header)}: "
                "mend the line (a field that holds a comma stands in quotes)"
            )
        if fields[1:] == header[1:] and fields[0].removeprefix(_BOM) == header[0]:
            raise DataError(f"{file}, line {line} is the header once more: take that line out")
        rows.append(fields)
        characters += len(text)
        if len(rows) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch()
            rows.clear()
            characters = 0
    if rows:
        yield batch()


def _records(file: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Each record of `file` that is not blank: number of its first line, its text, its fields."""
    opened = gzip.open if file.suffix == ".gz" else open
    held: list[str] = []  # the lines of the record that is being read
    line = 1
    try:
        with opened(file, "rt", encoding="utf-8-sig", newline="") as lines:

            def read() -> Iterator[str]:
                for text in lines:
                    held.append(text)
                    yield text

            reader = csv.reader(read(), strict=True)
            for fields in reader:
                text = "".join(held)
                # the reader takes a quote inside a field without quotes for a letter
                if '"' in text and not _RECORD.fullmatch(text):
                    raise csv.Error("a quote inside a field that does not begin with one")
                if "\0" in text:
                    raise DataError(
                        f"{file}, line {line} holds a NUL byte: write the file as UTF-8"
                    )
                if fields:
                    yield line, text, fields
                line = reader.line_num + 1
                held.clear()
    except csv.Error as error:
        raise DataError(
            f"{file}, line {line} is not CSV ({error}): put a field that holds a quote in quotes, "
            'close them, and double those inside ("")'
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}, line {_undecodable_line(file)} is not UTF-8 ({error.reason}): convert the file"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file} cannot be read ({error}): put it right, or take it away"
        ) from error


def _undecodable_line(file: Path) -> int:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8", errors="surrogateescape", newline="") as lines:
        return next(n for n, text in enumerate(lines, 1) if re.search("[\udc80-\udcff]", text))


@cache
def _folder() -> Path:
    """A temporary folder of this process, removed at its end; a killed one's goes after a day."""
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if time.time() - old.stat().st_mtime > 24 * 3600:
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
