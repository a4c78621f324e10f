"""What all tests share: one cache of bytecode, one thread a process, folders that are made once in a run."""

import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]

# As `make test` has it, also where pytest is called by hand: who starts Python in a test must not compile torch again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".synset/pycache"))
# Tests run side by side, a worker on each core: threads that spin while they wait for each other starve the others.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Started in the background of a script, this process ignores Ctrl-C, and so would all that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Seconds of these files on one core; the others take less. The longest begin first, so that the workers end together.
LONG = {
    "test_repro.py": 200, "test_processes.py": 130, "test_versioning.py": 75, "test_export.py": 65,
    "test_register.py": 50, "test_models.py": 45, "test_reproduce.py": 45, "test_loop.py": 45,
    "test_augmentations.py": 45, "test_ingest.py": 40, "test_search.py": 40, "test_promotion.py": 35,
    "test_examine.py": 25, "test_shard.py": 25, "test_label_queue.py": 20, "test_validate.py": 20,
    "test_planted.py": 20, "test_evaluate.py": 15, "test_self_supervision.py": 15,
}  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Files go to the workers in the order of `pytest_collection_modifyitems`, not by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first; within a file nothing changes."""
    items.sort(key=lambda item: -LONG.get(item.path.name, 0))


@pytest.fixture(scope="module", autouse=True)
def _no_database_is_handed_on() -> Iterator[None]:
    """MLflow writes the address of its database into the environment, for processes that a later test starts."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: a folder that `make` fills, in whichever worker asks first; nobody changes it after that."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path, done = shared / name, shared / f"{name}.done"
        shared.mkdir(exist_ok=True)
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                path.mkdir()  # fails where `make` has failed before: there is no second try
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def new_database(once: Once) -> Callable[[Path], None]:
    """Puts MLflow's database, still empty, into a folder: MLflow's own way to it, all its migrations, takes seconds."""

    def make(folder: Path) -> None:
        from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

        engine = create_sqlalchemy_engine(f"sqlite:///{folder}/mlflow.db")
        _initialize_tables(engine)
        engine.dispose()

    def put(folder: Path) -> None:
        with sqlite3.connect(once("database", make) / "mlflow.db") as template:
            template.execute(f"VACUUM INTO '{folder}/mlflow.db'")

    return put
