# Where programs keep their own files, and what they may not send: everything stays in the checkout, nothing phones home.
# The one list: the Makefile includes it, flows read it (pipelines/environment.py), `make setup` puts it into .venv/bin/activate.
# A value that is set already in the environment wins.
export DVC_SITE_CACHE_DIR ?= $(CURDIR)/.synset/dvc
export PREFECT_HOME ?= $(CURDIR)/.synset/prefect
export MPLCONFIGDIR ?= $(CURDIR)/.synset/matplotlib
export TORCH_HOME ?= $(CURDIR)/.synset/torch
export CUDA_CACHE_PATH ?= $(CURDIR)/.synset/cuda
export PRE_COMMIT_HOME ?= $(CURDIR)/.synset/pre-commit
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/.synset/pycache
export DO_NOT_TRACK ?= 1
export GX_ANALYTICS_ENABLED ?= false
export MLFLOW_DISABLE_TELEMETRY ?= true
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
# Prefect's own API starts in up to half a minute on an idle machine; its default limit is 20 seconds.
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS ?= 180
