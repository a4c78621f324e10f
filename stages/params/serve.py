"""The section `serve`: where the version in force answers."""

from typing import Annotated

from pydantic import Field

from stages.runtime.params_file import Section


class Serve(Section):
    """No stage reads this section."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Other than 127.0.0.1, put authentication before it (docs/deployment.md)."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5001
    interval: Annotated[int, Field(ge=1, le=30)] = 10
    """Seconds between two looks at the alias `serving`."""
