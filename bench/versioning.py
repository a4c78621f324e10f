"""What a team moves through a DVC remote: all of it, then a fresh batch of 1 %. Synset's tars against loose images.

    python -m bench.versioning --images DIR --check

One checkout makes the data stages of the images, 99 % as one batch and 1 % as a later one; the other tracks the folder
of images itself, as most templates do. Each is pushed to a remote, pulled into a clone, and both again for the fresh
1 %: once the remote is a plain directory, once a bucket of an S3 server on this machine (moto's). Every clone is
compared with what was pushed, file by file. The copy of Synset is of the commit that is checked out here.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.rounds import ROOT, Bound, Candidate, Table, arguments, machine, measure, report, versions
from pipelines.environment import settings
from stages.runtime.command import StageError, run
from stages.runtime.files import sha256
from stages.runtime.params_file import read_params
from stages.runtime.yaml_text import dump_yaml

FRESH_EVERY = 100
"""One image of so many comes in the fresh batch."""
OURS, LOOSE, ALONE = "Synset's tars", "loose images under DVC", "the fresh images themselves"
SECONDS = ("push", "pull", "push of the fresh 1 %", "pull of the fresh 1 %", "status, nothing new")
SHARES = ("pushed with the fresh 1 %", "pulled with the fresh 1 %")


@dataclass(frozen=True)
class Checkout:
    """A git checkout with DVC in it."""

    root: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    """More environment for what runs in it: credentials, SYNSET_INCOMING."""

    def run(self, *command: str) -> str:
        """What the command says, output and errors together.

        Raises:
            StageError: it fails.
        """
        environment = os.environ | settings(self.root if (self.root / "environment.mk").is_file() else ROOT)
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command, cwd=self.root, env=environment | dict(self.variables), text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            raise StageError(f"`{' '.join(command)}` in {self.root} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def seconds(self, *command: str) -> float:
        """That the command takes."""
        began = time.perf_counter()
        self.run(*command)
        return time.perf_counter() - began

    def commit(self, message: str) -> str:
        """All that there is as a commit; its id."""
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=bench", "-c", "user.email=bench@example.org", "commit", "-qm", message)
        return self.run("git", "rev-parse", "HEAD").strip()

    def use(self, remote: "Remote") -> None:
        """Makes it the default remote."""
        self.run("dvc", "remote", "add", "--local", "-f", "-d", "team", remote.url)
        if remote.endpoint:
            self.run("dvc", "remote", "modify", "--local", "team", "endpointurl", remote.endpoint)

    def clone(self, target: Path) -> "Checkout":
        """A clone, as a colleague makes it: without a cache."""
        self.run("git", "clone", "-q", str(self.root), str(target))
        return Checkout(target, self.variables)

    def cached(self) -> dict[str, int]:
        """Bytes by name of all that is in DVC's cache."""
        return _sizes(self.root / ".dvc/cache/files")

    def data(self) -> dict[str, str]:
        """sha256 by path of all that DVC put below data/."""
        files = (path for path in (self.root / "data").rglob("*") if path.is_file() and not path.name.startswith("."))
        return {path.relative_to(self.root).as_posix(): sha256(path) for path in files}


@dataclass(frozen=True)
class Remote:
    """A DVC remote, and how to look into it from outside of DVC."""

    url: str
    endpoint: str | None = None

    def contents(self) -> dict[str, int]:
        """Bytes by name of every object in it."""
        if not self.endpoint:
            return _sizes(Path(self.url))
        import s3fs  # type: ignore[import-untyped]

        bucket = s3fs.S3FileSystem(endpoint_url=self.endpoint, skip_instance_cache=True, use_listings_cache=False)
        return {name: found["size"] for name, found in bucket.find(self.url, detail=True).items()}


@dataclass(frozen=True)
class History:
    """Two commits of a checkout: with all but the fresh batch, and with it. Its cache holds the data of both."""

    checkout: Checkout
    before: str
    after: str
    targets: tuple[str, ...] = ()
    """What DVC pushes and pulls; all if none."""

    def having(self, variables: Mapping[str, str]) -> "History":
        """The same, with more environment."""
        return replace(self, checkout=replace(self.checkout, variables={**self.checkout.variables, **variables}))


@contextmanager
def s3_server() -> Iterator[tuple[str, dict[str, str]]]:
    """A server of moto's on this machine with the bucket `team`: its address, and credentials as environment."""
    import s3fs
    from moto.server import ThreadedMotoServer

    credentials = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
    before = dict(os.environ)
    for talker in ("werkzeug", "aiobotocore", "botocore"):
        logging.getLogger(talker).setLevel(logging.WARNING)  # a line for every request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        os.environ.update(credentials)  # for looking into it from this process
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        # What an earlier server of this process held: moto keeps it beyond that server's end.
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True).mkdir("team")
        yield endpoint, credentials
    finally:
        server.stop()
        for name in credentials:
            os.environ.pop(name, None)
        os.environ.update({name: before[name] for name in credentials if name in before})


def passed_on(history: History, remote: Remote, folder: Path) -> dict[str, float]:
    """Pushes and pulls both commits through an empty remote: seconds, and the second's bytes in % of the first's.

    Args:
        history: of the checkout that pushes.
        remote: empty.
        folder: for the clone that pulls; not there yet.

    Raises:
        StageError: DVC fails, or what was pulled differs from what was pushed.
    """
    author, found = history.checkout, {}
    author.run("git", "checkout", "-q", history.before)
    author.use(remote)
    found[SECONDS[0]] = author.seconds("dvc", "push", *history.targets)
    first = remote.contents()
    colleague = author.clone(folder)
    colleague.use(remote)
    found[SECONDS[1]] = colleague.seconds("dvc", "pull", *history.targets)
    had = colleague.cached()

    author.run("git", "checkout", "-q", history.after)
    found[SECONDS[2]] = author.seconds("dvc", "push", *history.targets)
    colleague.run("git", "fetch", "-q")
    colleague.run("git", "checkout", "-q", history.after)
    found[SECONDS[3]] = colleague.seconds("dvc", "pull", *history.targets)
    pushed, pulled = _added(first, remote.contents()), _added(had, colleague.cached())
    found[SHARES[0]] = 100 * sum(pushed.values()) / sum(first.values())
    found[SHARES[1]] = 100 * sum(pulled.values()) / sum(had.values())
    found["objects"], found["objects of the fresh 1 %"] = len(first), len(pushed)
    found["MB"], found["MB of the fresh 1 %"] = sum(first.values()) / 1e6, sum(pushed.values()) / 1e6

    author.run("dvc", "checkout", *history.targets)
    if author.data() != colleague.data():
        raise StageError(f"{colleague.root}: what came through {remote.url} differs from what was pushed")
    colleague.run("dvc", "status", *history.targets)
    found[SECONDS[4]] = colleague.seconds("dvc", "status", *history.targets)
    return found


def our_history(images: Sequence[Path], folder: Path, workers: int | None = None) -> History:
    """The data stages in a copy of the project: all but every hundredth image as one batch, these as another.

    Args:
        images: `.../<class>/<name>`.
        folder: not there yet.
        workers: of the stages; all cores if None.
    """
    incoming = folder.with_name(f"{folder.name}-incoming")
    for number, path in enumerate(images):
        batch = "fresh" if number % FRESH_EVERY == FRESH_EVERY - 1 else "base"
        _link(path, incoming / batch / path.parent.name / path.name)
    variables = {"SYNSET_INCOMING": str(incoming), "SYNSET_TRACKING": "off"}
    checkout = Checkout(ROOT).clone(folder)
    checkout = Checkout(checkout.root, variables | ({"SYNSET_WORKERS": str(workers)} if workers else {}))
    (folder / "dvc.lock").unlink(missing_ok=True)  # of this project's own batches
    batches = {"base": {"role": "finetune", "source": "base"}}
    before = _stages(checkout, batches)
    after = _stages(checkout, batches | {"fresh": {"role": "finetune", "source": "fresh"}})
    # The models were not made here, and a plain `dvc pull` asks for them.
    return History(checkout, before, after, ("--with-deps", "shard"))


def _stages(checkout: Checkout, batches: Mapping[str, Any]) -> str:
    path = checkout.root / "params.yaml"
    params = read_params(path)
    params["batches"] = dict(batches)
    # Few images of a class, or none before: whatever the folder, it is bytes that are counted here.
    params["split"] = {"val_fraction": 0, "test_fraction": 0, "fresh_fraction": 0}
    params["validate"] |= {"min_images_per_class": 1, "allow_new_classes": True, "max_quarantined": 1}
    params["shard"]["finetune"]["resize"] = 256
    path.write_text(dump_yaml(params), encoding="utf-8")
    checkout.run("dvc", "repro", "shard")
    return checkout.commit("data up to its shards")


def loose_history(images: Sequence[Path], folder: Path) -> History:
    """The folder of images itself under DVC, as most templates have it; the same images in the same two commits."""
    folder.mkdir(parents=True)
    checkout = Checkout(folder)
    checkout.run("git", "init", "-q")
    checkout.run("dvc", "init")
    shutil.copyfile(ROOT / ".dvc/config", folder / ".dvc/config")
    checkout.run("dvc", "config", "--local", "core.site_cache_dir", str(folder / ".dvc/site"))
    commits: list[str] = []
    for fresh in (False, True):
        for number, path in enumerate(images):
            if (number % FRESH_EVERY == FRESH_EVERY - 1) == fresh:
                target = folder / "data/images" / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        checkout.run("dvc", "add", "data/images")
        commits.append(checkout.commit("images"))
    before, after = commits
    return History(checkout, before, after)


def tables(where: str, figures: Mapping[str, Sequence[Mapping[str, float]]], alone: float) -> list[Table]:
    """Tables of the figures of `passed_on`, a list of rounds each.

    Args:
        where: kind of the remote.
        figures: by candidate, `OURS` and `LOOSE`.
        alone: bytes of the fresh images, in % of the others'.
    """
    rounds = len(figures[OURS])
    found = []
    for what in SECONDS:
        values = {name: [each[what] for each in figures[name]] for name in (OURS, LOOSE)}
        found.append(Table(f"{where}: {what}", "s", {OURS: "ours", LOOSE: "peer"}, values, lower_is_better=True))
    for what in SHARES:
        values = {name: [each[what] for each in figures[name]] for name in (OURS, LOOSE)}
        values[ALONE] = [alone] * rounds
        roles = {OURS: "ours", LOOSE: "peer", ALONE: "limit"}
        # "About 1 %": facts, accepted rows and the validation page are pushed anew as well.
        bound = [Bound(OURS, "at most", 2 * alone)]
        found.append(Table(f"{where}: {what}", "% of bytes", roles, values, bound, lower_is_better=True))  # type: ignore[arg-type]
    return found


def images_of(folder: Path) -> list[Path]:
    """Its files, sorted, `<class>/<name>` each.

    Raises:
        StageError: there are fewer than a hundred, of which 1 % is none.
    """
    found = sorted(path for path in folder.glob("*/*") if path.is_file() and not path.name.startswith("."))
    if len(found) < FRESH_EVERY:
        raise StageError(f"{folder} has {len(found)} images in class folders; 1 % wants at least {FRESH_EVERY}")
    return found


def main() -> None:
    """Ends with 1 with --check where a goal is missed."""
    options = arguments(__doc__).parse_args()
    images, state = images_of(options.images), machine()
    fresh = sum(path.stat().st_size for path in images[FRESH_EVERY - 1 :: FRESH_EVERY])
    alone = 100 * fresh / (sum(path.stat().st_size for path in images) - fresh)
    found: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="synset-bench-") as temporary, s3_server() as (endpoint, credentials):
        work = Path(temporary)
        histories = {OURS: our_history(images, work / "ours"), LOOSE: loose_history(images, work / "loose")}
        for where in ("directory", "S3"):
            figures: dict[str, list[dict[str, float]]] = {name: [] for name in histories}

            def one_round(name: str, where: str = where, figures: Any = figures) -> float:
                place = f"{name.split()[0].lower()}-{len(figures[name])}"
                remote = (
                    Remote(f"s3://team/{place}", endpoint) if where == "S3" else Remote(str(work / "remotes" / place))
                )
                figures[name].append(passed_on(histories[name].having(credentials), remote, work / "clone"))
                shutil.rmtree(work / "clone")
                return sum(figures[name][-1][what] for what in SECONDS)

            ours = Candidate(OURS, "ours", partial(one_round, OURS))
            measure([ours, Candidate(LOOSE, "peer", partial(one_round, LOOSE))], options.rounds)
            found += tables(where, {name: rounds[1:] for name, rounds in figures.items()}, alone)
            for name, rounds in figures.items():
                print(f"{where}, {name}: {counted(rounds[-1])}", flush=True)
    sys.exit(report(found, options, state, versions("dvc", "dvc-s3", "moto")))


def counted(figures: Mapping[str, float]) -> str:
    """Objects and megabytes of a round, for people."""
    return (
        f"{figures['objects']:,.0f} objects, {figures['MB']:,.1f} MB; with the fresh 1 % "
        f"{figures['objects of the fresh 1 %']:,.0f} more, {figures['MB of the fresh 1 %']:,.2f} MB"
    )


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _added(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in after.items() if name not in before}


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(path)


if __name__ == "__main__":
    run(main)
