"""Notifies people of what a flow decided, by the Apprise URLs and Prefect blocks that params.yaml names."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from apprise import Apprise

from pipelines import environment
from stages.params.retrain import Retrain
from stages.runtime.command import StageError
from stages.runtime.params_file import load_section

environment.apply()  # Prefect reads its settings when it is imported

import prefect.blocks.notifications  # noqa: E402, F401  # registers its blocks
from prefect.blocks.abstract import NotificationBlock  # noqa: E402
from prefect.blocks.core import Block  # noqa: E402

logger = logging.getLogger(__name__)

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_BLOCK = re.compile(r"block:(?P<type>[^/]+)/(?P<name>[^/]+)")


def tell(title: str, body: str) -> None:
    """Sends a message, with a body in Markdown, to all targets in `retrain.notify`.

    Never raises: no decision may depend on a message; a target that is not reached costs a warning. URLs hold secrets:
    neither they nor Apprise's messages about them are logged.
    """
    try:
        targets = load_section("retrain", Retrain).notify
    except StageError as error:
        logger.warning("warning: nobody was told of `%s`: %s", title, error)
        return
    for number, target in enumerate(targets, start=1):
        try:
            _send(target, title, body)
        except StageError as error:
            logger.warning("warning: retrain.notify, entry %d, was not told of `%s`: %s", number, title, error)
        except Exception as error:  # its message may hold the address, and so a password
            kind = type(error).__name__
            logger.warning("warning: retrain.notify, entry %d, was not told of `%s` (%s)", number, title, kind)


def expanded(target: str) -> str:
    """`target` with the environment's value for each `$NAME` and `${NAME}` in it.

    Raises:
        StageError: one of them is not set.
    """
    names = [match[1] or match[2] for match in _VARIABLE.finditer(target)]
    if missing := [name for name in names if name not in os.environ]:
        raise StageError(f"the environment variable {missing[0]} is not set")
    return _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], target)


def _send(target: str, title: str, body: str) -> None:
    address = expanded(target)
    if address.startswith("block:"):
        _send_by_block(address, title, body)
    else:
        _send_by_apprise(address, title, body)


def _send_by_apprise(address: str, title: str, body: str) -> None:
    with _quiet():
        client = Apprise()
        if not client.add(address):
            raise StageError("it is no URL that Apprise knows (secrets in it may have to be written as %XX)")
        if not client.notify(title=title, body=body, body_format="markdown"):
            raise StageError("its service did not take the message, or was not reached")


def _send_by_block(address: str, title: str, body: str) -> None:
    match = _BLOCK.fullmatch(address)
    if not match:
        raise StageError("a Prefect block is named as block:TYPE/NAME, say block:slack-webhook/team")
    try:
        block = Block.load(f"{match['type']}/{match['name']}", _sync=True)  # type: ignore[call-arg]
    except (ValueError, KeyError):
        raise StageError(f"Prefect's API has no block {match['type']}/{match['name']}; make it in its UI") from None
    if not isinstance(block, NotificationBlock):
        raise StageError(f"the block {match['type']}/{match['name']} sends no notifications")
    with _quiet(), block.raise_on_failure():
        block.notify(body, subject=title, _sync=True)  # type: ignore[call-arg,unused-coroutine]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the loggers that would write addresses down."""
    talkative = [logging.getLogger(name) for name in ("apprise", "httpx", "urllib3.connectionpool")]
    before = [each.disabled for each in talkative]
    for each in talkative:
        each.disabled = True
    try:
        yield
    finally:
        for each, disabled in zip(talkative, before, strict=True):
            each.disabled = disabled
