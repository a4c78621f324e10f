"""The deployments are those of params.yaml and of prefect.yaml; missed runs are made up for once."""

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipelines.processes import deployments
from stages.params.reconcile import Reconcile
from stages.params.retrain import Retrain
from stages.runtime.params_file import load_section

ROOT = Path(__file__).resolve().parents[3]


def test_prefect_yaml_has_the_same_flows_as_params_has_them() -> None:
    found = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    deployed = {each["entrypoint"].rpartition(".")[2]: each for each in found["deployments"]}
    assert tuple(deployed) == deployments.FLOWS
    for name, each in deployed.items():
        assert each["entrypoint"] == f"{deployments.MODULES[name].__name__}.{name}"
        assert each["name"] != deployments.NAME  # both may be in one Prefect
        assert each["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    cron = load_section("retrain", Retrain, ROOT / "params.yaml").cron
    interval = load_section("reconcile", Reconcile, ROOT / "params.yaml").interval
    assert deployed["retrain"]["schedules"] == [{"cron": cron, "timezone": "UTC"}]
    assert deployed["reconcile"]["schedules"] == [{"interval": interval}]
    assert "schedules" not in deployed["verify"]


def test_the_version_of_prefect_is_that_of_the_lock() -> None:
    found = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    assert f"prefect=={found['prefect-version']}" in (ROOT / "requirements.lock").read_text(encoding="utf-8")


@pytest.mark.parametrize(("by_hand", "kept"), [((), "c"), (("b",), "b"), (("a", "b"), "ab")])
def test_of_missed_runs_one_is_kept_and_whatever_a_person_asked_for(
    monkeypatch: pytest.MonkeyPatch, by_hand: tuple[str, ...], kept: str
) -> None:
    """`retrain` with `retract`, say, started on its page in Prefect while nobody served the flows."""
    then = datetime(2026, 11, 23, tzinfo=UTC)
    runs = [
        SimpleNamespace(id=name, auto_scheduled=name not in by_hand, expected_start_time=then + timedelta(days=day))
        for day, name in enumerate("abc")
    ]
    left = {run.id for run in runs}
    client = SimpleNamespace(delete_flow_run=left.remove)
    monkeypatch.setattr(deployments, "get_client", lambda **_: nullcontext(client))
    monkeypatch.setattr(deployments, "_runs", lambda _, name, *states: runs if len(states) == 1 else [])
    deployments.put_in_order(["retrain"])
    assert left == set(kept)


def test_the_flows_are_importable_and_named_as_their_modules() -> None:
    for name in deployments.FLOWS:
        assert getattr(deployments.MODULES[name], name).name == name
