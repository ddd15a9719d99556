"""The quality gate: a Great Expectations suite per table, derived from the contract and the spec.

A suite runs in process, over a narrow pandas frame of the staged rows (`checked`): no engine, one
pass over the files, and a tenth of a second for a small partition. The page of every validation is
kept as a static file, `<docs_root>/<table>/<ds>.html`; a refused one as `<ds>.refused.html` beside
the page of the partition that stays. Nothing else is written.

Great Expectations takes seconds to import: `warm_up` does it in the background, while the engine
computes what is to be validated.
"""

from __future__ import annotations

import html
import importlib
import os
import threading
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads

from feature_store.errors import QualityError
from feature_store.expectations import Expect
from feature_store.faults import FAULTS, Faults, check_incomplete
from feature_store.spec import Dataset, IdType
from feature_store.tables import KINDS, contract

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations import ExpectationSuite
    from great_expectations.core import (
        ExpectationSuiteValidationResult,
        ExpectationValidationResult,
    )

_importing = threading.Lock()
_BATCH_ROWS = 65_536
_SHOWN = 3
_NAMES = ("stream", "target", "task", "snapshot", "shown_ds", *FAULTS)
_REMEDIES = {
    "incomplete": "drop these rows at the source, or give them the missing value of their kind",
    "out_of_range": "mend these values at the source",
    "misaligned": "arrays of one group are built from the same rows, in the same order",
    "unordered": "sort the history by (available_time, stream, event_id)",
    "leaks": "a target sees exactly the events with available_time < as_of",
}


def warm_up() -> threading.Thread:
    """Import Great Expectations in the background; `join` the thread before using it."""
    thread = threading.Thread(
        target=_great_expectations, name="import great_expectations", daemon=True
    )
    thread.start()
    return thread


def suite(dataset: Dataset, table: str, ds: str) -> ExpectationSuite:
    """What has to hold of the partition `ds` of `table`, as seen by `checked`.

    Raises:
        SpecError: the dataset has no such table.
    """
    _great_expectations()
    from great_expectations import ExpectationSuite
    from great_expectations import expectations as gxe

    shape = contract(dataset, table)
    kind, expect = KINDS[table], Expect()

    found: list[Any] = [
        gxe.ExpectColumnValuesToBeNull(column=fault, meta={"remedy": _REMEDIES[fault]})
        for fault in kind.faults
    ]
    duplicates = {"remedy": "drop duplicates by the key before publishing"}
    if len(shape.key) == 1:
        found.append(gxe.ExpectColumnValuesToBeUnique(column=shape.key[0], meta=duplicates))
    else:
        found.append(
            gxe.ExpectCompoundColumnsToBeUnique(column_list=list(shape.key), meta=duplicates)
        )
    ids = [("user_id", dataset.user_id_type), ("item_id", dataset.item_id_type)]
    if dataset.target_id_type is IdType.STRING:  # a number may be a hash, and below 0
        ids.append(("target_id", IdType.STRING))
    for column, id_kind in ids:
        remedy = "an id is not negative and not empty; drop the row at the source, or give it an id"
        if column in kind.plain or column in shape.key:
            found.append(
                expect.between(column, 0, None, remedy)
                if id_kind is IdType.INT64
                else gxe.ExpectColumnValueLengthsToBeBetween(
                    column=column, min_value=1, meta={"remedy": remedy}
                )
            )
    found += kind.expectations(dataset, ds, expect)
    return ExpectationSuite(name=f"{dataset.name}.{table}", expectations=found)


def checked(dataset: Dataset, table: str, ds: str, batch: pa.RecordBatch) -> pa.RecordBatch:
    """What the suite of `table` looks at of a batch: key, plain and fault columns, one row per row."""
    kind, shape = KINDS[table], contract(dataset, table)
    columns = {f.name: batch.column(f.name) for f in shape.schema if f.name in batch.schema.names}
    faults = Faults(batch.num_rows, kind.faults)
    check_incomplete(shape.schema, columns, faults)
    kind.check(dataset, ds, columns, faults)
    kept = {n: columns[n] for n in dict.fromkeys((*shape.key, *kind.plain))}
    # A null key or time is a fault already; filled, the column keeps its integer type in pandas.
    kept = {n: c.fill_null(-1) if pa.types.is_integer(c.type) else c for n, c in kept.items()}
    kept |= {n: pa.array(c, pa.string()) for n, c in faults.columns.items()}
    kept = {n: c.dictionary_encode() if n in _NAMES else c for n, c in kept.items()}
    return pa.RecordBatch.from_pydict(kept)


def validate(
    dataset: Dataset, table: str, ds: str, data: pads.Dataset, *, docs_root: Path, model: str = ""
) -> None:
    """Run the suite of `table` over the rows of `data`, and keep the page.

    Args:
        data: the staged files, without their partition columns. Read once, in bounded batches; what
            is kept of a row is its key, times and faults.
        docs_root: where pages are kept.
        model: of the partition, where the table is partitioned by model.

    Raises:
        QualityError: names table, day, expectation, value and a few offending keys.
    """
    rows = _frame(dataset, table, ds, data)
    context = _great_expectations()
    name = f"{dataset.name}.{table}"
    source = context.data_sources.add_or_update_pandas("staged")
    batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe(ds)
    result = batch.get_batch({"dataframe": rows}).validate(
        suite(dataset, table, ds),
        result_format={"result_format": "SUMMARY", "partial_unexpected_count": 20},
    )
    _keep_page(
        result, docs_root, Path(table) / model, ds, title=f"{name} {model} {ds}".replace("  ", " ")
    )
    failed = [r for r in result.results if not r.success]
    if failed:
        raise QualityError(_sentence(dataset, table, ds, model, rows, failed))


def _great_expectations() -> Any:
    with _importing:  # several threads may want it at once
        return _context()


@cache
def _context() -> Any:
    """An ephemeral context that reports to nobody and draws no progress bars."""
    # Set before the import, which reads it; an ephemeral context keeps no other configuration.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    gx = importlib.import_module("great_expectations")
    base = importlib.import_module("great_expectations.data_context.types.base")
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = base.ProgressBarsConfig(
        globally=False, metric_calculations=False
    )
    return context


def _frame(dataset: Dataset, table: str, ds: str, data: pads.Dataset) -> pd.DataFrame:
    partitioned_by = contract(dataset, table).partitioned_by
    columns = [n for n in contract(dataset, table).schema.names if n not in partitioned_by]
    empty = pa.RecordBatch.from_pylist(
        [], schema=pa.schema([data.schema.field(c) for c in columns])
    )
    scanner = data.scanner(
        columns=columns, batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=1
    )
    batches = [checked(dataset, table, ds, b) for b in scanner.to_batches() if b.num_rows]
    narrow = pa.Table.from_batches(batches or [checked(dataset, table, ds, empty)])
    return narrow.unify_dictionaries().to_pandas()


def _sentence(
    dataset: Dataset,
    table: str,
    ds: str,
    model: str,
    rows: pd.DataFrame,
    failed: list[ExpectationValidationResult],
) -> str:
    first = failed[0]
    config, outcome = first.expectation_config, first.result
    arguments = {
        k: v for k, v in config.kwargs.items() if k not in ("batch_id", "strict_min", "strict_max")
    }
    columns = [arguments.pop(k) for k in ("column", "column_A", "column_B") if k in arguments]
    columns = arguments.pop("column_list", columns)
    limits = ", ".join(f"{k} {_plain(v)}" for k, v in arguments.items() if v is not None)
    values = outcome.get("partial_unexpected_list", [])
    if values:
        count = f"{outcome['unexpected_count']} of {outcome['element_count']} rows"
        shown = values[0]
        bad = _offending(rows, columns, values)
        key = list(contract(dataset, table).key)
        keys = "; ".join(
            ", ".join(f"{k} {v}" for k, v in row.items())
            for row in bad[key].drop_duplicates().head(_SHOWN).to_dict("records")
        )
        what = f"fails for {count}, value {shown}, at {keys}"
    elif "observed_value" in outcome:
        what = f"fails with {outcome['observed_value']}"
    else:
        what = f"could not be computed ({first.exception_info})"
    others = f" ({len(failed) - 1} more expectations fail)" if len(failed) > 1 else ""
    name = f"{dataset.name}.{table}" + (f" of model {model}" if model else "")
    return (
        f"{name} {ds}: {config.type}({', '.join(columns)}{'; ' + limits if limits else ''}) {what}{others}: "
        f"{(config.meta or {}).get('remedy', 'mend the source')}; nothing was published"
    )


def _plain(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _offending(rows: pd.DataFrame, columns: list[str], values: list[Any]) -> pd.DataFrame:
    """The rows that hold one of the unexpected `values` of `columns`."""
    if len(columns) == 1:
        return rows[rows[columns[0]].isin(values)]
    wanted = {tuple(v.values()) if isinstance(v, dict) else tuple(v) for v in values}
    return rows[[tuple(v) in wanted for v in rows[columns].itertuples(index=False)]]


def _keep_page(
    result: ExpectationSuiteValidationResult, docs_root: Path, folder: Path, ds: str, *, title: str
) -> None:
    """Render one validation with Great Expectations' own views, and link it from the index."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer

    result.meta["run_id"] = {
        "run_name": title,
        "run_time": result.meta["batch_markers"]["ge_load_time"],
    }
    page = _view().render(ValidationResultsPageRenderer().render(result))
    home = docs_root / folder
    home.mkdir(parents=True, exist_ok=True)
    up = "../" * len(folder.parts)
    page = page.replace("../../../../index.html", f"{up}index.html")
    refused = home / f"{ds}.refused.html"
    _replace(home / f"{ds}.html" if result.success else refused, page)
    if result.success:
        refused.unlink(missing_ok=True)
    _replace(docs_root / "index.html", _index(docs_root))


@cache
def _view() -> Any:
    """Great Expectations' page view; each one compiles its templates anew, which costs as much as a suite."""
    from great_expectations.render.view import DefaultJinjaPageView

    return DefaultJinjaPageView()


def _index(docs_root: Path) -> str:
    tables: dict[str, list[str]] = {}
    for path in sorted(docs_root.glob("*/**/*.html")):
        link = path.relative_to(docs_root)
        style = ' style="color:#b00020"' if path.name.endswith(".refused.html") else ""
        entry = f'<a href="{html.escape(str(link))}"{style}>{html.escape(path.stem)}</a>'
        tables.setdefault(str(link.parent), []).append(entry)
    rows = "".join(
        f"<tr><th>{html.escape(t)}</th><td>{' '.join(links)}</td></tr>"
        for t, links in tables.items()
    )
    return (
        '<!doctype html><meta charset="utf-8"><title>Data quality</title>'
        "<style>body{font:15px sans-serif;margin:2em}th{text-align:left;padding:.4em 1em .4em 0;"
        "vertical-align:top}td a{margin-right:.6em;white-space:nowrap}</style>"
        f"<h1>Data quality: {html.escape(docs_root.name)}</h1>"
        "<p>The newest validation of each partition; red: refused, the partition stayed as it was.</p>"
        f"<table>{rows}</table>"
    )


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
