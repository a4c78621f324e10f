"""The section `reconcile`: how soon a change that a person made in the MLflow UI takes effect."""

from typing import Annotated

from pydantic import Field

from stages.runtime.params_file import Section


class Reconcile(Section):
    """No stage reads this section."""

    interval: Annotated[int, Field(ge=5, le=86_400)] = 60
    """Seconds between two reads of the registry: a day at most."""
