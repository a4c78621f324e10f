"""Robustness of models that were planted so that the right answer is known."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.writing import write_shard_set
from stages.evaluation.evaluators import robustness
from stages.evaluation.evaluators.corruptions import CORRUPTIONS
from stages.evaluation.evaluators.robustness import figures, measure_robustness, moved, spread
from stages.evaluation.inference import ImageFormat, predict
from stages.evaluation.statistics.intervals import wilson
from stages.params import evaluate
from stages.params.evaluate import Evaluate, Robustness
from stages.params.training.recipe import Adversarial
from stages.runtime.command import StageError
from stages.runtime.params_file import ParamsError, check
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier, build
from tests import shard_batch
from tests.shard_batch import SHARD, accepted_batch

SIZE, RESIZE = 32, SHARD.resize
SIZES = {"image_size": SIZE, "resize": RESIZE}
COMPUTE = Compute("cpu", None, True, 1)
SETTINGS = Evaluate(bootstrap=200)
FEW = Robustness(images=12, corruptions=["gaussian_noise", "jpeg_compression"], severities=2, epsilons=[], pgd_steps=3)


class Weighted(nn.Module):
    """Logits of two classes from the weighted mean of what `mask` (SIZE, SIZE) leaves of an image."""

    def __init__(self, mask: Tensor, threshold: float, steepness: float = 1.0) -> None:
        super().__init__()
        self.mask = nn.Buffer(mask / mask.abs().sum())
        self.head = nn.Linear(1, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-steepness], [steepness]]))
            self.head.bias.copy_(torch.tensor([threshold, -threshold]) * steepness)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 2) of (n, 3, SIZE, SIZE) in 0..255."""
        logits: Tensor = self.head((images * self.mask).sum((2, 3)).mean(1, keepdim=True))
        return logits


def planted(mask: Tensor, threshold: float) -> Classifier:
    """A model that says class 1 where what the mask leaves is brighter than the threshold."""
    return Classifier(Weighted(mask, threshold), [0.0] * 3, [1 / 255] * 3).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small wait for a second thread more than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def left_half() -> Tensor:
    """The left quarter and a half: what is shifted or turned a little is still there."""
    mask = torch.zeros(SIZE, SIZE)
    mask[10:22, 4:12] = 1
    return mask


def made(folder: Path, count: int) -> Samples:
    """Shards of what shard_batch makes; all but a fifth are train."""
    write_shard_set(accepted_batch(folder / "raw", count), folder / "raw", folder / "mine", SHARD, "finetune", "mine")
    return read_samples([folder / "mine"], "train")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """60 blurred pictures of noise in three classes."""
    return made(tmp_path_factory.mktemp("noise"), 75)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """24 images with one half brighter by 20 than the other; class 0: the right one, class 1: the left one."""

    def jpeg(seed: int, **_: Any) -> bytes:
        pixels = np.full((50, 60, 3), 118, np.uint8)
        pixels[:, slice(0, 30) if seed >= 1000 else slice(30, 60)] = 138
        pixels[0, 0] = seed % 1000  # no two are the same
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=98)
        return file.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_batch, "jpeg", jpeg)
        found = made(tmp_path_factory.mktemp("halves"), 45)
    return found.at(np.flatnonzero(found.label < 2))


def figures_of(
    model: Classifier, samples: Samples, wanted: Robustness, settings: Evaluate = SETTINGS
) -> dict[str, Any]:
    """The figures."""
    found = measure_robustness(
        model, samples, wanted, image_size=SIZE, resize=RESIZE, settings=settings, compute=COMPUTE
    )
    return found.figures


def untrained(seed: int = 1) -> Classifier:
    """A real network."""
    config = {"architecture": "resnet18", "classes": ["a", "b", "c"], "image_size": SIZE,
              "mean": [0.5] * 3, "std": [0.25] * 3}  # fmt: skip
    return build(config, seed).eval()


# --------------------------------------------------------------------------------------------------------- which images


def test_images_are_of_all_classes_alike_and_more_of_them_are_the_same_and_others() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 30, 2, 100])
    few, more = spread(labels, 20, seed=1), spread(labels, 90, seed=1)
    assert len(few) == 20 and (np.diff(few) > 0).all()
    assert np.bincount(labels[few]).tolist() == [6, 6, 2, 6]
    assert np.bincount(labels[more]).tolist() in ([30, 29, 2, 29], [29, 30, 2, 29], [29, 29, 2, 30])
    assert set(few) <= set(more)
    assert few.tolist() != spread(labels, 20, seed=2).tolist()
    assert few[few >= 82].tolist() != list(range(82, 88)), "not the first ones"
    assert spread(labels, 1000, seed=1).tolist() == list(range(182))


def test_no_more_images_than_asked_for_are_shown(samples: Samples) -> None:
    seen = []
    model = untrained()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found = figures_of(model, samples, FEW)
    assert found["images"] == 12
    assert seen.count(12) == len(seen) == 1 + 2 * 2 + 1 + 4 + 2  # clean, corruptions, flip, shifts by 1 px, rotations


def test_clean_top1_is_that_of_the_same_images_as_all_figures_see_them(samples: Samples) -> None:
    model = untrained()
    chosen = samples.at(spread(samples.label, 40, SETTINGS.seed))
    logits = predict(chosen, {"it": model}, ImageFormat(SIZE, RESIZE, batch_size=7), COMPUTE)["it"].logits
    hits = int((logits.argmax(1) == chosen.label).sum())
    low, high = wilson(hits, 40, 0.95)
    found = figures_of(model, samples, FEW.model_copy(update={"images": 40}))["clean"]
    assert found == {"top1": hits / 40, "top1_low": float(low), "top1_high": float(high)}


def test_the_middle_is_what_the_loader_crops(samples: Samples) -> None:
    def loaded(size: int) -> Tensor:
        batches = evaluation_batches(
            samples.at(range(6)), image_size=size, resize=RESIZE, batch_size=6, threads=1, device="cpu"
        )
        return next(batches)[0].clone()

    for size in (RESIZE, 36, 32, 20):
        assert torch.equal(robustness._cropped(loaded(RESIZE), size), loaded(size))


# --------------------------------------------------------------------------------------------------------- determinism


def test_figures_are_the_same_again_and_for_other_parts_and_leave_chance_alone(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = FEW.model_copy(update={"epsilons": [2.0]})
    model, before = untrained(), torch.get_rng_state()
    first = figures_of(model, samples, wanted)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert figures_of(model, samples, wanted, Evaluate(bootstrap=200, batch_size=3)) == first
    monkeypatch.setattr(robustness, "PART", 5)
    # Where one attack starts depends on its part; all else is drawn image by image.
    parts = figures_of(model, samples, FEW)
    assert {**parts, "attacks": {}} == {**first, "attacks": {}}


def test_what_chance_does_depends_on_the_seed(samples: Samples) -> None:
    everything = FEW.model_copy(update={"images": len(samples)})
    one, other = (
        measure_robustness(
            untrained(), samples, everything, image_size=SIZE, resize=RESIZE, settings=settings, compute=COMPUTE
        )
        for settings in (SETTINGS, Evaluate(bootstrap=200, seed=2))
    )
    for each, again in zip(one.examples, other.examples, strict=True):
        assert each.key == again.key
        noise, jpeg = ((each.corrupted[name] == again.corrupted[name]).mean() for name in FEW.corruptions)
        assert noise < 0.5 and jpeg == 1


# --------------------------------------------------------------------------------------------------------- consistency


def test_a_constant_model_is_always_of_the_same_opinion(samples: Samples) -> None:
    constant = planted(torch.ones(SIZE, SIZE), threshold=-1)
    found = figures_of(constant, samples, FEW.model_copy(update={"epsilons": [8.0]}))
    for kind in ("flip", "shift", "rotation"):
        assert found["consistency"][kind]["same"] == found["consistency"][kind]["mean"] == 1
        assert found["consistency"][kind]["same_high"] == 1 and found["consistency"][kind]["same_low"] < 0.8
    assert found["clean"]["top1"] == pytest.approx(1 / 3)
    assert found["mce"]["error"] == pytest.approx(2 / 3) and found["mce"]["relative"] == pytest.approx(0)
    assert found["attacks"]["pgd"]["8"] == found["clean"], "an attack cannot change its mind"


def test_a_model_that_looks_at_the_left_half_alone_is_thrown_by_a_flip_and_by_nothing_else(halves: Samples) -> None:
    found = figures_of(planted(left_half(), 128), halves, FEW)
    assert found["clean"]["top1"] == 1
    assert found["consistency"]["flip"]["same"] == found["consistency"]["flip"]["mean"] == 0
    assert found["consistency"]["shift"]["same"] == found["consistency"]["rotation"]["same"] == 1


def test_same_is_under_every_change_and_mean_under_each() -> None:
    answers = {
        ("clean", "", ""): np.array([True] * 4),
        ("consistency", "shift", "up 1"): np.array([True, True, False, False]),
        ("consistency", "shift", "left 1"): np.array([True, False, True, False]),
    }
    found = figures(answers, SETTINGS)["consistency"]["shift"]
    assert (found["same"], found["mean"]) == (0.25, 0.5)
    assert (found["same_low"], found["same_high"]) == tuple(float(end) for end in wilson(1, 4, 0.95))


@pytest.mark.parametrize("resize", [64, 72, 100])
def test_moved_images_show_what_lies_around_and_make_nothing_up_where_there_is_enough(resize: int) -> None:
    y, x = torch.meshgrid(torch.arange(resize), torch.arange(resize), indexing="ij")
    wide = torch.stack([x, y, torch.full_like(x, 200)])[None].to(torch.uint8)
    start, images = (resize - 64) // 2, dict(moved(wide, 64))
    assert all(each.shape == (1, 3, 64, 64) and each.dtype == torch.uint8 for each in images.values())
    assert all((each[:, 2] == 200).all() for each in images.values()), "no black corners"
    assert torch.equal(images["flip", "horizontal"][0, 0, 0], torch.arange(start + 63, start - 1, -1))
    inner = slice(3, 61)
    for name, down, right in (("up", -1, 0), ("down", 1, 0), ("left", 0, -1), ("right", 0, 1)):
        for distance in (1, 2, 3):  # 1 to 4 % of 64
            shown = images["shift", f"{name} {distance}"][0]
            where = inner if resize == 64 else slice(None)  # beyond this it is mirrored
            expected = torch.arange(start, start + 64)[where]
            assert torch.equal(shown[0, 0, where], expected + distance * right)
            assert torch.equal(shown[1, where, 0], expected + distance * down)
    assert len(images) == 1 + 4 * 3 + 2
    for degrees, sign in (("-10", -1), ("+10", 1)):
        shown = images["rotation", degrees][0].float()
        middle = shown[:2, 31:33, 31:33].mean((1, 2))
        assert torch.allclose(middle, torch.tensor([start + 31.5, start + 31.5]), atol=1)
        slope = (shown[0, 51, 32] - shown[0, 11, 32]) / 40
        assert slope.item() == pytest.approx(-sign * np.sin(np.radians(10)), abs=0.03)


# ---------------------------------------------------------------------------------------------------------- corruptions


def test_errors_are_means_over_severities_and_then_over_corruptions() -> None:
    def of(*right: int) -> np.ndarray:
        return np.array(right, bool)

    answers = {
        ("clean", "", ""): of(1, 1, 1, 0),
        ("corruptions", "fog", "1"): of(1, 1, 0, 0),
        ("corruptions", "fog", "2"): of(0, 0, 0, 0),
        ("corruptions", "snow", "1"): of(1, 1, 1, 1),
        ("corruptions", "snow", "2"): of(1, 0, 1, 0),
    }
    found = figures(answers, SETTINGS)
    assert found["corruptions"]["fog"]["error"] == pytest.approx((0.5 + 1) / 2)
    assert found["corruptions"]["snow"]["error"] == pytest.approx((0 + 0.5) / 2)
    assert found["corruptions"]["fog"]["relative"] == pytest.approx(0.75 - 0.25)
    assert found["corruptions"]["fog"]["top1"]["1"]["top1"] == 0.5
    assert found["mce"]["error"] == pytest.approx(0.5) and found["mce"]["relative"] == pytest.approx(0.25)
    assert found["mce"]["error_low"] <= 0.5 <= found["mce"]["error_high"]
    assert found["attacks"] == found["consistency"] == {}
    assert "mce" not in figures({("clean", "", ""): of(1, 0)}, SETTINGS)


def test_a_corruption_is_right_where_the_model_sees_through_it(halves: Samples) -> None:
    """Noise and JPEG leave means as they are; less contrast brings them to one side of a threshold."""
    wanted = FEW.model_copy(update={"corruptions": ["gaussian_noise", "jpeg_compression", "contrast", "brightness"]})
    found = figures_of(planted(left_half(), 134), halves, wanted)["corruptions"]
    assert found["gaussian_noise"]["error"] == found["jpeg_compression"]["error"] == 0
    assert found["contrast"]["error"] == 0.5, "the bright half falls below 134"
    assert found["brightness"]["error"] == 0.5, "the dark half rises above it"
    assert found["brightness"]["relative"] == 0.5


def test_examples_are_of_two_classes_in_all_corruptions(samples: Samples) -> None:
    wanted = Robustness(images=12, severities=4, epsilons=[])
    found = measure_robustness(
        untrained(), samples, wanted, image_size=SIZE, resize=RESIZE, settings=SETTINGS, compute=COMPUTE
    )
    assert len(found.examples) == 2 and found.examples[0].label != found.examples[1].label
    for each in found.examples:
        assert samples.label[samples.key.index(each.key)] == each.label
        assert list(each.corrupted) == list(CORRUPTIONS) and each.severity == 3
        for picture in (each.clean, *each.corrupted.values()):
            assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
        assert all((picture != each.clean).any() for picture in each.corrupted.values())


# -------------------------------------------------------------------------------------------------------------- attacks


def test_attacks_reach_as_far_as_epsilon_and_no_further(halves: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves are 10 off the threshold: within 8 nothing helps an attack, within 12 everything does."""
    shown: list[tuple[Adversarial, int]] = []

    def watched(model: nn.Module, images: Tensor, labels: Tensor, settings: Adversarial) -> Tensor:
        found = original(model, images, labels, settings)
        assert (found - images.float()).abs().max() <= settings.epsilon + 1e-3
        assert found.min() >= 0 and found.max() <= 255
        shown.append((settings, len(images)))
        return found

    original = robustness.attacked
    monkeypatch.setattr(robustness, "attacked", watched)
    found = figures_of(planted(left_half(), 128), halves, FEW.model_copy(update={"epsilons": [12.0, 8.0]}))
    for method in ("fgsm", "pgd"):
        assert list(found["attacks"][method]) == ["8", "12"]
        assert found["attacks"][method]["8"]["top1"] == 1
        assert found["attacks"][method]["12"]["top1"] == 0
    assert [(each.method, each.epsilon, count) for each, count in shown] == [
        ("fgsm", 8, 12), ("pgd", 8, 12), ("fgsm", 12, 12),
    ], "what FGSM has fooled, PGD need not attack"  # fmt: skip
    assert shown[1][0].steps == 3


def test_pgd_fools_no_fewer_than_fgsm_and_more_with_a_larger_epsilon(samples: Samples) -> None:
    wanted = Robustness(images=60, corruptions=[], epsilons=[0.5, 2.0, 8.0], pgd_steps=5)
    found = figures_of(untrained(), samples, wanted)
    pgd = [each["top1"] for each in found["attacks"]["pgd"].values()]
    assert list(found["attacks"]["pgd"]) == ["0.5", "2", "8"]
    assert found["clean"]["top1"] >= pgd[0] >= pgd[1] >= pgd[2] and pgd[2] < found["clean"]["top1"]
    assert all(pgd[i] <= each["top1"] for i, each in enumerate(found["attacks"]["fgsm"].values()))
    # PGD inherits what FGSM has fooled, so that much is true of any PGD; this is its own doing.
    assert any(pgd[i] < each["top1"] for i, each in enumerate(found["attacks"]["fgsm"].values()))


# --------------------------------------------------------------------------------------------------------------- errors


def test_no_images_and_a_broken_model_are_said(samples: Samples) -> None:
    with pytest.raises(StageError, match="no labelled image to measure robustness on"):
        figures_of(untrained(), samples.at([]), FEW)
    broken = untrained()
    with torch.no_grad():
        broken.head.bias.fill_(torch.nan)
    with pytest.raises(StageError, match="gives what is not a number"):
        figures_of(broken, samples, FEW)


def test_params_have_defaults_and_name_what_is_wrong() -> None:
    assert check("evaluate", {}, Evaluate).robustness == Robustness()
    assert check("evaluate", {"robustness": None}, Evaluate).robustness is None
    found = check(
        "evaluate", {"robustness": {"corruptions": "all", "epsilons": [2], "images": 5000}}, Evaluate
    ).robustness
    assert found and found.corruptions == list(evaluate.CORRUPTIONS) and found.epsilons == [2]
    wrong = {
        "`evaluate.robustness.corruptions`: no corruption is called frost (known: all, gaussian_noise, ": {
            "corruptions": ["fog", "frost"]
        },
        "`evaluate.robustness.corruptions`: each may be there once only": {"corruptions": ["fog", "fog"]},
        "`evaluate.robustness.corruptions`: input should be a valid list, got 'fog'": {"corruptions": "fog"},
        "`evaluate.robustness.severities`: input should be less than or equal to 5, got 6": {"severities": 6},
        "`evaluate.robustness.epsilons.1`: input should be greater than 0, got 0": {"epsilons": [1, 0]},
        "unknown key `evaluate.robustness.epsilon`": {"epsilon": 1},
    }
    for message, values in wrong.items():
        with pytest.raises(ParamsError) as error:
            check("evaluate", {"robustness": values}, Evaluate)
        assert message in str(error.value)
