"""
### Upstream: the user models of a day, and the embeddings they publish

Waits for `examples` of the day **and** `models` of the day before, so training goes in order of days.
One task per model, in the pool `devices` (as many slots as there are devices):

1. *evaluate*: the labels that became final today judge the snapshot that was live when their targets
   were shown;
2. *train*: from the champion of the day before;
3. *gate*: the candidate against that champion on held-out users; a rejected one leaves the champion;
4. *publish*: `user_embeddings` of every user in the history window.

`models` and `user_embeddings` of the day are announced when **all** models are done. Figures, plots and
the gate's decision are in MLflow, under the experiment of the dataset and model.

**It failed.** The days after it wait; *Clear* the failed task or `make run` again. **Train again from
a day on**: `make run DATASET=<dataset> FROM=<day> TO=<last day> AGAIN=1`.
"""

from airflow.sdk import DAG
from headwater_dags import build, chosen_stages

for _dataset, _stage in chosen_stages("upstream"):
    _dag: DAG = build(_dataset, _stage, __doc__)
    globals()[_dag.dag_id] = _dag
