"""Checks tables against expectations with Great Expectations, in memory. The only module that imports the package."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import numpy as np
import pandas as pd
from great_expectations.data_context.types import base

from stages.data.validation.expectations import Expectation
from stages.params.validate import Severity

SEVERITIES: dict[Severity, str] = {"stop": "critical", "quarantine": "warning", "note": "info"}
"""In the words of Great Expectations."""
COMPLETE = {
    "result_format": "COMPLETE",
    "unexpected_index_column_names": ["row"],
    "return_unexpected_index_query": False,
}


def failures(table: pd.DataFrame, expectations: Sequence[Expectation]) -> dict[str, np.ndarray]:
    """Checks every row of `table`.

    Returns:
        Name of each expectation → positions (int64, ascending) of the rows that fail it.

    Raises:
        RuntimeError: Great Expectations could not evaluate an expectation.
    """
    if table.empty or not expectations:
        return {expectation.name: np.empty(0, np.int64) for expectation in expectations}
    rows = table.assign(row=np.arange(len(table)))
    suite = gx.ExpectationSuite(name="suite", expectations=list(map(_as_gx, expectations)))
    results = {result.expectation_config.meta["name"]: result for result in _validator()(rows, suite).results}
    return {expectation.name: _failing_rows(results[expectation.name]) for expectation in expectations}


def _as_gx(expectation: Expectation) -> Any:
    kind, arguments = expectation.check
    return getattr(gxe, kind)(
        column=expectation.column,
        severity=SEVERITIES[expectation.severity],
        meta={"name": expectation.name, "reason": expectation.reason},
        **arguments,
    )


def _failing_rows(result: Any) -> np.ndarray:
    name = result.expectation_config.meta["name"]
    if result.exception_info.get("raised_exception"):
        raise RuntimeError(f"{name}: {result.exception_info['exception_message']}")
    rows = np.array([row["row"] for row in result.result["unexpected_index_list"]], dtype=np.int64)
    # Great Expectations cuts some of its lists (`unexpected_list` at 200); a cut one must not pass for whole.
    if len(rows) != result.result["unexpected_count"]:
        raise RuntimeError(f"{name}: only {len(rows)} of the failing rows are listed")
    return np.sort(rows)


@cache
def _validator() -> Callable[[pd.DataFrame, gx.ExpectationSuite], Any]:
    """A function (table, suite) → result."""
    config = base.DataContextConfig(
        # In memory altogether: the default keeps a folder for Data Docs outside the checkout.
        store_backend_defaults=base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        progress_bars=base.ProgressBarsConfig(globally=False),
        analytics_enabled=False,
    )
    context = gx.get_context(mode="ephemeral", project_config=config)
    asset = context.data_sources.add_pandas("rows").add_dataframe_asset("rows")
    whole = asset.add_batch_definition_whole_dataframe("whole")

    def validate(table: pd.DataFrame, suite: gx.ExpectationSuite) -> Any:
        return whole.get_batch(batch_parameters={"dataframe": table}).validate(suite, result_format=COMPLETE)

    return validate
