"""
### Downstream: does a task's model gain from the user embeddings?

Waits for `user_embeddings` of the day alone (they imply its examples). Trains the task's small model
with and without the embeddings on the last days of matured examples, each with the embeddings
published the day before it, and tests on the newest matured day. MLflow has the gain in normalized
entropy with its interval and the rank of the embeddings among all features.

No day depends on another: *Clear* any day to run it again.
"""

from airflow.sdk import DAG
from headwater_dags import build, chosen_stages

for _dataset, _stage in chosen_stages("downstream_"):
    _dag: DAG = build(_dataset, _stage, __doc__)
    globals()[_dag.dag_id] = _dag
