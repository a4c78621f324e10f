"""A model that says what its only file holds; logged by tests as a model from code."""

import os
import time
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext


class TinyModel(PythonModel):
    """It takes its time, so that there are always requests in flight."""

    def load_context(self, context: PythonModelContext) -> None:
        """Reads the answer."""
        self.answer = Path(context.artifacts["model"], "answer.txt").read_text()
        if self.answer == "broken":
            raise ValueError("these weights are none")

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """The answer, for each row; it dies of `top_k` 666."""
        if (params or {}).get("top_k") == 666:
            os.kill(os.getpid(), 9)
        time.sleep(0.3)
        return pd.DataFrame({"name": [[self.answer]] * len(model_input)})


mlflow.models.set_model(TinyModel())
