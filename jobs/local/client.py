"""Airflow's REST API, as far as a run needs it: some ten calls, and what a busy SQLite is asked again.

The client that Airflow generates from its API would be a dependency for these; it does not ask again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from feature_store.errors import TransientError

_PAGE = 100
_TRIES = 5

ACTIVE = ("queued", "running")
_IN_A_WORKER = ("queued", "running", "restarting")
BACKFILL_DAYS = 2  # of a backfill that run at once


@dataclass(frozen=True, kw_only=True)
class DagRun:
    """One run of a DAG. `day` is its partition key, "" where it has none."""

    dag_id: str
    run_id: str
    day: str
    state: str
    created: str  # ISO instant, orders the runs of one day
    ended: str | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task of a run."""

    dag_id: str
    run_id: str
    task_id: str
    state: str
    attempt: int
    seconds: float | None


class AirflowError(RuntimeError):
    """Airflow refused a request. `status` is its HTTP status, 0 for no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class AirflowSilent(AirflowError, TransientError):
    """Airflow did not answer, however often it was asked."""


class _Busy(RuntimeError):
    """An answer that another try may better: SQLite answers 503 or 500 while another process holds it."""


_RETRYING = Retrying(
    retry=retry_if_exception_type((httpx.TransportError, _Busy)),
    wait=wait_exponential(multiplier=0.5),
    stop=stop_after_attempt(_TRIES),
    reraise=True,
)


class AirflowClient:
    """A client of the api-server at `url` (no token: services are on loopback, for one person).

    Args:
        explain: raises what lies under a server that does not answer, where that is known.
    """

    def __init__(self, url: str, explain: Callable[[], None] = lambda: None) -> None:
        self._explain = explain
        self._http = httpx.Client(base_url=url, timeout=60)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def request(self, method: str, path: str, *, api: str = "/api/v2", **kwargs: Any) -> Any:
        """The JSON that the API answers; a busy database is asked again.

        Raises:
            AirflowError: with the API's own words.
            AirflowSilent: no answer, or none that makes sense, and nothing explains it.
        """
        try:
            return _RETRYING(self._answer, method, f"{api}{path}", **kwargs)
        except (httpx.TransportError, _Busy) as error:
            self._explain()
            raise AirflowSilent(
                f"Airflow did not answer {method} {path} {_TRIES} times, the last time by "
                f"{type(error).__name__.removeprefix('_')}: {error}: see airflow/services/ in "
                "HEADWATER_HOME and run the same command again, it goes on from here"
            ) from None

    def _answer(self, method: str, path: str, **kwargs: Any) -> Any:
        answer = self._http.request(method, path, **kwargs)
        if answer.status_code >= 500:
            raise _Busy(f"{answer.status_code}: {answer.text[:500]}")
        if answer.is_error:
            said = f"{method} {path}: {answer.status_code}: {answer.text[:500]}"
            raise AirflowError(said, answer.status_code)
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise _Busy(f"no JSON: {answer.text[:500]}") from None

    def healthy(self) -> bool:
        """Whether the api-server answers."""
        try:
            return self._http.get("/api/v2/monitor/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def warm_up_execution(self) -> None:
        """Have the api-server load what tasks talk to, which takes seconds the first time.

        Where it takes longer still, the first tasks find it loaded or are tried again.
        """
        with contextlib.suppress(httpx.TransportError):
            self._http.get("/execution/health", timeout=120)

    def parsed(self, dag_ids: Iterable[str], since: datetime) -> set[str]:
        """Those of `dag_ids` that were parsed after `since` and are neither stale nor paused."""
        found = self.request("GET", "/dags", params={"limit": 1000, "exclude_stale": True})["dags"]
        return {
            d["dag_id"]
            for d in found
            if d["dag_id"] in set(dag_ids)
            and not d["is_paused"]
            and d["last_parsed_time"]
            and _instant(d["last_parsed_time"]) >= since
        }

    def import_errors(self, since: datetime) -> list[str]:
        """What went wrong in parsing DAG files after `since`: `file: last line of the traceback`."""
        found = self.request("GET", "/importErrors", params={"limit": _PAGE})["import_errors"]
        return [
            f"{e['filename']}: {e['stack_trace'].strip().splitlines()[-1]}"
            for e in found
            if _instant(e["timestamp"]) >= since
        ]

    def unpause(self, dag_id: str) -> None:
        """A paused DAG loses asset events for ever."""
        self.request(
            "PATCH",
            f"/dags/{dag_id}",
            params={"update_mask": "is_paused"},
            json={"is_paused": False},
        )

    def set_pool(self, name: str, slots: int, description: str) -> None:
        """Create or resize a pool."""
        body = {"slots": slots, "description": description, "include_deferred": False}
        try:
            self.request("POST", "/pools", json=body | {"name": name})
        except AirflowError as error:
            if error.status != 409:
                raise
            self.request("PATCH", f"/pools/{name}", json=body | {"pool": name})

    def runs(
        self,
        dag_ids: Sequence[str],
        states: Sequence[str] = (),
        ended_since: datetime | None = None,
    ) -> list[DagRun]:
        """Runs of `dag_ids`, those in `states` or ended since then where given."""
        body: dict[str, Any] = {"dag_ids": list(dag_ids)}
        if states:
            body["states"] = list(states)
        if ended_since:
            body["end_date_gte"] = ended_since.isoformat()
        return [
            DagRun(
                dag_id=r["dag_id"],
                run_id=r["dag_run_id"],
                day=r["partition_key"] or "",
                state=r["state"],
                created=r["queued_at"] or r["run_after"],
                ended=r["end_date"],
                seconds=r["duration"],
            )
            for r in self._pages("/dags/~/dagRuns/list", "dag_runs", body)
        ]

    def tasks(
        self,
        dag_ids: Sequence[str],
        states: Sequence[str] = (),
        ended_since: datetime | None = None,
    ) -> list[TaskRun]:
        """Tasks of runs of `dag_ids`, those in `states` or ended since then where given."""
        body: dict[str, Any] = {"dag_ids": list(dag_ids)}
        if states:
            body["state"] = list(states)
        if ended_since:
            body["end_date_gte"] = ended_since.isoformat()
        return [
            TaskRun(
                dag_id=t["dag_id"],
                run_id=t["dag_run_id"],
                task_id=t["task_id"],
                state=t["state"] or "waiting",
                attempt=t["try_number"],
                seconds=t["duration"],
            )
            for t in self._pages("/dags/~/dagRuns/~/taskInstances/list", "task_instances", body)
        ]

    def _pages(self, path: str, key: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = self.request(
                "POST", path, json={**body, "page_offset": len(found), "page_limit": _PAGE}
            )
            found += page[key]
            if not page[key] or len(found) >= (page["total_entries"] or 0):
                return found

    def backfill(
        self, dag_id: str, first: str, last: str, *, again: bool, backwards: bool = False
    ) -> None:
        """Start a backfill of the days from `first` to `last`, both included.

        Args:
            again: make runs beside those that are over; otherwise only days without a run get one.
            backwards: the last day first. What follows goes in the order of days all the same.

        Raises:
            AirflowError: for one (409), another backfill of the DAG is active.
        """
        body = {
            "dag_id": dag_id,
            "from_date": f"{first}T00:00:00Z",
            "to_date": f"{last}T00:00:00Z",
            "reprocess_behavior": "completed" if again else "none",
            "max_active_runs": BACKFILL_DAYS,
            "run_backwards": backwards,
        }
        self.request("POST", "/backfills", json=body)

    def trigger(self, dag_id: str, day: str) -> None:
        """Start a run of a day."""
        self.request(
            "POST", f"/dags/{dag_id}/dagRuns", json={"logical_date": None, "partition_key": day}
        )

    def restart(self, run: DagRun) -> None:
        """Run the failed tasks of a run again and what follows them in it; all, where it failed unstarted."""
        path = f"/dags/{run.dag_id}/dagRuns/{run.run_id}"
        tasks = self.request("GET", f"{path}/taskInstances")["task_instances"]
        failed = any(t["state"] in ("failed", "upstream_failed") for t in tasks)
        self.request("POST", f"{path}/clear", json={"dry_run": False, "only_failed": failed})

    def end(self, run: DagRun) -> None:
        """End an active run, as failed."""
        path = f"/dags/{run.dag_id}/dagRuns/{run.run_id}"
        self.request("PATCH", path, json={"state": "failed"})

    def clear_interrupted(self, run: DagRun) -> None:
        """Have tasks that nobody runs any more, as their scheduler is dead, run again; no retry is used up.

        Airflow clears a running task by asking its worker to end it: failed first, it is cleared at once.
        A run whose every task succeeded has succeeded, though its scheduler did not live to say so: its
        assets were told to waits of before, and are announced again only where it is done.
        """
        path = f"/dags/{run.dag_id}/dagRuns/{run.run_id}"
        states = {
            t["task_id"]: t["state"]
            for t in self.request("GET", f"{path}/taskInstances")["task_instances"]
        }
        for task, state in states.items():
            if state in _IN_A_WORKER:
                self.request("PATCH", f"{path}/taskInstances/{task}", json={"new_state": "failed"})
        if states and set(states.values()) == {"success"}:
            self.request("PATCH", path, json={"state": "success"})
        if any(state in (*_IN_A_WORKER, "failed") for state in states.values()):
            self.restart(run)

    def waits(self, dag_ids: Iterable[str], until: datetime) -> int:
        """How many runs of `dag_ids` have waited since before `until` for the rest of their inputs."""
        rows = self.request(
            "GET", "/partitioned_dag_runs", api="/ui", params={"has_created_dag_run_id": False}
        )["partitioned_dag_runs"]
        ids = set(dag_ids)
        return sum(r["dag_id"] in ids and _instant(r["created_at"]) < until for r in rows)

    def post_event(self, asset: str, day: str) -> None:
        """Say that `asset` of `day` is there.

        Raises:
            AirflowError: no DAG declares the asset.
        """
        found = self.request("GET", "/assets", params={"name_pattern": asset, "limit": _PAGE})[
            "assets"
        ]
        ids = [a["id"] for a in found if a["name"] == asset]
        if not ids:
            raise AirflowError(f"asset {asset!r} is not known to Airflow")
        self.request("POST", "/assets/events", json={"asset_id": ids[0], "partition_key": day})


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)
