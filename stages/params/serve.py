"""The section `serve`: the address of the HTTP server for the version in force."""

from typing import Annotated

from pydantic import Field

from stages.runtime.params_file import NonEmpty, Section


class Serve(Section):
    """No stage reads this section."""

    host: NonEmpty = "127.0.0.1"
    """For any other address, put authentication in front (docs/deployment.md)."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5001
    interval: Annotated[int, Field(ge=1, le=30)] = 10
    """Seconds between two reads of the alias `serving`."""
