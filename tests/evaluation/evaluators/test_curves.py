"""Charts of training."""

from stages.evaluation.evaluators.curves import panels


def test_a_loss_of_zero_has_a_chart() -> None:
    shown = panels({"finetuned": [{"epoch": 1, "train_loss": 0.0, "val_loss": 0.0}]})
    assert [panel["title"] for panel in shown] == ["Target: loss"]
