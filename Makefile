# On a machine that has git, make and Python >= 3.11: `make repro`, then `make test`. The rest: `make help`.
SHELL := /bin/sh
.DEFAULT_GOAL := help
include environment.mk
# Bytecode goes to .synset/pycache; without it every stage would compile all that it imports again.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(CURDIR)/.venv/bin
# The commands in dvc.yaml begin with a plain `python`.
export PATH := $(BIN):$(PATH)
# uv takes the Python that is here and never fetches another.
export UV_PYTHON_DOWNLOADS := never
UV_VERSION := 0.13.9
QUIETLY := --quiet --no-cache-dir --disable-pip-version-check
UV = $(or $(shell command -v uv),$(CURDIR)/.synset/uv/bin/uv)
# Run, not only looked up: a pyenv shim exists also for versions that are not switched on. Never the one of .venv, which
# is removed where a setup was cut off.
PYTHON = $(shell PATH='$(subst $(BIN):,,$(PATH))'; for name in python3.13 python3.12 python3.11 python3; do \
  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then command -v $$name; break; fi; done)
FOLDERS = $(foreach folder,stages pipelines tests bench,$(if $(wildcard $(folder)/*.py),$(folder)))
# What .venv was made from; it also holds the place, because the scripts of a moved .venv call the old one.
LOCKED = $(shell cksum < requirements.lock) $(CURDIR)
# Packages whose version decides the bytes of stages' outputs: stages/versions/*.txt are dependencies in dvc.yaml.
DATA_PACKAGES := great-expectations|jinja2|markupsafe|numpy|opencv-python-headless|pandas|pillow|pyarrow|scipy|simplejpeg
TRAINING_PACKAGES := numpy|nvidia-dali-cuda130|opencv-python-headless|safetensors|simplejpeg|torch|torchvision
EVALUATION_PACKAGES := captum|matplotlib|statsmodels

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s  %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: ## the environment .venv from requirements.lock; remade only when the lock changed
	@test "$$(cat .venv/.locked 2>/dev/null)" = "$(LOCKED)" || $(MAKE) --no-print-directory environment

.PHONY: environment
environment: uv
	@head -qn 1 .venv/bin/dvc 2>/dev/null | grep -qF "$(BIN)/" || rm -rf .venv
	@rm -f .venv/.locked
	@test -x .venv/bin/python || "$(UV)" venv --quiet --no-project --python "$(PYTHON)" .venv
	"$(UV)" pip sync --quiet --require-hashes --python .venv/bin/python requirements.lock
	@sed -i '/^# synset$$/,$$d' .venv/bin/activate
	@.venv/bin/python -m pipelines.environment >> .venv/bin/activate
# A setting of DVC for whoever calls .venv/bin/dvc without any of these; a relative path would be one of the working directory.
	@.venv/bin/dvc config --quiet --local core.site_cache_dir "$(CURDIR)/.synset/dvc"
	@echo "$(LOCKED)" > .venv/.locked

.PHONY: uv
uv: # the one on PATH, else our own; venv and pip are two packages of their own on Debian, so either will do
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer (looked for python3.13, python3.12, python3.11, python3);" \
	  "install one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v "$(UV)" >/dev/null || { mkdir -p .synset && rm -rf .synset/uv && \
	  if "$(PYTHON)" -m venv .synset/uv 2>/dev/null; \
	  then .synset/uv/bin/python -m pip install $(QUIETLY) uv==$(UV_VERSION); \
	  else PIP_ROOT_USER_ACTION=ignore "$(PYTHON)" -m pip install $(QUIETLY) --target .synset/uv uv==$(UV_VERSION); fi; } || \
	  { echo "error: uv could not be installed with $(PYTHON) (is there a network?); install uv yourself, or Python's venv or pip" >&2; \
	  exit 1; }

.PHONY: lock
lock: uv ## requirements.lock from pyproject.toml, and stages/versions/ from the lock
	"$(UV)" pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --quiet --output-file requirements.lock
	@mkdir -p stages/versions
	@grep -oE '^($(DATA_PACKAGES))==[^ ]+' requirements.lock > stages/versions/data.txt
	@grep -oE '^($(TRAINING_PACKAGES))==[^ ]+' requirements.lock > stages/versions/training.txt
	@grep -oE '^($(EVALUATION_PACKAGES))==[^ ]+' requirements.lock > stages/versions/evaluation.txt

.PHONY: repro
repro: setup ## everything that is not up to date, from images to a model under review (dvc repro)
	@$(BIN)/python -m stages.params.all
	@$(BIN)/dvc repro
	@$(BIN)/python -m pipelines.summary

.PHONY: test
test: setup ## the tests, without those marked slow or gpu
# A test that hangs is named after half an hour, with every thread's stack, and its worker ends; one more would run it again.
	@$(BIN)/pytest -o faulthandler_timeout=1800 -o faulthandler_exit_on_timeout=true --max-worker-restart=0

.PHONY: slow
slow: setup ## the tests that take minutes (CONTRIBUTING.md says what each proves)
	@$(BIN)/pytest -m slow -n 0 --durations 0 --durations-min 1

.PHONY: lint
lint: setup ## ruff and mypy
	@$(BIN)/ruff check $(FOLDERS)
	@$(BIN)/ruff format --check $(FOLDERS)
	@$(BIN)/mypy $(FOLDERS)

.PHONY: ui
ui: setup ## MLflow's pages; prints the links to the newest version and its run
	@$(BIN)/python -m pipelines.ui

.PHONY: gc
gc: setup ## frees DVC's cache of what no branch, tag, worktree or registered version names
	@$(BIN)/python -m pipelines.housekeeping

.PHONY: schedule
schedule: setup ## Prefect, MLflow and the flows that run by themselves, until Ctrl-C
	@$(BIN)/python -m pipelines.schedule

.PHONY: serve
serve: setup ## answers over HTTP with the version in force, until Ctrl-C
	@$(BIN)/python -m pipelines.serve

.PHONY: bench
bench: setup ## the peers' environments; with IMAGES=DIR also all measurements against them (docs/performance.md)
	@$(BIN)/python -m bench.environment || test -n "$(IMAGES)"
	@for name in $(if $(IMAGES),scan sharding loading versioning); do \
	  echo; echo "bench.$$name"; $(BIN)/python -m bench.$$name --images "$(IMAGES)" --json .synset/bench/$$name.json || exit 1; done

.PHONY: clean
clean: ## removes .venv and .synset/ (caches, work in progress, Prefect's history); data, models, DVC's cache and MLflow stay
# What .synset/retrain says is left to do stays: a batch to be taken back, a branch to be pushed, a version to be finished.
	rm -rf .venv .synset/retrain/tree $(filter-out .synset/retrain,$(wildcard .synset/*))
