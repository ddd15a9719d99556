"""The whole pipeline on one machine: Airflow started, driven and watched (`make run`), and its pages (`make ui`)."""
