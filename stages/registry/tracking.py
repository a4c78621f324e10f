"""MLflow: the one place that knows runs, tags and the registry.

Tracking only observes. Nothing that it is told or says enters a DVC output, so a training ends in the same bytes with
tracking switched off (SYNSET_TRACKING=off) and with a server that is down. MLflow is imported when it is first needed:
it takes seconds.
"""

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from stages.runtime.command import StageError
from stages.runtime.files import sha256

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

EXPERIMENTS = "synset/{stage}"
SHA256 = "model.sha256"
"""The tag by which runs and versions of a model are found: an id would differ on every server."""
UNFINISHED = "unfinished"
"""The tag of a version that retrain has registered and not committed yet."""
COMMIT_TO_COME = "commit-to-come"
"""Stands in the card of an unfinished version where its commit will be named."""
PARENT = "SYNSET_PARENT_RUN"
"""In the environment of a trial: the run of its search."""
SYSTEM_METRICS_EVERY = 5.0
"""Seconds. MLflow's own 10 would leave a run on the sample with two points."""


# ----------------------------------------------------------------------------------------------------------- where


def enabled() -> bool:
    """False with SYNSET_TRACKING=off."""
    return os.environ.get("SYNSET_TRACKING", "on").lower() not in ("off", "0", "false")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the repository root (the working directory of every stage)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def is_server(uri: str) -> bool:
    """Whether `uri` names a running MLflow server rather than a database."""
    return uri.startswith(("http://", "https://"))


def artifact_root(uri: str) -> str | None:
    """Where a database's artifacts lie: mlartifacts/ beside it. None for a server, which decides itself."""
    if is_server(uri):
        return None
    if set_by_hand := os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT"):
        return set_by_hand
    folder = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else Path()
    return str(folder.absolute() / "mlartifacts")


def open_client() -> "MlflowClient":
    """A client of `tracking_uri()`, telemetry off and logs quiet. A new SQLite file takes seconds (migrations)."""
    uri = tracking_uri()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A server that is down should be known in seconds; MLflow's default of 7 growing retries takes minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    if root := artifact_root(uri):
        # The server's own variable. Without it, MLflow would make ./mlruns the artifact root of a new database.
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = root
    # Its lines about every retry say nothing that the one message at the end does not.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    import mlflow

    if uri.startswith("sqlite:///"):
        # Checked here because MLflow retries a file that it cannot open for two minutes.
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        if not folder.is_dir():
            raise mlflow.MlflowException(f"there is no folder {folder} to keep the database in")
    mlflow.set_tracking_uri(uri)
    with _alone(uri):
        return mlflow.MlflowClient(uri)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time opens a SQLite file: two that begin a new one would each migrate what the other had begun.

    The lock is on the folder, so that no file more lies in it.
    """
    if not uri.startswith("sqlite:///"):
        yield
        return
    descriptor = os.open(Path(uri.removeprefix("sqlite:///")).absolute().parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that knows no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def mlflow_errors() -> tuple[type[Exception], ...]:
    """What MLflow raises when its server or database fails."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, requests.RequestException, SQLAlchemyError)


def _failures() -> tuple[type[Exception], ...]:
    """What an observer survives: besides MLflow's errors, a disk that is full or may not be written to."""
    return (*mlflow_errors(), OSError)


@contextmanager
def reachable() -> Iterator[None]:
    """Turns MLflow's errors into one message for a person, for those who need the registry and do not only observe.

    Raises:
        StageError: the server or the database failed.
    """
    try:
        yield
    except mlflow_errors() as error:
        raise StageError(
            f"MLflow at {tracking_uri()} failed: {_reason(error)}. Start it again, and run this again"
        ) from error


def _reason(error: BaseException) -> str:
    """The first cause: MLflow wraps `connection refused` four times over."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(str(error).split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------------------------------ runs


class TrainingRun:
    """A run in MLflow that is being written; without a client, one that does nothing.

    The first failure is said once. From then on everything waits, and is tried once more when the run ends: a server
    that was restarted in the middle has the whole curve again.
    """

    def __init__(self, client: "MlflowClient | None" = None, run_id: str = "") -> None:
        self.run_id = run_id
        self._client = client
        self._waiting: list[dict[str, Any]] = []
        self._lost = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of one step (an epoch), in one request."""
        if self._client:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self._send(metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; a later value replaces an earlier one."""
        if self._client:
            from mlflow.entities import RunTag

            self._send(tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def log_artifacts(self, folder: Path) -> None:
        """The files of `folder`, under the folder's name."""
        if self._client and not self._lost:
            try:
                self._client.log_artifacts(self.run_id, str(folder), artifact_path=folder.name)
            except _failures() as error:
                self.lose(error)

    def finish(self, status: str) -> None:
        """Sends what still waits and ends the run as FINISHED, FAILED or KILLED."""
        if not self._client:
            return
        try:
            self._flush()
            self._client.set_terminated(self.run_id, status)
        except _failures() as error:
            if not self._lost:
                self.lose(error)
            logger.warning("MLflow did not come back: the run %s stays incomplete there", self.run_id)

    def _send(self, **content: Any) -> None:
        self._waiting.append(content)
        if self._lost:
            return
        try:
            self._flush()
        except _failures() as error:
            self.lose(error)

    def _flush(self) -> None:
        while self._client and self._waiting:
            self._client.log_batch(self.run_id, synchronous=True, **self._waiting[0])
            self._waiting.pop(0)

    def lose(self, error: Exception) -> None:
        """Says that MLflow failed; what is logged from now on waits for the end."""
        self._lost = True
        _say_lost(error)


def _say_lost(error: Exception) -> None:
    logger.warning("warning: MLflow at %s failed (%s); training goes on without it", tracking_uri(), _reason(error))


@contextmanager
def training_run(
    stage: str, params: Mapping[str, Any], tags: Mapping[str, str], resumed: bool = False
) -> Iterator[TrainingRun]:
    """A run in the experiment synset/<stage>, with params flattened, git facts, shard sets and system metrics.

    With tracking switched off, or where MLflow fails, the object yielded does nothing, and nothing is raised.

    Args:
        resumed: training goes on from a checkpoint of its own, so its run goes on too: the newest with the same tag
            `fingerprint` that is not FINISHED. Else a run is begun: an unfinished one may be at work elsewhere.
    """
    run = _start(stage, params, tags, resumed) if enabled() else TrainingRun()
    monitor = _monitor(run)
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


def _start(stage: str, params: Mapping[str, Any], tags: Mapping[str, str], resumed: bool) -> TrainingRun:
    try:
        client = open_client()
        experiment = _experiment(client, stage)
        found = _unfinished(client, experiment, tags.get("fingerprint")) if resumed else None
        if found:
            client.update_run(found, status="RUNNING")
            logger.info("continuing the MLflow run %s", found)
            return TrainingRun(client, found)
        parent = {"mlflow.parentRunId": os.environ[PARENT]} if os.environ.get(PARENT) else {}
        run = _create(client, experiment, stage, params, {"stage": stage, **git_tags(), **parent, **tags})
        _log_inputs(client, run.info.run_id, "finetune" if stage == "tune" else stage)
        return TrainingRun(client, run.info.run_id)
    except _failures() as error:
        _say_lost(error)
        return TrainingRun()


def search_run(params: Mapping[str, Any], study: str) -> TrainingRun:
    """The run of a search, which its trials lie under: the one begun before for this study, or a new one."""
    if not enabled():
        return TrainingRun()
    try:
        client = open_client()
        experiment = _experiment(client, "tune")
        found = client.search_runs([experiment], f"tags.study = '{study}' and tags.role = 'search'", max_results=1)
        run = found[0] if found else _create(client, experiment, "tune", params, {"study": study, "role": "search"})
        return TrainingRun(client, run.info.run_id)
    except _failures() as error:
        _say_lost(error)
        return TrainingRun()


def _monitor(run: TrainingRun) -> "SystemMetricsMonitor | None":
    if not run.run_id:
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # A server that fails is this module's to say, once; the monitor's thread only stops.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    where = tracking_uri()
    try:
        monitor = SystemMetricsMonitor(run.run_id, SYSTEM_METRICS_EVERY, resume_logging=True, tracking_uri=where)
    except mlflow_errors() as error:
        run.lose(error)
        return None
    except Exception as error:  # of any kind, from psutil, where a container hides what it reads
        logger.warning("warning: no system metrics are recorded (%s)", _reason(error))
        return None
    monitor.start()
    return monitor


def _experiment(client: "MlflowClient", stage: str) -> str:
    from mlflow.exceptions import MlflowException

    name = EXPERIMENTS.format(stage=stage)
    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:  # another process was first
        found = client.get_experiment_by_name(name)
        if not found:
            raise
        return found.experiment_id


def _unfinished(client: "MlflowClient", experiment: str, fingerprint: str | None) -> str | None:
    if not fingerprint:
        return None
    which = f"tags.fingerprint = '{fingerprint}' and attributes.status != 'FINISHED'"
    runs = client.search_runs([experiment], which, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0].info.run_id if runs else None


def _create(
    client: "MlflowClient", experiment: str, stage: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> "Run":
    from mlflow.entities import Param

    name = "-".join([stage, tags.get("fingerprint", "")[:8]]).strip("-")
    run = client.create_run(experiment, run_name=name, tags={key: str(value) for key, value in tags.items()})
    rows = [Param(key, str(value)[:6000]) for key, value in flatten(params).items()]
    for start in range(0, len(rows), 100):  # the most that a request may carry
        client.log_batch(run.info.run_id, params=rows[start : start + 100], synchronous=True)
    return run


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections with dotted keys: `{"finetune": {"lr": 0.1}}` becomes `{"finetune.lr": 0.1}`."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def create_finished_run(
    stage: str, params: Mapping[str, Any], tags: Mapping[str, str], curves: Sequence[Mapping[str, float]]
) -> "Run":
    """A run for a model that was pulled and not trained here, from what was stored with it.

    `curves` are the epochs' metrics, each with its `epoch`, which becomes the step.
    """
    client = open_client()
    run = _create(client, _experiment(client, stage), stage, params, {"stage": stage, **tags})
    _log_inputs(client, run.info.run_id, stage)
    record = TrainingRun(client, run.info.run_id)
    for number, epoch in enumerate(curves):
        values = {name: value for name, value in epoch.items() if isinstance(value, int | float) and name != "epoch"}
        record.log(values, int(epoch.get("epoch", number)))
    client.set_terminated(run.info.run_id)
    return run


def find_run(model_sha256: str) -> "Run | None":
    """The newest run of `finetune` that ended in the model with these weights."""
    client = open_client()
    experiment = client.get_experiment_by_name(EXPERIMENTS.format(stage="finetune"))
    if not experiment:
        return None
    which = f"tags.`{SHA256}` = '{model_sha256}'"
    runs = client.search_runs([experiment.experiment_id], which, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0] if runs else None


# ---------------------------------------------------------------------------------------- what a run was made from


@dataclass(frozen=True)
class ShardSet:
    """The data of one batch as training reads it; `sha256` is that of its index.json, which holds the shards'."""

    batch: str
    folder: Path
    sha256: str
    counts: dict[str, int]


def shard_sets(role: str, checkout: Path = Path()) -> list[ShardSet]:
    """All shard sets of a role that lie under data/shards/, by name of batch."""
    found = []
    for index in sorted((checkout / "data/shards" / role).glob("[!.]*/index.json")):  # dot: half-made
        content = index.read_bytes()
        splits = json.loads(content).get("splits", {})
        counts = {split: int(facts["count"]) for split, facts in splits.items()}
        found.append(ShardSet(index.parent.name, index.parent, hashlib.sha256(content).hexdigest(), counts))
    return found


def shard_sets_of(run: "Run", checkout: Path) -> list[ShardSet]:
    """Those shard sets in a checkout that a run of `finetune` was made from: the same images, written the same way."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    digests = {each.dataset.name: each.dataset.digest for each in inputs}
    return [each for each in shard_sets("finetune", checkout) if digests.get(each.batch) == _digest(each)]


def data_fingerprint() -> str:
    """sha256 over the shard sets of both roles: the same for the same training and test data, whatever the machine."""
    sets = [(role, each.batch, each.sha256) for role in ("pretrain", "finetune") for each in shard_sets(role)]
    return hashlib.sha256(json.dumps(sets).encode()).hexdigest()


def _log_inputs(client: "MlflowClient", run_id: str, role: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=each.batch,
                digest=_digest(each),
                source_type="local",
                source=json.dumps({"uri": str(each.folder)}),
                profile=json.dumps({"sha256": each.sha256, **each.counts}),
            ),
            [InputTag("mlflow.data.context", "training")],
        )
        for each in shard_sets(role)
    ]
    if inputs:
        client.log_inputs(run_id, inputs)


def _digest(shard_set: ShardSet) -> str:
    return shard_set.sha256[:36]  # as long as MLflow takes it; the whole is in the profile


def git_tags() -> dict[str, str]:
    """`git.commit`, and `git.dirty` where the tree differs from it. Empty where this is no root of a repository.

    dvc.lock and reports/ do not count: they are what `dvc repro` writes, so they differ while it runs.
    """
    try:
        prefix = _git("rev-parse", "--show-prefix")
        commit = _git("rev-parse", "--verify", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!dvc.lock", ":!reports")
    except FileNotFoundError:
        logger.info("git is not installed: no git.commit is recorded")
        return {}
    except subprocess.CalledProcessError as error:
        logger.info("no git.commit is recorded: %s", " ".join(error.stderr.split()) or "git failed")
        return {}
    if prefix:
        logger.info("no git.commit is recorded: this folder lies inside another repository")
        return {}
    return {"git.commit": commit} | ({"git.dirty": "true"} if changed else {})


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


# ---------------------------------------------------------------------------------------- what a run came out with


def log_model(
    run: "Run",
    code: Path,
    folder: Path,
    output: Mapping[str, str],
    requirements: Sequence[str],
    tags: Mapping[str, str],
) -> str:
    """Logs a pyfunc model with the run; returns its URI (models:/m-...). What an earlier try left there is taken out.

    Args:
        code: a file of Python, "models from code": nothing is pickled.
        folder: its artifact `model`, weights and all.
        output: column to element type of its answer; each is a list per image.
    """
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType

    client = open_client()
    _delete_models(client, run, tags)
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(Array(DataType[kind]), name) for name, kind in output.items()]),
        params=ParamSchema([ParamSpec("top_k", DataType.long, 5)]),
    )
    # Made first, in the run's experiment: Model.log alone would put it into the one called Default.
    logged = client.create_logged_model(
        run.info.experiment_id, "model", source_run_id=run.info.run_id, tags=dict(tags), params=dict(run.data.params)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*An input example was not provided")  # the signature says all
        # Not mlflow.pyfunc.log_model: that one starts the run again, and would move its end to now. `step` keeps
        # MLflow from copying the first epoch's metrics (step 0) to the model.
        Model.log(
            None,
            flavor=mlflow.pyfunc,
            name="model",
            model_id=logged.model_id,
            run_id=run.info.run_id,
            step=1_000_000,
            python_model=str(code),
            artifacts={"model": str(folder)},
            signature=signature,
            pip_requirements=list(requirements),
        )
    return f"models:/{logged.model_id}"


def delete_model(source: str) -> None:
    """Takes a logged model (models:/m-...) out again."""
    open_client().delete_logged_model(source.removeprefix("models:/"))


def _delete_models(client: "MlflowClient", run: "Run", tags: Mapping[str, str]) -> None:
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    # Under whatever name: the same weights may be registered under several.
    registered = {version.source for version in client.search_model_versions(f"run_id = '{run.info.run_id}'")}
    for model in found:
        if tags.items() <= model.tags.items() and f"models:/{model.model_id}" not in registered:
            client.delete_logged_model(model.model_id)


def log_metrics(run: "Run", metrics: Mapping[str, float], source: str) -> None:
    """Figures of a finished run, shown with its logged model too. Those that are no numbers are left out."""
    from mlflow.entities import Metric

    now, model_id = int(time.time() * 1000), source.removeprefix("models:/")
    rows = [
        Metric(name, float(value), now, 0, model_id=model_id, run_id=run.info.run_id)
        for name, value in metrics.items()
        if isinstance(value, int | float)
    ]
    for start in range(0, len(rows), 1000):  # the most that a request may carry
        open_client().log_batch(run.info.run_id, metrics=rows[start : start + 1000], synchronous=True)


def log_files(run: "Run", folder: Path) -> None:
    """All files of `folder`, at the root of the run's artifacts."""
    open_client().log_artifacts(run.info.run_id, str(folder))


def download(run_id: str, path: str, folder: Path) -> Path | None:
    """A file of a run's artifacts, copied into `folder`; None where there is no such file, or no such run any more."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    client = open_client()
    parent = str(Path(path).parent)
    try:
        if path not in {each.path for each in client.list_artifacts(run_id, None if parent == "." else parent)}:
            return None
        return Path(client.download_artifacts(run_id, path, str(folder)))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def download_model(version: "Version", folder: Path) -> None:
    """Copies the files of a registered model into `folder`, which exists. Nothing of them is loaded.

    Raises:
        StageError: they cannot be had.
    """
    open_client()
    import mlflow

    try:
        mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.number}", dst_path=str(folder))
    except Exception as error:  # MLflow's, the object store's, the disk's
        raise StageError(f"version {version.number} cannot be downloaded: {type(error).__name__}: {error}") from error
    if not any(folder.iterdir()):  # MLflow only logs that there was nothing
        raise StageError(f"version {version.number} cannot be downloaded: the registry holds no file of it")


def weights_sha256(model: Path) -> str:
    """sha256 of the weights in the folder of a downloaded model; empty where it holds none."""
    found = sorted(model.rglob("model.safetensors"))
    return sha256(found[0]) if found else ""


# -------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Version:
    """A version in the registry, as much of it as the pipeline works with."""

    name: str
    number: int
    run_id: str
    source: str
    tags: dict[str, str]
    aliases: tuple[str, ...]
    description: str
    """The model card, in Markdown."""
    created: float
    """Seconds since the epoch."""

    @property
    def sha256(self) -> str:
        """Of its weights; empty where registering it did not get that far."""
        return self.tags.get(SHA256, "")

    @property
    def commit(self) -> str:
        """The git commit that gives this version again; empty where there is none (yet)."""
        return self.tags.get("git.commit", "")

    @property
    def unfinished(self) -> bool:
        """Retrain has registered it and not committed yet: nobody may promote it."""
        return UNFINISHED in self.tags


def versions(name: str) -> list[Version]:
    """All versions of a registered model, newest first; empty where there is no such model."""
    client = open_client()
    models = client.search_registered_models(f"name = '{name}'")
    if not models:
        return []
    aliases = {
        alias: int(number) for alias, number in models[0].aliases.items()
    }  # the search for versions leaves them out
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return sorted((_version(each, aliases) for each in found), key=lambda version: -version.number)


def model_names() -> list[str]:
    """All models of the registry, whoever registered them."""
    client, names, token = open_client(), list[str](), None
    while True:
        page = client.search_registered_models(page_token=token)
        names += [model.name for model in page]
        if not (token := page.token):
            return names


def find_version(name: str, model_sha256: str) -> Version | None:
    """The version with these weights, by its tag `model.sha256`."""
    return next((version for version in versions(name) if version.sha256 == model_sha256), None)


def version_by_alias(name: str, alias: str) -> Version | None:
    """The version that an alias points at, if any."""
    return next((version for version in versions(name) if alias in version.aliases), None)


def _version(found: "ModelVersion", aliases: Mapping[str, int]) -> Version:
    number = int(found.version)
    return Version(
        name=found.name,
        number=number,
        run_id=found.run_id or "",
        source=found.source or "",
        tags=dict(found.tags),
        aliases=tuple(alias for alias, target in aliases.items() if target == number),
        description=found.description or "",
        created=(found.creation_timestamp or 0) / 1000,
    )


def create_version(
    name: str, model_description: str, source: str, run_id: str, tags: Mapping[str, str], description: str
) -> Version:
    """A new version of the logged model `source` (models:/m-...), with tags and description in one write.

    The registered model is made where it is missing; `model_description` is only used then.
    """
    client = open_client()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=model_description)
    model_id = source.removeprefix("models:/")
    created = client.create_model_version(
        name, source, run_id=run_id, tags=dict(tags), description=description, model_id=model_id
    )
    return _version(created, {})


def finish_version(version: Version, model_sha256: str) -> None:
    """Tags a version with `model.sha256`, by which it counts as registered, and takes the tag `registering` away."""
    client = open_client()
    client.set_model_version_tag(version.name, str(version.number), SHA256, model_sha256)
    client.delete_model_version_tag(version.name, str(version.number), "registering")


def commit_version(version: Version, commit: str) -> None:
    """Names the commit of an unfinished version, in its card and its tags; from then on it counts as finished.

    May be repeated, and may die between its writes: the tag `unfinished` goes last.
    """
    client, number = open_client(), str(version.number)
    card = version.description.replace(COMMIT_TO_COME, commit)
    client.update_model_version(version.name, number, description=card)
    client.set_model_version_tag(version.name, number, "git.commit", commit)
    if version.unfinished:
        client.delete_model_version_tag(version.name, number, UNFINISHED)


def set_tags(version: Version, tags: Mapping[str, str]) -> None:
    """Sets tags of a version; a later value replaces an earlier one."""
    client = open_client()
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.number), key, value)


def delete_tag(version: Version, key: str) -> None:
    """Takes a tag off a version that has it."""
    open_client().delete_model_version_tag(version.name, str(version.number), key)


def describe_version(version: Version, card: str) -> None:
    """Replaces the version's description."""
    open_client().update_model_version(version.name, str(version.number), description=card)


def model_description(name: str) -> str:
    """The description of a registered model; empty where there is no such model."""
    found = open_client().search_registered_models(f"name = '{name}'")
    return (found[0].description or "") if found else ""


def model_tags(name: str) -> dict[str, str]:
    """The tags of a registered model; none where there is no such model."""
    found = open_client().search_registered_models(f"name = '{name}'")
    return dict(found[0].tags) if found else {}


def set_model_tag(name: str, key: str, value: str) -> None:
    """Sets a tag of a registered model; a later value replaces an earlier one."""
    open_client().set_registered_model_tag(name, key, value)


def describe_model(name: str, text: str) -> None:
    """Replaces the description of a registered model."""
    open_client().update_registered_model(name, description=text)


def delete_alias(name: str, alias: str) -> None:
    """Takes an alias off whatever it points at."""
    open_client().delete_registered_model_alias(name, alias)


def delete_version(version: Version) -> None:
    """Takes a version out of the registry, with its aliases; the logged model stays with its run."""
    open_client().delete_model_version(version.name, str(version.number))


def set_alias(version: Version, alias: str) -> None:
    """Points an alias at a version; one atomic write, whatever it pointed at before."""
    open_client().set_registered_model_alias(version.name, alias, str(version.number))


# ----------------------------------------------------------------------------------------------------------- links
# MLflow opens in its GenAI mode, which has no link to the models: hence deep links. Without a server's address they are
# relative, and lead from one page of the UI to another, wherever it runs.


def run_link(run: "Run", server: str = "") -> str:
    """The page of a run."""
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def artifact_link(run: "Run", path: str, server: str = "") -> str:
    """The page of a run's artifact, shown in place where it is HTML."""
    return f"{run_link(run, server)}/artifacts/{quote(path)}"


def version_link(name: str, number: int, server: str = "") -> str:
    """The page of a version of a model."""
    return f"{server}/#/models/{quote(name)}/versions/{number}"


def comparison_link(runs: Sequence["Run"], server: str = "") -> str:
    """The page that compares runs side by side."""
    experiments = sorted({run.info.experiment_id for run in runs})
    which = {"runs": [run.info.run_id for run in runs], "experiments": experiments}
    return f"{server}/#/compare-runs?" + "&".join(f"{key}={quote(json.dumps(value))}" for key, value in which.items())


def newest_runs(stage: str, count: int = 10) -> list["Run"]:
    """The newest finished runs of a stage, newest first."""
    client = open_client()
    experiment = client.get_experiment_by_name(EXPERIMENTS.format(stage=stage))
    if not experiment:
        return []
    return list(
        client.search_runs(
            [experiment.experiment_id],
            "attributes.status = 'FINISHED'",
            max_results=count,
            order_by=["attributes.start_time DESC"],
        )
    )
