"""MLflow's types for annotations, in modules that do not need MLflow itself: importing it takes seconds."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
else:
    MlflowClient = Run = ModelVersion = object

__all__ = ["MlflowClient", "ModelVersion", "Run"]
