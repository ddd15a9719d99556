"""`python -m jobs <job> [<job> ...] --dataset D --ds DAY`: see `jobs/context.py`."""

from __future__ import annotations

from jobs.context import main

if __name__ == "__main__":
    main()
