"""The second and the third thing that users do, on real servers, from an empty checkout to a rollback.

A schedule finds a delivery and retrains; a person reviews and promotes by clicking in MLflow's UI; reconcile puts the
version in force; the service answers with it. With SYNSET_SCREENSHOTS=DIR the pages are kept as pictures.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.browser import Page, browser
from tests.workspace import Workspace

pytestmark = pytest.mark.slow
PATIENCE = 900.0
"""Seconds until the test gives up waiting; no measure of speed."""
NAME = "synset-sample"


class Program:
    """A long-running command of the checkout; its output so far in `lines`."""

    def __init__(self, workspace: Workspace, *command: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, cwd=workspace.root, env=workspace.environment | {"PYTHONUNBUFFERED": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def says(self, pattern: str) -> re.Match[str]:
        """The first line in which the pattern is found; waits for it."""

        def found() -> re.Match[str] | None:
            assert self.process.poll() is None, "\n".join(self.lines)
            return next((match for line in self.lines if (match := re.search(pattern, line))), None)

        return wait_for(found, f"a line with {pattern}", lambda: "\n".join(self.lines[-60:]))

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(timeout=180)


def wait_for(condition: Callable[[], Any], what: str, context: Callable[[], str] = str) -> Any:
    """What `condition` returns as soon as it is truthy."""
    until = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < until, f"waited in vain for {what}\n{context()}"
        time.sleep(0.5)
    return value


@contextmanager
def running(workspace: Workspace, *command: str) -> Iterator[Program]:
    """A long-running command, stopped with the block."""
    program = Program(workspace, *command)
    try:
        yield program
    finally:
        program.stop()


class Registry:
    """What MLflow's server says."""

    def __init__(self, server: str) -> None:
        self.server = server

    def ask(self, path: str) -> dict[str, Any]:
        """A GET of the REST API."""
        with urllib.request.urlopen(f"{self.server}/api/2.0/mlflow/{path}") as answer:
            return dict(json.load(answer))

    def alias(self, name: str) -> int | None:
        """The number of the version that an alias points at."""
        model = self.ask(f"registered-models/get?name={NAME}")["registered_model"]
        return next((int(each["version"]) for each in model.get("aliases", []) if each["alias"] == name), None)

    def version(self, number: int) -> dict[str, Any]:
        """A version with its tags as a dictionary."""
        found = self.ask(f"model-versions/get?name={NAME}&version={number}")["model_version"]
        return {**found, "tags": {tag["key"]: tag["value"] for tag in found.get("tags", [])}}

    def description(self) -> str:
        """Of the registered model."""
        return str(self.ask(f"registered-models/get?name={NAME}")["registered_model"]["description"])


def open_version(page: Page, server: str, number: int) -> None:
    """The version's page, loaded to its end."""
    page.open(f"{server}/#/models/{NAME}/versions/{number}")
    page.wait_for_text("Reproduce")
    page.wait_for("document.querySelector('[data-testid=add-tag-button]')")


def promote(page: Page, server: str, number: int, by: str = "") -> None:
    """What a person does: the version's page, a tag, the alias `champion`, Save."""
    open_version(page, server, number)
    if by:
        for field, text in (("name", "approved_by"), ("value", by)):
            page.click(f"document.querySelector('[data-testid=tags-form-input-{field}]')")
            page.type(text)
        page.click("document.querySelector('[data-testid=add-tag-button]')")
        page.wait_for("!document.querySelector('[data-testid=tags-form-input-value]').value")
    dialog = "document.querySelector('[role=combobox]')"
    while not page.evaluate(f"!!{dialog}"):
        page.click("document.querySelector('button[title=\"Edit aliases\"]')")
        time.sleep(1)
    page.click(dialog)
    page.type("champion")
    page.press("Enter")
    save = "document.querySelector('[data-component-id*=\"edit-aliases-modal.save-button\"]')"
    page.wait_for(f"!{save}.disabled")
    page.click(save)
    page.wait_for(f"!{dialog}", "the dialog's end")


def git(workspace: Workspace, *arguments: str) -> str:
    """Output of a git command in the checkout."""
    done = workspace.run("git", "-c", "user.name=ada", "-c", "user.email=ada@example.org", *arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def commit(workspace: Workspace, message: str, **changed: Any) -> None:
    """Sections of params.yaml changed by a person, and committed with whatever `dvc repro` left."""
    if changed:
        workspace.write_params(workspace.params | changed)
    git(workspace, "add", "-A")
    git(workspace, "commit", "-qm", message)


def deliver(workspace: Workspace, delivery: str, seed: int) -> None:
    """A delivery of a few images a class, complete once it holds `_READY`."""
    folder = workspace.root / "data/incoming" / delivery
    script = (
        "import sys; from pathlib import Path; from stages.data.sources.sample import draw\n"
        f"for file in draw('target', {seed}, 30):\n"
        "    name = file.path.split('/', 1)[1]\n"
        "    path = Path(sys.argv[1], name); path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    path.write_bytes(file.data)\n"
    )
    done = workspace.run(sys.executable, "-c", script, str(folder))
    assert done.returncode == 0, done.stdout
    (folder / "_READY").touch()


def answered_by(address: str, image: bytes) -> int:
    """The number of the version that answers a posted image."""
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(image).decode()]]}})
    request = urllib.request.Request(
        f"{address}/invocations", body.encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["predictions"][0]["name"]
        return int(answer.headers["X-Model-Version"])


def picture(page: Page, name: str) -> None:
    """A screenshot, where they are asked for."""
    if folder := os.environ.get("SYNSET_SCREENSHOTS"):
        time.sleep(2)  # images and fonts
        page.screenshot(Path(folder, f"{name}.png"))


def test_from_a_delivery_to_a_promotion_and_back(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    git(workspace, "branch", "-M", "main")
    workspace.write_params(
        workspace.params
        | {
            "retrain": {"cron": "* * * * *"},
            "reconcile": {"interval": 5},
            "serve": {"port": 5901, "interval": 1},
            "finetune": {"epochs": 1, "batch_size": 32, "scratch": False},
        }
    )
    git(workspace, "commit", "-qam", "a first recipe, a poor one")
    workspace.repro()
    commit(workspace, "the first model")
    with running(workspace, sys.executable, "-m", "pipelines.schedule") as schedule, browser() as page:
        server = schedule.says(r"MLflow at (http://[^;]+);")[1]
        schedule.says("flows are started when they are due")
        registry = Registry(server)
        wait_for(lambda: registry.alias("challenger") == 1, "the first challenger")

        open_version(page, server, 1)
        picture(page, "first")
        promote(page, server, 1, by="ada")
        wait_for(lambda: registry.alias("serving") == 1, "version 1 in force", lambda: "\n".join(schedule.lines[-60:]))

        with running(workspace, sys.executable, "-m", "pipelines.serve") as service:
            address = service.says(r"(http://127\.0\.0\.1:\d+)")[1]
            photo = a_photo(workspace)
            wait_for(lambda: answers(address, photo) == 1, "an answer of version 1")

            commit(workspace, "a better recipe", finetune={"epochs": 10, "batch_size": 32, "scratch": False})
            before = git(workspace, "rev-parse", "HEAD"), git(workspace, "status", "--porcelain")
            deliver(workspace, "2026-11-23", seed=6)
            wait_for(lambda: registry.alias("challenger") == 2, "a challenger", lambda: "\n".join(schedule.lines[-90:]))
            wait_for(lambda: branch_of(workspace) == registry.version(2)["tags"].get("git.commit"), "the branch")
            check_challenger(workspace, registry, 2, "d-2026-11-23")
            assert (git(workspace, "rev-parse", "HEAD"), git(workspace, "status", "--porcelain")) == before

            open_version(page, server, 2)
            picture(page, "challenger")
            promote(page, server, 2, by="grace")
            with asking(address, photo) as answered:
                wait_for(lambda: 2 in answered, "an answer of version 2", lambda: "\n".join(service.lines[-60:]))
            assert set(answered) == {1, 2}  # none was lost, or `asking` had failed
            wait_for(lambda: "grace" in registry.description(), "the line in the promotions table")
            assert (registry.alias("previous"), registry.alias("serving")) == (1, 2)
            assert git(workspace, "rev-parse", "champion^{commit}") == registry.version(2)["tags"]["git.commit"]

            promote(page, server, 1)  # a rollback: no gate is taken for what was in force before
            wait_for(lambda: answers(address, photo) == 1, "version 1 again")
            promote(page, server, 2)
            wait_for(lambda: answers(address, photo) == 2, "version 2 again")

            commit(workspace, "a spoilt recipe", finetune={"epochs": 1, "lr": 1e-6, "backbone_lr": 1e-6})
            deliver(workspace, "2026-11-24", seed=7)
            wait_for(lambda: registry.alias("challenger") == 3, "a challenger", lambda: "\n".join(schedule.lines[-90:]))
            assert registry.version(3)["tags"]["gate"] == "failed"
            promote(page, server, 3)
            wait_for(lambda: "promotion.refused" in registry.version(3)["tags"], "the refusal")
            assert (registry.alias("champion"), registry.alias("serving")) == (2, 2)
            assert answers(address, photo) == 2
            open_version(page, server, 3)
            picture(page, "refused")
            page.open(f"{server}/#/models/{NAME}")
            page.wait_for_text("grace")
            picture(page, "promotions")
    assert not left_behind(workspace)


def branch_of(workspace: Workspace) -> str:
    """The commit of the branch `retrain`; empty where there is none."""
    return workspace.run("git", "rev-parse", "--verify", "--quiet", "retrain").stdout.strip()


def check_challenger(workspace: Workspace, registry: Registry, number: int, batch: str) -> None:
    """Registry, branch and card of a finished version agree."""
    version = registry.version(number)
    assert "unfinished" not in version["tags"]
    assert version["tags"]["gate"] == "passed"
    commit = version["tags"]["git.commit"]
    assert branch_of(workspace) == commit
    assert f"Model-SHA256: {version['tags']['model.sha256']}" in git(workspace, "log", "-1", "--format=%B", "retrain")
    listed = yaml.safe_load(git(workspace, "show", "retrain:params.yaml"))["batches"]
    assert re.fullmatch("[0-9a-f]{64}", listed[batch]["digest"])
    assert commit in version["description"]
    assert batch in version["description"]


def a_photo(workspace: Workspace) -> bytes:
    """An accepted image of the first batch."""
    with tarfile.open(next((workspace.root / "data/shards/finetune/target").glob("test-*.tar"))) as tar:
        name = next(name for name in tar.getnames() if name.endswith(".jpg"))
        file = tar.extractfile(name)
        assert file
        return file.read()


def answers(address: str, photo: bytes) -> int | None:
    """The version that answers; None while the service still starts."""
    try:
        return answered_by(address, photo)
    except OSError:
        return None


@contextmanager
def asking(address: str, photo: bytes) -> Iterator[list[int]]:
    """Posts the photo over and over; which version answered each time. Any failure fails the test."""
    answered: list[int] = []
    failures: list[Exception] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                answered.append(answered_by(address, photo))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures


def left_behind(workspace: Workspace) -> list[str]:
    """Processes that still work in the checkout."""
    import psutil

    return [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline", "cwd"])
        if (process.info["cwd"] or "").startswith(str(workspace.root))
    ]
