# Needs Python 3.11; everything else is installed into the checkout. Nothing but install uses the network.
PYTHON ?= python3.11
DATASET ?= simulated
SOURCE ?=
FROM ?=
TO ?=
AGAIN ?=
BACKWARDS ?=

PY := .venv/bin/python
SHELL := /bin/sh
LOCK_SUM := $(shell cksum < requirements.lock | cut -d' ' -f1)
STAMP := .venv/installed-$(LOCK_SUM)
LOG := .venv/install.log
OURS := dags feature_store jobs models
RANGE = $(if $(SOURCE),--source "$$SOURCE") $(if $(FROM),--first $(FROM)) $(if $(TO),--last $(TO)) $(if $(AGAIN),--again) $(if $(BACKWARDS),--backwards)

# bytecode is compiled by install; a run writes under HEADWATER_HOME only
export PYTHONDONTWRITEBYTECODE = 1
# the shell takes it from the environment: its name may hold what a shell would read
export SOURCE

# $(call step,what it is,command): one line with its time; the output only where it fails
define step
@begun=$$(date +%s); printf '%-32s' '$(1)'; \
if ( $(2) ) >$(LOG) 2>&1; then echo "$$(( $$(date +%s) - begun )) s"; rm -f $(LOG); \
else echo failed; cat $(LOG); exit 1; fi
endef

.PHONY: help install run test lint types ui report full-rebuild reproduce lock coverage stop clean
.DEFAULT_GOAL := help

help:
	@echo "make run      [DATASET=simulated] [SOURCE=dir] [FROM=day] [TO=day] [AGAIN=1] [BACKWARDS=1]   raw logs to report, through Airflow"
	@echo "make test     install, ruff, mypy, pytest"
	@echo "make ui       Airflow, MLflow and the Data Docs on loopback"
	@echo "make report   [DATASET=] TO=day                    the report again, without a run"
	@echo "make full-rebuild [DATASET=] TO=day                sequences of that day from all events"
	@echo "make reproduce RUN=<MLflow run>                    train it again from its pinned partitions"
	@echo "make install | lint | types | coverage | lock | stop | clean"

install: $(STAMP)
	@ls .jars/io.delta_delta-spark_*.jar >/dev/null 2>&1 || $(PY) -m jobs.spark jars  # Java may have come later
	@$(PY) -m compileall -q $(OURS)

$(STAMP): requirements.lock
	@case "$$(pwd -P)" in *%*) echo "error: the checkout's path holds '%': MLflow does not find its own files there; move the checkout"; exit 2; esac
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	{ echo "error: $(PYTHON) is not Python 3.11: install it, or give its path: make PYTHON=/path/to/python3.11"; exit 2; }
	@mkdir -p .venv
	$(call step,virtual environment,test -x .venv/bin/pip || $(PYTHON) -m venv .venv)
	$(call step,uv,test -x .venv/bin/uv || $(PY) -m pip install --quiet --disable-pip-version-check 'uv>=0.9$(comma)<1')
	$(call step,packages of requirements.lock,.venv/bin/uv pip sync --python $(PY) --compile-bytecode requirements.lock)
	@$(PY) -m jobs.spark jars
	@rm -f .venv/installed-*; touch $@

comma := ,

run: install
	@$(PY) -m jobs.local.run --dataset $(DATASET) $(RANGE)

ui: install
	@$(PY) -m jobs.local.ui

test: install lint types
	@$(PY) -m pytest

lint: install
	@.venv/bin/ruff check .

types: install
	@.venv/bin/mypy

coverage: install
	@$(PY) -m coverage run -m pytest; $(PY) -m coverage report

report: install
	@test -n "$(TO)" || { echo "error: TO is empty: name the day that the report ends with, make report TO=YYYY-MM-DD"; exit 2; }
	@$(PY) -m jobs report --dataset $(DATASET) --ds $(TO)

full-rebuild: install
	@test -n "$(TO)" || { echo "error: TO is empty: name the day to rebuild, make full-rebuild TO=YYYY-MM-DD"; exit 2; }
	@$(PY) -m jobs build_sequences --dataset $(DATASET) --ds $(TO) --full

reproduce: install
	@test -n "$(RUN)" || { echo "error: RUN is empty: name the MLflow run, make reproduce RUN=<id>"; exit 2; }
	@$(PY) -m jobs.reproduce $(RUN)

# the pins: again from setup.cfg; a pin stays while it satisfies it
lock:
	@.venv/bin/uv pip compile setup.cfg --extra test --override requirements.override \
	  --python-version 3.11 --universal --no-emit-index-url --custom-compile-command 'make lock' --quiet -o requirements.lock

stop:
	@$(PY) -m jobs.spark stop

# what install and the tools made; var/, which holds the results of runs, stays
clean:
	@test ! -x $(PY) || $(PY) -m jobs.spark stop
	@rm -rf .venv .jars .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	@find $(OURS) tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
