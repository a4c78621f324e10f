"""Which version is in force, according to the registry."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from stages.registry import tags, versions
from stages.registry.versions import Version

logger = logging.getLogger(__name__)


@dataclass
class VersionInForce:
    """The version in force, read again and again in a thread: the registry may hang, and no request waits for it."""

    name: str
    interval: float
    """Seconds between two reads."""
    changed: Callable[[], None]
    """Called after each read."""
    version: Version | None = None
    """The version in force, as far as is known."""
    was_read: bool = False
    """Whether the registry was read, or tried to be, at least once."""
    message: str = field(default="", init=False)
    """The last message about no version being in force, or no registry answering; empty where all is well."""

    def follow(self) -> None:
        """Reads for ever; for a thread that does not keep the process alive."""
        ended = threading.Event()
        while not ended.wait(self.interval if self.was_read else 0):
            self.read()

    def read(self) -> None:
        """Reads once. While the registry does not answer, the last known version stays."""
        try:
            found = versions.version_by_alias(self.name, tags.SERVING)
        except Exception as error:  # whatever the registry's client raises, what is served goes on being served
            self._warn(f"warning: the registry does not answer ({type(error).__name__}: {error}); asking again")
        else:
            if found is None and self.version:
                self._warn(f"warning: no version of {self.name} is in force any more; serving the last one on")
            elif found is None:
                self._warn(f"no version of {self.name} is in force; promote one in the MLflow UI (alias `champion`)")
            else:
                self.message = ""
                self.version = found
        self.was_read = True
        self.changed()

    def _warn(self, message: str) -> None:
        if message != self.message:
            logger.warning(message)
        self.message = message
