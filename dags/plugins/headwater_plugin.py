"""Airflow plugin: the mapper through which a day waits for the day before it.

Airflow loads this file as the module `headwater_plugin`, and DAG files import it by that name: a
serialized timetable refers to the class by its module, so there must be one of it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from airflow.partition_mappers.base import PartitionMapper
from airflow.plugins_manager import AirflowPlugin

from feature_store.days import shift


class NextDayMapper(PartitionMapper):
    """An asset's day D feeds a run of day D + 1. Keys are `YYYY-MM-DD`."""

    def to_downstream(self, key: str) -> str:
        """The day after `key`; raises DataError where `key` is not a day."""
        return shift(key, 1)

    def serialize(self) -> dict[str, Any]:
        """No state."""
        return {}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> NextDayMapper:
        """The inverse of `serialize`."""
        return cls()


class HeadwaterPlugin(AirflowPlugin):
    """Registers what timetables of ours are made of."""

    name = "headwater"
    partition_mappers: ClassVar[list[type[PartitionMapper]]] = [NextDayMapper]
