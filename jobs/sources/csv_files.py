"""CSV files as Spark frames, for sources: what is missing or unreadable is named with its file."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.errors import DataError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def read_csv(
    spark: SparkSession,
    source: str | None,
    pattern: str,
    columns: Mapping[str, str],
    *,
    may_be_absent: bool = False,
) -> DataFrame:
    """The files of folder `source` that match `pattern`, gzipped or not, as one frame of strings.

    An empty field is null. Files may have further columns; what comes back has only `columns`, by
    their new names.

    Args:
        pattern: a glob such as `views-2024-05-01*.csv*`; each file has a header and the same columns.
        columns: name in the files -> name in the frame.
        may_be_absent: no such file is a day without rows; otherwise it is an error.

    Raises:
        DataError: no such folder or file, a file that cannot be read, or one without a column.
    """
    if source is None or not Path(source).is_dir():
        raise DataError(
            f"SOURCE is {source!r}: there is no such folder; name the folder of the raw logs"
        )
    files = sorted(p for p in Path(source).glob(pattern) if p.is_file() and p.stat().st_size)
    if not files:
        if not may_be_absent:
            raise DataError(
                f"SOURCE {source} has no file {pattern}: put it there, or choose a day that it has"
            )
        schema = ", ".join(f"`{name}` string" for name in columns.values())
        return spark.createDataFrame([], schema)
    first = _header(files[0])
    for file in files:
        header = _header(file)
        for name in columns:
            if name not in header:
                raise DataError(
                    f"{file} has no column {name!r}: it has {', '.join(header)}; rename one, or mend the source"
                )
        if header != first:
            raise DataError(
                f"{file} has other columns than {files[0]}: write them with the same header"
            )
    schema = ", ".join(f"`{name}` string" for name in first)
    plain = [str(f) for f in files if f.suffix != ".gz"]
    zipped = [str(f) for f in files if f.suffix == ".gz"]
    # Sail refuses to read both in one go
    parts = [spark.read.csv(p, schema=schema, header=True) for p in (plain, zipped) if p]
    raw = reduce(lambda one, other: one.unionByName(other), parts)
    return raw.selectExpr(*(f"nullif(`{name}`, '') AS `{to}`" for name, to in columns.items()))


def _header(file: Path) -> list[str]:
    try:
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8-sig", newline="") as lines:
            return next(csv.reader(lines), [])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}): put it right, or take it away"
        ) from error
