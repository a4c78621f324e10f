"""What `stages.registry.runs` does when tracking is on: training reports to MLflow, and no failure of it reaches it."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.registry import lineage
from stages.registry.client import open_client, reason, tracking_uri
from stages.registry.mlflow_setup import ERRORS, SystemMetricsMonitor, mlflow
from stages.registry.mlflow_types import MlflowClient, Run
from stages.registry.runs import EXPERIMENTS, PARENT, TrainingRun, flatten
from stages.registry.tags import FINGERPRINT, PARENT_RUN, ROLE, STAGE, STUDY

logger = logging.getLogger(__name__)

SYSTEM_METRICS_EVERY = 5.0
"""Seconds. MLflow's own 10 would leave a run on the sample with two points."""
FAILURES = (*ERRORS, OSError)
"""What an observer survives: besides MLflow's errors, a disk that is full or may not be written to."""


class RecordedRun(TrainingRun):
    """A run in MLflow that is being written.

    The first failure is logged once. From then on everything waits, and is tried once more when the run ends: a server
    that was restarted in the middle has the whole curve again.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self._waiting: list[dict[str, Any]] = []
        self._lost = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._send(metrics=[mlflow.entities.Metric(name, float(value), now, step) for name, value in metrics.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._send(tags=[mlflow.entities.RunTag(name, str(value)) for name, value in tags.items()])

    def log_artifacts(self, folder: Path) -> None:
        if not self._lost:
            try:
                self._client.log_artifacts(self.run_id, str(folder), artifact_path=folder.name)
            except FAILURES as error:
                self.lose(error)

    def finish(self, status: str) -> None:
        """Sends what still waits and ends the run as FINISHED, FAILED or KILLED."""
        try:
            self._flush()
            self._client.set_terminated(self.run_id, status)
        except FAILURES as error:
            if not self._lost:
                self.lose(error)
            logger.warning("MLflow did not come back: the run %s stays incomplete there", self.run_id)

    def _send(self, **content: Any) -> None:
        self._waiting.append(content)
        if self._lost:
            return
        try:
            self._flush()
        except FAILURES as error:
            self.lose(error)

    def _flush(self) -> None:
        while self._waiting:
            self._client.log_batch(self.run_id, synchronous=True, **self._waiting[0])
            self._waiting.pop(0)

    def lose(self, error: Exception) -> None:
        """Logs that MLflow failed; what is recorded from now on waits for the end."""
        self._lost = True
        _warn_lost(error)


def _warn_lost(error: Exception) -> None:
    logger.warning("warning: MLflow at %s failed (%s); training goes on without it", tracking_uri(), reason(error))


@contextmanager
def recorded(stage: str, params: Mapping[str, Any], tags: Mapping[str, str], resumed: bool) -> Iterator[TrainingRun]:
    """`runs.training_run` with tracking on."""
    run = _begin(stage, params, tags, resumed)
    monitor = _monitor(run) if isinstance(run, RecordedRun) else None
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if monitor:
            monitor.finish()
        run.finish(status)


def _begin(stage: str, params: Mapping[str, Any], tags: Mapping[str, str], resumed: bool) -> TrainingRun:
    try:
        client = open_client()
        experiment = _experiment(client, stage)
        found = _unfinished(client, experiment, tags.get(FINGERPRINT)) if resumed else None
        if found:
            client.update_run(found, status="RUNNING")
            logger.info("continuing the MLflow run %s", found)
            return RecordedRun(client, found)
        parent = {PARENT_RUN: os.environ[PARENT]} if os.environ.get(PARENT) else {}
        run = _create(client, experiment, stage, params, {STAGE: stage, **lineage.git_tags(), **parent, **tags})
        _log_inputs(client, run.info.run_id, "finetune" if stage == "tune" else stage)
        return RecordedRun(client, run.info.run_id)
    except FAILURES as error:
        _warn_lost(error)
        return TrainingRun()


def begin_search(params: Mapping[str, Any], study: str) -> TrainingRun:
    """`runs.search_run` with tracking on."""
    try:
        client = open_client()
        experiment = _experiment(client, "tune")
        which = f"tags.{STUDY} = '{study}' and tags.{ROLE} = 'search'"
        found = client.search_runs([experiment], which, max_results=1)
        run = found[0] if found else _create(client, experiment, "tune", params, {STUDY: study, ROLE: "search"})
        return RecordedRun(client, run.info.run_id)
    except FAILURES as error:
        _warn_lost(error)
        return TrainingRun()


def create_finished(
    stage: str, params: Mapping[str, Any], tags: Mapping[str, str], curves: Sequence[Mapping[str, float]]
) -> Run:
    """A run for a model that was pulled and not trained here, from what was stored with it.

    `curves` are the epochs' metrics, each with its `epoch`, which becomes the step.
    """
    client = open_client()
    run = _create(client, _experiment(client, stage), stage, params, {STAGE: stage, **tags})
    _log_inputs(client, run.info.run_id, stage)
    record = RecordedRun(client, run.info.run_id)
    for number, epoch in enumerate(curves):
        values = {name: value for name, value in epoch.items() if isinstance(value, int | float) and name != "epoch"}
        record.log(values, int(epoch.get("epoch", number)))
    client.set_terminated(run.info.run_id)
    return run


def _monitor(run: RecordedRun) -> SystemMetricsMonitor | None:
    # A server that fails is logged by RecordedRun, once; the monitor's thread only stops.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    where = tracking_uri()
    try:
        monitor = SystemMetricsMonitor(run.run_id, SYSTEM_METRICS_EVERY, resume_logging=True, tracking_uri=where)
    except ERRORS as error:
        run.lose(error)
        return None
    except Exception as error:  # of any kind, from psutil, where a container hides what it reads
        logger.warning("warning: no system metrics are recorded (%s)", reason(error))
        return None
    monitor.start()
    return monitor


def _experiment(client: MlflowClient, stage: str) -> str:
    """The id of the experiment, which is created or restored where needed."""
    name = EXPERIMENTS.format(stage=stage)
    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except mlflow.MlflowException:  # another process was first
        found = client.get_experiment_by_name(name)
        if not found:
            raise
        return found.experiment_id


def _unfinished(client: MlflowClient, experiment: str, fingerprint: str | None) -> str | None:
    if not fingerprint:
        return None
    which = f"tags.{FINGERPRINT} = '{fingerprint}' and attributes.status != 'FINISHED'"
    runs = client.search_runs([experiment], which, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0].info.run_id if runs else None


def _create(
    client: MlflowClient, experiment: str, stage: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Run:
    name = "-".join([stage, tags.get(FINGERPRINT, "")[:8]]).strip("-")
    run = client.create_run(experiment, run_name=name, tags={key: str(value) for key, value in tags.items()})
    rows = [mlflow.entities.Param(key, str(value)[:6000]) for key, value in flatten(params).items()]
    for start in range(0, len(rows), 100):  # the most that a request may carry
        client.log_batch(run.info.run_id, params=rows[start : start + 100], synchronous=True)
    return run


def _log_inputs(client: MlflowClient, run_id: str, role: str) -> None:
    inputs = [
        mlflow.entities.DatasetInput(
            mlflow.entities.Dataset(
                name=shards.batch,
                digest=shards.digest,
                source_type="local",
                source=json.dumps({"uri": str(shards.folder)}),
                profile=json.dumps({"sha256": shards.sha256, **shards.counts}),
            ),
            [mlflow.entities.InputTag("mlflow.data.context", "training")],
        )
        for shards in lineage.training_data(role)
    ]
    if inputs:
        client.log_inputs(run_id, inputs)
