"""Random small worlds through all feature jobs give what a naive reference says, on both engines.

Hypothesis shrinks what fails to a small world. The few worlds tried here are the same every time; to try
others, and more of them:

    ORACLE_WORLDS=200 .venv/bin/python -m pytest tests/integration/test_oracle.py -s
"""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import HealthCheck, given, settings

from tests.differential import check
from tests.worlds import World, worlds

MORE = int(os.environ.get("ORACLE_WORLDS", "0"))


@pytest.mark.parametrize("engine", ["sail", "spark"], indirect=True)
def test_every_column_of_every_table_is_the_reference(engine, spark, settings_of, tmp_path):
    count = itertools.count()

    @settings(
        max_examples=MORE or {"sail": 4, "spark": 1}[engine],
        derandomize=not MORE,
        suppress_health_check=list(HealthCheck),
    )
    @given(world=worlds())
    def agree(world: World) -> None:
        check(world, spark, settings_of(engine), tmp_path / str(next(count)))

    agree()
