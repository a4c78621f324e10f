"""MLflow, imported after its environment is set: telemetry off, logs quiet, few retries. The import takes seconds, so
whoever may do without MLflow imports this module inside a function.
"""

import logging
import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that is down should be known in seconds; MLflow's default of 7 growing retries takes minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
# Its lines about every retry add nothing to the one message at the end.
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

import mlflow  # noqa: E402
import requests  # noqa: E402
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

__all__ = ["ERRORS", "SystemMetricsMonitor", "mlflow"]

ERRORS = (mlflow.MlflowException, requests.RequestException, SQLAlchemyError)
"""What MLflow raises when its server or database fails."""
