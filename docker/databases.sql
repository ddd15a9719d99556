-- run once, on an empty volume; POSTGRES_DB has made "airflow"
CREATE DATABASE mlflow;
