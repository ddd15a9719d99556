"""
### Features: histories, user and item features, examples, labels

Waits for `events` of the day **and** `sequences` of the day before: each day's histories build on
those of the day before, so days run in order however they arrive.

| task | writes |
|---|---|
| `history` | `sequences` (each user's last events), `aggregates`, `item_aggregates` |
| `examples` | `examples` (user-days: history and targets), `labels` that became final on the day |

Each table passes its quality suite before it is published; a suite that fails names table,
expectation and offending keys, and the partition that was there before stays.

**It failed.** The days after it wait. Mend the cause and *Clear* the failed task (or `make run`
again): the day goes on where it stopped, and the days after it follow.

**Clearing a day that succeeded** builds its tables again but does not rebuild the days after it,
for which Airflow would wait for both of their inputs. To build again from a day on:
`make run DATASET=<dataset> FROM=<day> TO=<last day> AGAIN=1`.

**The very first day** has no day before it: `make run` posts `sequences` of the day before as an
asset event. In a deployment, do so once: *Assets → `<dataset>.sequences` → Create event*, with that
day as the partition key, and the same for `<dataset>.models`.
"""

from airflow.sdk import DAG
from headwater_dags import build, chosen_stages

for _dataset, _stage in chosen_stages("features"):
    _dag: DAG = build(_dataset, _stage, __doc__)
    globals()[_dag.dag_id] = _dag
