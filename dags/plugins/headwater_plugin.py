"""Airflow plugin: the mapper through which a day waits for a day's assets.

Airflow loads this file as the module `headwater_plugin`, and DAG files import it by that name: a
serialized timetable refers to the class by its module, so there must be one of it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from airflow.partition_mappers.base import PartitionMapper
from airflow.plugins_manager import AirflowPlugin

from feature_store.days import add_days


class DayMapper(PartitionMapper):
    """An asset's day D feeds a run of day D + `days`. Keys are `YYYY-MM-DD`.

    Args:
        days: 0 or more.
        launch: what started the scheduler. A run that waits with one of its inputs there was told of it
            under a launch; Airflow drops waits whose mappers are not those of now, so that a day which
            is built again does not start on an input of the time before.
    """

    def __init__(self, days: int = 0, launch: str = "") -> None:
        self.days, self.launch = days, launch

    def to_downstream(self, key: str) -> str:
        """The day that `key` feeds; raises DataError where `key` is not a day."""
        return add_days(key, self.days)

    def serialize(self) -> dict[str, Any]:
        """The arguments."""
        return {"days": self.days, "launch": self.launch}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> DayMapper:
        """The inverse of `serialize`."""
        return cls(**data)


class HeadwaterPlugin(AirflowPlugin):
    """Registers what timetables of ours are made of."""

    name = "headwater"
    partition_mappers: ClassVar[list[type[PartitionMapper]]] = [DayMapper]
