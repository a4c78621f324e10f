"""Every path of an artifact, relative to the root of the checkout; a stage runs there.

from stages.runtime import layout
layout.raw("finetune", "pets") / "train.tar"
root / layout.METRICS                                   # of another checkout
"""

import os
from pathlib import Path

# ------------------------------------------------------------------------------------------------------------- inputs

PARAMS = Path("params.yaml")
DVC_YAML = Path("dvc.yaml")
DVC_LOCK = Path("dvc.lock")
VERSIONS = Path("stages/versions")
"""Lists of the packages that decide bytes, a file per group of stages."""


def incoming() -> str:
    """Folder or fsspec URL that relative sources resolve against: SYNSET_INCOMING, or data/incoming."""
    return os.environ.get("SYNSET_INCOMING") or "data/incoming"


# --------------------------------------------------------------------------------------------------------------- data

DATA = Path("data")
RAW = DATA / "raw"
FACTS = DATA / "facts"
ACCEPTED = DATA / "accepted"
CLASSES = DATA / "classes"
SHARDS = DATA / "shards"
QUARANTINE = DATA / "quarantine.parquet"


def raw(role: str, batch: str) -> Path:
    """Folder of a batch's raw tars, and of the account of its source."""
    return RAW / role / batch


ACCOUNT = "source.json"
"""The account's file in the folder of a batch's raw tars; batches of older versions have none."""


def facts(role: str, batch: str) -> Path:
    """Parquet, a row per image of a batch."""
    return FACTS / role / f"{batch}.parquet"


def accepted(role: str, batch: str) -> Path:
    """Parquet, a row per accepted image of a batch, with its split and label."""
    return ACCEPTED / role / f"{batch}.parquet"


def classes(role: str) -> Path:
    """JSON, the class names of a role in the order of their labels."""
    return CLASSES / f"{role}.json"


def shards(role: str, batch: str) -> Path:
    """Folder of a batch's shard set: tars, DALI indexes and index.json."""
    return SHARDS / role / batch


# ------------------------------------------------------------------------------------------------------------- models

MODELS = Path("models")
BACKBONE = MODELS / "backbone"
FINETUNED = MODELS / "finetuned"
SCRATCH = MODELS / "scratch"
EXPORTS = MODELS / "exports"
RECEIPT = MODELS / "registered.json"
"""Which version `register` made of models/finetuned."""

WEIGHTS = "model.safetensors"
"""The weights' file in the folder of a model."""
CONFIG = "config.json"
"""The file beside the weights that says how to build the network."""

# ------------------------------------------------------------------------------------------------------------ reports

REPORTS = Path("reports")
VALIDATION = REPORTS / "validation.json"
VALIDATION_PAGE = REPORTS / "validation.html"
PRETRAIN_REPORTS = REPORTS / "pretrain"
FINETUNE_REPORTS = REPORTS / "finetune"
METRICS = REPORTS / "metrics.json"
PREDICTIONS = REPORTS / "predictions.parquet"
PLOTS = REPORTS / "plots"
REPORT_PAGE = REPORTS / "report.html"
LABEL_QUEUE = REPORTS / "label_queue"
PREDICTED = REPORTS / "predicted.csv"

# ------------------------------------------------------------------------ state of this checkout, outside git and DVC

STATE = Path(".synset")
WORK = STATE / "work"
TUNE = STATE / "tune"
VALIDATION_FAILED = STATE / "validation-failed"
"""Written by a validation that stops the pipeline, for `retrain`, which reports why."""
MLFLOW_LOG = STATE / "mlflow-server.log"


def work(stage: str) -> Path:
    """Folder of a stage's work in progress; in it a folder per fingerprint."""
    return WORK / stage
