"""The whole pipeline on one machine: Airflow started, driven and watched (`make run`), and its pages (`make ui`).

`airflow standalone` serves until it is stopped; a run has days to build, an end and an exit code.
"""
