"""Parameters of training that are wrong, or do not go together, are named before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.params.all import check_all
from stages.runtime.params_file import ParamsError, read_params
from tests.workspace import ROOT

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("finetune", {"lr": -0.1}, "`finetune.lr`: input should be greater than 0, got -0.1"),
    ("pretrain", {"optimiser": "sgdm"}, "`pretrain.optimiser`: input should be 'sgd', 'adamw' or 'muon'"),
    ("pretrain", {"ema_decay": 0.9}, "unknown key `pretrain.ema_decay`"),
    ("finetune", {"schedule": "steps"}, "`schedule: steps` and `milestones` go together"),
    ("finetune", {"milestones": [3]}, "`schedule: steps` and `milestones` go together"),
    ("finetune", {"schedule": "steps", "milestones": [3, 99]}, "`milestones` must rise and lie below `epochs`"),
    ("finetune", {"accumulate": 17}, r"`batch_size` \(32\) has fewer than 2 images for each of 17 parts"),
    ("finetune", {"start_size": 48, "end_size": 40}, r"`start_size` \(48\) is more than `end_size` \(40\)"),
    ("finetune", {"start_size": 64}, "`finetune.start_size` is 64, more than the size that training ends at"),
    ("finetune", {"end_size": 300}, r"`shard.finetune.resize` is 64, smaller than `finetune.end_size` \(300\)"),
    ("finetune", {"monitor": "val_robust_top1"}, "`monitor: val_robust_top1` needs `adversarial`"),
    ("finetune", {"monitor": "knn_top1"}, "`monitor: knn_top1` is for pretraining without labels"),
    ("finetune", {"adversarial": {"epsilon": 0}}, "`finetune.adversarial.epsilon`: input should be greater than 0"),
    ("finetune", {"adversarial": {}, "mixup": 0.2}, "`adversarial` needs the label of each image"),
    ("finetune", {"lora": {"rank": 0}}, "`finetune.lora.rank`: input should be greater than or equal to 1"),
    ("finetune", {"strategy": "linear"}, "`finetune.strategy`: input should be 'head', 'last_block'"),
    (
        "pretrain",
        {"method": "simclr", "cutmix": 1.0},
        "`method: simclr` knows no labels: `mixup`, `cutmix` and `adversarial` must be off$",
    ),
    ("pretrain", {"monitor": "knn_top1"}, "`monitor: knn_top1` is for `method: simclr` and `vicreg`"),
    ("pretrain", {"method": "simclr", "patience": 3}, "`patience` watches val_loss, which `method: simclr` does not"),
    ("pretrain", {"method": "byol"}, "`pretrain.method`: input should be 'supervised', 'simclr', 'vicreg' or 'none'"),
    ("model", {"stem": "tiny"}, "`model.stem`: input should be 'standard', 'half' or 'small'"),
    ("training", {"world_size": 3, "nodes": 2}, r"`world_size` \(3\) is no multiple of `nodes` \(2\)"),
    ("training", {"precision": "fp8"}, "`training.precision`: input should be 'auto', 'float32', 'bf16' or 'fp16'"),
    ("evaluate", {"robustness": False}, "`evaluate.robustness`: should be keys with their values, or left out"),
    (
        "validate",
        {"drift": {"stop": True}},
        "`validate.drift`: there is no `stop` any more; set `validate.severity.no_drift` to `stop` or `note`$",
    ),
    ("tune", {"metric": "test_top1"}, "`tune.metric`: input should be 'val_loss'"),
]


@pytest.mark.parametrize(("section", "values", "words"), WRONG)
def test_a_wrong_value_is_named_with_the_rule(section: str, values: dict[str, Any], words: str, tmp_path: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params[section] |= values
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    with pytest.raises(ParamsError, match=words):
        check_all(tmp_path / "params.yaml")


def test_pretraining_without_labels_needs_images_to_pretrain_on(tmp_path: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    del params["batches"]["upstream"]
    params["pretrain"]["method"] = "vicreg"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    with pytest.raises(ParamsError, match=r"`pretrain\.method` is vicreg, but no batch has the role pretrain"):
        check_all(tmp_path / "params.yaml")


def test_a_key_that_is_there_twice_is_an_error_that_says_where(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    changed = text.replace("\ntraining:", "\nmodel: {architecture: resnet50, image_size: 64}\ntraining:")
    (tmp_path / "params.yaml").write_text(changed, encoding="utf-8")
    with pytest.raises(ParamsError, match=r"a key is there twice: first(.|\n)*then `model`(.|\n)*line \d+"):
        check_all(tmp_path / "params.yaml")


def test_merged_keys_of_yaml_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\n", encoding="utf-8")
    assert read_params(tmp_path / "params.yaml")["d"] == {"b": 3, "c": 2}
