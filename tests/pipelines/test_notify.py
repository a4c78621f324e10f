"""People are told where they can be; where not, that is a warning, and no secret gets into the log."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.notify import expanded, tell
from stages.runtime.command import StageError
from tests.prefect_api import prefect_api, python

SECRET = "s3cret-token"


class Receiver(HTTPServer):
    """Takes messages, and refuses those to a path with `refuse` in it."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.messages.append((self.path, json.loads(body)))
        self.send_response(500 if "refuse" in self.path else 200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A web service on this machine."""
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def notify(folder: Path, monkeypatch: pytest.MonkeyPatch, *targets: str) -> None:
    """Works in a folder whose params.yaml names these."""
    (folder / "params.yaml").write_text(yaml.safe_dump({"retrain": {"notify": list(targets)}}))
    monkeypatch.chdir(folder)


def test_everybody_is_told_whoever_cannot_be_reached(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEAM_TOKEN", SECRET)
    monkeypatch.delenv("NOT_SET", raising=False)
    here = f"127.0.0.1:{receiver.server_port}"
    wrong = [
        f"json://{here}/refuse/{SECRET}", f"json://127.0.0.1:9/{SECRET}", f"nosuch://{SECRET}@x/", "json://$NOT_SET/",
        f"block:{SECRET}",
    ]  # fmt: skip
    notify(tmp_path, monkeypatch, *wrong, f"json://{here}/${{TEAM_TOKEN}}")
    tell("version 3 passed", "**better** by 2 points")
    path, message = receiver.messages[-1]
    assert path == f"/{SECRET}"
    assert message["title"] == "version 3 passed"
    assert "better" in message["message"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [f"entry {number}" in warning for number, warning in enumerate(warnings, start=1)] == [True] * len(wrong)
    assert "NOT_SET" in warnings[3]
    assert SECRET not in caplog.text


def test_with_nobody_to_tell_and_with_wrong_params_nothing_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    notify(tmp_path, monkeypatch)
    tell("nothing", "")
    assert not caplog.records
    (tmp_path / "params.yaml").write_text("retrain: {notify: 7}")
    tell("a failure", "")
    assert "retrain.notify" in caplog.text


def test_variables_are_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "1")
    assert expanded("mailto://$A:${A}@x") == "mailto://1:1@x"
    with pytest.raises(StageError, match="NOT_THERE"):
        expanded("json://$NOT_THERE")


MAKE_BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
CustomWebhookNotificationBlock(
    name="team", url=sys.argv[1], allow_private_urls=True, json_data={"title": "{{subject}}", "text": "{{body}}"}
).save("team")
"""
TELL = "import logging; logging.basicConfig(level=10); from pipelines.notify import tell; tell('title', 'text')"


@pytest.mark.slow
def test_a_block_of_prefect_is_used(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notify(tmp_path, monkeypatch, "block:custom-webhook/missing", "block:custom-webhook/team")
    with prefect_api(tmp_path, 4800) as environment:
        python(MAKE_BLOCK, environment, f"http://127.0.0.1:{receiver.server_port}/{SECRET}")
        python(TELL, environment)
    assert receiver.messages == [(f"/{SECRET}", {"title": "title", "text": "text"})]
