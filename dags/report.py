"""
### Report: the page and the table that people read

Waits for the comparisons of every task on the day. Writes `index.html` and `report.json` of
everything up to the day, and logs both to MLflow. A day whose labels are too young to compare anything
has a report too: it says why.

No day depends on another: *Clear* any day to write it again.
"""

from airflow.sdk import DAG
from headwater_dags import build, chosen_stages

for _dataset, _stage in chosen_stages("report"):
    _dag: DAG = build(_dataset, _stage, __doc__)
    globals()[_dag.dag_id] = _dag
