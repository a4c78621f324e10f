"""The section `reconcile`: how promptly a person's wish in the MLflow UI is acted upon."""

from typing import Annotated

from pydantic import Field

from stages.runtime.params_file import Section


class Reconcile(Section):
    """No stage reads this section."""

    interval: Annotated[int, Field(ge=5)] = 60
    """Seconds between two looks at the registry."""
