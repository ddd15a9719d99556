"""What each task of the pipeline does: one module per task, `python -m jobs <job> --dataset D --ds DAY`."""
