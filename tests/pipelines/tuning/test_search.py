"""The search: as many trials as wanted, pruned, failed, taken up again, by several workers; and a ready params file.

A small script stands in for `stages.finetune --trial`; the last test has the real one.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml

from pipelines.tuning import search as tuning
from pipelines.tuning import trial as trial_module
from pipelines.tuning.trial import EpochWatch, Stop
from stages.params.finetune import Finetune
from stages.params.tune import Tune
from stages.runtime.command import StageError
from stages.runtime.params_file import ParamsError, check, load_section
from tests.workspace import ROOT, Workspace, held, until, written

STAND_IN = '''
"""Its val loss is (lr - 0.1)^2 + 1 / epoch; it fails where weight_decay is above 0.5, and goes on where it was."""
import fcntl, json, os, pathlib, sys, time, yaml
folder = pathlib.Path(sys.argv[1])
finetune = yaml.safe_load(open(os.environ["SYNSET_PARAMS"]))["finetune"]
if finetune["weight_decay"] > 0.5:
    sys.exit("error: finetuned: the loss is nan")
progress = folder / "finetuned/progress.jsonl"
progress.parent.mkdir(exist_ok=True)
lines = progress.read_text().splitlines() if progress.exists() else []
(folder / "begun.txt").open("a").write(f"{len(lines)}\\n")
judged = folder / "judged.txt"
for epoch in range(len(lines) + 1, 5):
    wait = lines and os.environ.get("WAIT_UNTIL_JUDGED")
    while wait and not (judged.exists() and judged.read_text() == str(epoch - 1)):
        time.sleep(0.01)
    lines.append(json.dumps({"epoch": epoch, "val_loss": (finetune["lr"] - 0.1) ** 2 + 1 / epoch}))
    progress.write_text("".join(line + "\\n" for line in lines))
    if os.environ.get("WAIT_FOR"):
        fcntl.flock(open(os.environ["WAIT_FOR"]), fcntl.LOCK_SH)
'''
SPACE: dict[str, Any] = {"finetune.lr": {"low": 0.001, "high": 10.0, "log": True}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout whose stages before finetune have run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYNSET_TRACKING", "off")
    inputs = ["models/backbone/config.json", "data/shards/finetune/mine/index.json", "stages/training/loop/loop.py"]
    dependencies = ["models/backbone", "data/shards/finetune", "stages/training/loop/loop.py"]
    (tmp_path / "dvc.yaml").write_text(
        yaml.safe_dump({"stages": {"finetune": {"deps": dependencies}}}), encoding="utf-8"
    )
    for path in inputs:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('{"splits": {"val": {"count": 9}}}', encoding="utf-8")
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    return tmp_path


def tune(**values: Any) -> Tune:
    """Four trials over the learning rate."""
    return check("tune", {"trials": 4, "prune_after": None, "space": SPACE} | values, Tune)


def search(wanted: Tune) -> optuna.Study:
    """Runs it here, with the stand-in."""
    tuning.search(wanted, (sys.executable, "stand_in.py"))
    return study()


def study() -> optuna.Study:
    """The only one."""
    (database,) = Path(".synset/tune").glob("*/study.db")
    return optuna.load_study(study_name="finetune", storage=f"sqlite:///{database}")


def test_the_best_trial_becomes_a_complete_params_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = search(tune(trials=6))
    assert len(found.trials) == 6
    (written,) = place.glob(".synset/tune/*/best.yaml")
    best = yaml.safe_load(written.read_text(encoding="utf-8"))
    assert best["finetune"]["lr"] == found.best_params["finetune.lr"]
    before = yaml.safe_load((place / "params.yaml").read_text(encoding="utf-8"))
    before["finetune"]["lr"] = best["finetune"]["lr"]
    assert best == before
    comments = [line for line in (place / "params.yaml").read_text(encoding="utf-8").splitlines() if "#" in line]
    assert len(comments) > 20 and set(comments) <= set(written.read_text(encoding="utf-8").splitlines())
    said = capsys.readouterr().out
    assert "cp .synset/tune/" in said and f"{found.best_value:.4f}" in said
    folder = written.parent
    assert (folder / "pictures/history.png").stat().st_size > 5000
    assert not list(folder.glob("*/finetuned")), "checkpoints of ended trials are gone"


def test_a_small_number_stays_a_number_in_the_params_file(place: Path) -> None:
    search(tune(trials=1, space={"finetune.weight_decay": {"choices": [0.00001]}}))
    (written,) = place.glob(".synset/tune/*/best.yaml")
    assert load_section("finetune", Finetune, written).weight_decay == 0.00001


def test_the_same_study_has_the_same_trials_also_after_a_stop(
    place: Path,
) -> None:
    whole = [trial.params for trial in search(tune(trials=5)).trials]
    (database,) = place.glob(".synset/tune/*/study.db")
    database.unlink()
    search(tune(trials=2))
    assert [trial.params for trial in search(tune(trials=5)).trials] == whole


def test_a_search_that_is_over_does_nothing_more(place: Path) -> None:
    search(tune())
    began = len(list(place.glob(".synset/tune/*/*/begun.txt")))
    search(tune())
    assert began == 4 == len(list(place.glob(".synset/tune/*/*/begun.txt")))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial begins an epoch only when the search has judged the one before."""
    should_stop = EpochWatch.should_stop

    def noted(watch: EpochWatch) -> bool:
        stops = should_stop(watch)
        if watch.epochs and not stops:
            (watch.progress.parents[1] / "judged.txt").write_text(str(watch.epochs))
        return stops

    monkeypatch.setattr(EpochWatch, "should_stop", noted)
    monkeypatch.setattr(trial_module, "Stop", lambda also, every: Stop(also, every=0))
    monkeypatch.setenv("WAIT_UNTIL_JUDGED", "yes")


@pytest.mark.usefixtures("judged")
def test_a_trial_worse_than_the_median_is_stopped(place: Path) -> None:
    found = search(tune(trials=7, prune_after=2))
    far = {trial.number: (trial.params["finetune.lr"] - 0.1) ** 2 for trial in found.trials}
    pruned = [trial for trial in found.trials if trial.state.name == "PRUNED"]
    assert pruned and all(2 <= len(trial.intermediate_values) < 4 for trial in pruned)
    for trial in pruned:
        assert far[trial.number] > sorted(far[number] for number in range(trial.number))[trial.number // 2 - 1]


def test_a_trial_that_fails_is_noted_and_the_search_goes_on(place: Path) -> None:
    space = {"finetune.weight_decay": {"choices": [0.0, 0.6]}, **SPACE}
    found = search(tune(trials=8, space=space))
    failed = [trial for trial in found.trials if trial.state.name == "FAIL"]
    assert 0 < len(failed) < 8 == len(found.trials)
    said = failed[0].user_attrs["error"]
    assert said.startswith("error: finetuned: the loss is nan (all that it said: .synset/tune/")
    assert Path(said.split(": ")[-1][:-1]).read_text(encoding="utf-8") == "error: finetuned: the loss is nan\n"


@pytest.mark.usefixtures("judged")
def test_short_trainings_are_no_measure_for_long_ones(place: Path) -> None:
    found = search(tune(trials=7, prune_after=1, space={"finetune.epochs": {"choices": [4, 16]}, **SPACE}))
    assert {trial.state.name for trial in found.trials} == {"COMPLETE"}


def test_a_search_whose_trials_all_fail_stops_and_says_why(place: Path) -> None:
    with pytest.raises(
        StageError, match="the first 3 trials failed; the last one said: error: finetuned: the loss is nan"
    ):
        search(tune(trials=9, space={"finetune.weight_decay": {"low": 0.6, "high": 0.9}}))


def worker(place: Path, trials: int, wait_for: str = "") -> "subprocess.Popen[str]":
    """Another worker of the same study, as in another terminal; its trials wait in each epoch for that file's lock."""
    code = (
        "import sys; from pipelines.tune import tune_section; from pipelines.tuning.search import search\n"
        f"from stages.runtime.command import run\nwanted = tune_section({trials}, None)\n"
        "run(lambda: search(wanted, (sys.executable, 'stand_in.py')))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WAIT_FOR": wait_for}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=place,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def with_space(place: Path) -> None:
    """params.yaml with the space of these tests."""
    params = yaml.safe_load((place / "params.yaml").read_text(encoding="utf-8"))
    params["tune"] |= {"space": SPACE, "prune_after": None}
    (place / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def test_two_workers_make_as_many_trials_as_wanted_together(place: Path) -> None:
    with_space(place)
    with held(place / "held"):
        workers = [worker(place, 6, wait_for="held") for _ in range(2)]
        for each in workers:
            until(lambda: len(list(place.glob(".synset/tune/*/*/begun.txt"))) == 2, each)
    said = [each.communicate()[1] for each in workers]
    assert [each.returncode for each in workers] == [0, 0], said
    assert len(study().trials) == 6
    assert all("trial" in words for words in said), "both had their part"


def test_a_trial_that_outlives_its_worker_is_not_begun_a_second_time(place: Path) -> None:
    with_space(place)
    with held(place / "held"):
        killed = worker(place, 1, wait_for="held")
        began = written(place, ".synset/tune/*/0/begun.txt", killed)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert worker(place, 2).wait() == 0
        assert len(began.read_text(encoding="utf-8").split()) == 1, "the first process was still at it"
        running = [trial.number for trial in study().trials if trial.state.name == "RUNNING"]
        assert running == [0]
    with (began.parent / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # had as soon as that process has ended
    assert worker(place, 2).wait() == 0
    assert [trial.state.name for trial in study().trials].count("COMPLETE") == 2


@pytest.mark.parametrize(("recipe", "value"), [({}, 0.5), ({"patience": 3}, 0.2)])
def test_a_trial_is_judged_by_the_weights_that_it_keeps(place: Path, recipe: dict[str, Any], value: float) -> None:
    params = yaml.safe_load((place / "params.yaml").read_text(encoding="utf-8"))
    params["finetune"] |= {"monitor": "val_loss", "patience": None} | recipe
    (place / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    losses = "0.3 if epoch == 1 else 0.2 if epoch == 2 else 0.5"
    (place / "stand_in.py").write_text(
        STAND_IN.replace('(finetune["lr"] - 0.1) ** 2 + 1 / epoch}', losses + "}"), encoding="utf-8"
    )
    assert search(tune(trials=1)).best_value == value


def test_a_metric_that_trials_do_not_measure_is_said_before_any(place: Path) -> None:
    with pytest.raises(ParamsError, match=r"`tune.metric` is val_robust_top1, which is measured where `finetune.adv"):
        search(tune(metric="val_robust_top1"))
    (place / "data/shards/finetune/mine/index.json").write_text('{"splits": {"train": {"count": 9}}}', encoding="utf-8")
    with pytest.raises(StageError, match=r"`tune.metric` is val_loss, but val has no images; set `split.val_fraction`"):
        search(tune())
    assert not Path(".synset/tune").exists()


def test_a_metric_that_one_choice_does_not_measure_is_said_of_its_trial(place: Path) -> None:
    space = {"finetune.adversarial": {"choices": [None]}}
    with pytest.raises(StageError, match=r"`tune.metric` is val_robust_top1, .* \(no `finetune.adversarial`\)"):
        search(tune(metric="val_robust_top1", space=space))


def test_a_key_below_one_that_is_null_is_searched(place: Path) -> None:
    space = {"finetune.adversarial.epsilon": {"low": 1.0, "high": 4.0}}
    found = search(tune(trials=1, space=space))
    (best,) = place.glob(".synset/tune/*/best.yaml")
    written_values = yaml.safe_load(best.read_text(encoding="utf-8"))["finetune"]["adversarial"]
    assert written_values == {"epsilon": found.best_params["finetune.adversarial.epsilon"]}


def test_what_a_killed_worker_was_at_is_taken_up_and_goes_on(place: Path) -> None:
    with_space(place)
    with held(place / "held"):  # after its first epoch
        killed = worker(place, 2, wait_for="held")
        begun = written(place, ".synset/tune/*/0/finetuned/progress.jsonl", killed)
        until(lambda: begun.read_text(encoding="utf-8"), killed)
        trials = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
        killed.wait()
        for process in trials:  # its trial, which a closed terminal would end too
            process.kill()
        assert trials
        psutil.wait_procs(trials)
    assert worker(place, 2).wait() == 0
    ended = [trial for trial in study().trials if trial.state.name == "COMPLETE"]
    assert len(ended) == 2
    assert ended[0].user_attrs["goes on"] == 0
    began = (begun.parents[1] / "begun.txt").read_text(encoding="utf-8").split()
    assert began[0] == "0" and int(began[1]) >= 1, "from its last epoch, not from the start"


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "`tune.space` is empty"),
        ({"finetune.lrr": {"low": 0.1, "high": 1.0}}, "unknown key `finetune.lrr`"),
        ({"finetune.lr": {"low": -0.1, "high": 1.0}}, "`finetune.lr`: input should be greater than 0, got -0.1"),
        ({"finetune.strategy": {"choices": ["full", "some"]}}, "`finetune.strategy`: input should be 'head'"),
        ({"finetune.lr.x": {"low": 0.1, "high": 1.0}}, "`finetune.lr.x` cannot be searched: `lr` has no keys"),
    ],
)
def test_a_bad_space_is_named_before_anything_runs(place: Path, space: dict[str, Any], words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        search(tune(space=space))
    assert not Path(".synset/tune").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"space": {"evaluate.seed": {"low": 1, "high": 2}}}, "`evaluate.seed` cannot be searched"),
        ({"space": {"finetune.lr": {"low": 2.0, "high": 1.0}}}, r"`low` \(2.0\) is above `high`"),
        ({"space": {"finetune.lr": {"low": 0.0, "high": 1.0, "log": True}}}, "`log` needs `low` above 0"),
        ({"space": {"finetune.epochs": {"low": 1, "high": 8, "step": 0.5}}}, r"`step` \(0.5\) must be a whole number"),
        ({"space": {"finetune.lr": {"low": 0.1, "high": 1.0, "step": -0.1}}}, "step`: input should be greater than 0"),
        ({"space": {"finetune.lr": {"low": 0.1}}}, "expected `choices`, or `low` and `high`"),
        ({"space": {"finetune.epochs": {"choices": [1, 2], "high": 5}}}, "`choices` must name one at least, and go wi"),
        (
            {"space": {"finetune.lr": {"choices": [0.1], "log": True}}},
            "`choices` must name one at least, and go without",
        ),
        ({"space": {"model.architecture": {"choices": ["resnet18", "resnet34"]}}}, "it is the backbone's too"),
        ({"metric": "test_top1"}, "`tune.metric`: input should be 'val_loss'"),
    ],
)
def test_what_cannot_be_searched_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        tune(**values)


def test_other_data_and_other_code_are_another_study(place: Path) -> None:
    search(tune(trials=1))
    for number, path in enumerate(("models/backbone/config.json", "stages/training/loop/loop.py"), 2):
        (place / path).write_text('{"other": 1}', encoding="utf-8")
        tuning.search(tune(trials=1), (sys.executable, "stand_in.py"))
        assert len(list(place.glob(".synset/tune/*/study.db"))) == number


def test_what_is_missing_is_named_with_the_command_that_makes_it(place: Path) -> None:
    (place / "models/backbone/config.json").unlink()
    with pytest.raises(StageError, match=r"models/backbone, which is missing; `dvc repro`"):
        search(tune())


@pytest.mark.slow
def test_real_trials_are_nested_runs_and_never_open_the_test_split(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.repro("pretrain", "shard")
    params = workspace.params
    params["finetune"] |= {"epochs": 2, "batch_size": 16}
    params["tune"] |= {"trials": 2, "space": SPACE, "metric": "val_top1"}
    workspace.write_params(params)
    for shard in workspace.root.glob("data/shards/finetune/*/test-*"):
        shard.unlink()
    done = workspace.run(sys.executable, "-m", "pipelines.tune")
    assert done.returncode == 0, done.stdout
    (best,) = workspace.root.glob(".synset/tune/*/best.yaml")
    checked = workspace.run(sys.executable, "-m", "stages.params.all", SYNSET_PARAMS=str(best))
    assert checked.returncode == 0, checked.stdout
    code = (
        "import json, mlflow; mlflow.set_tracking_uri('sqlite:///mlflow.db'); "
        "runs = mlflow.search_runs(experiment_names=['synset/tune'], output_format='list'); "
        "facts = [[r.info.run_id, r.data.tags.get('mlflow.parentRunId'), r.info.status, sorted(r.data.metrics)] "
        "for r in runs]; print(json.dumps(facts))"
    )
    runs = json.loads(workspace.run(sys.executable, "-c", code).stdout.splitlines()[-1])
    (parent,) = [each for each in runs if each[1] is None]
    trials = [each for each in runs if each[1] == parent[0]]
    assert len(trials) == 2 and all("val_top1" in metrics for *_, metrics in trials)
    assert {status for _, _, status, _ in runs} == {"FINISHED"}
