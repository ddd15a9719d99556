"""
### Ingest: a source's day becomes the tables `events` and `impressions`

Started by the clock at midnight of the dataset's zone for the day that ended, or by a backfill; days
in any order. Everything after it follows by itself, one day after the other.

**A range of days.** *Trigger → Backfill* in this page, or

    airflow backfill create --dag-id <dataset>_ingest --from-date 2024-05-01 --to-date 2024-05-10

(both ends are included). A run is about the day that is its **partition key**; a run started
without one is refused by its task.

**The source's data of a day was corrected.** Build that day and the days after it again:
`make run DATASET=<dataset> FROM=<day> TO=<last day> AGAIN=1`. A late event needs nothing: it
arrives on its later day.

**It failed.** The task's log ends in the reason. A missing or malformed file is not tried again:
mend it, then *Clear* the failed task here, or `make run` again.
"""

from airflow.sdk import DAG
from headwater_dags import build, chosen_stages

for _dataset, _stage in chosen_stages("ingest"):
    _dag: DAG = build(_dataset, _stage, __doc__)
    globals()[_dag.dag_id] = _dag
