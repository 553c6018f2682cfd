# make train and make test do all the set-up that they need.
VENV := .venv
PYTHON := $(VENV)/bin/python
SYSTEM_PACKAGES := libgl1 libegl1 libgl1-mesa-dri libglib2.0-0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0

.PHONY: setup train quick test test-slow check format bench

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@if ! ldconfig -p | grep -q libEGL.so.1 || ! ldconfig -p | grep -q libGL.so.1; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES); \
	  else echo "rendering needs these system packages: $(SYSTEM_PACKAGES)"; exit 1; fi; fi
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: setup
	$(PYTHON) launch.py train

quick: setup
	$(PYTHON) launch.py train --config configs/quick.yaml

test: setup
	$(PYTHON) -m pytest -m "not slow" --numprocesses=2 --dist=loadgroup --cov --cov-report=term:skip-covered --cov-fail-under=90

test-slow: setup
	$(PYTHON) -m pytest -m slow

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTHON) -m pytest -q tests/test_house.py

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup
	$(PYTHON) launch.py bench env
	$(PYTHON) launch.py bench learner
	$(PYTHON) launch.py bench memory
