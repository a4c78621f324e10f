"""Which images a reviewer sees, and what is said to speak for an answer."""

import numpy as np
import pytest
import torch

from stages.evaluation.evaluators.cam import _attributed, last_map, overlaid
from stages.evaluation.evaluators.gallery_choice import Chosen, choose
from stages.evaluation.metrics import image_scores
from stages.training.networks.models import build


def config(architecture: str, size: int) -> dict[str, object]:
    return {
        "architecture": architecture, "classes": ["a", "b"], "image_size": size, "mean": [0.5] * 3, "std": [0.25] * 3,
    }  # fmt: skip


def made_up(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, n)
    logits = rng.normal(size=(n, 10)).astype(np.float32)
    logits[np.arange(n), labels] += 1.5
    return logits, labels


def chosen_from(logits: np.ndarray, labels: np.ndarray, most: int) -> Chosen:
    return choose(image_scores(logits, labels), labels, most)


def test_the_surest_mistakes_and_the_least_sure_hits() -> None:
    logits, labels = made_up(400)
    chosen = chosen_from(logits, labels, 200)
    sure = torch.from_numpy(logits).softmax(1).amax(1).numpy()
    right = logits.argmax(1) == labels
    assert len(chosen.mistakes) == 24 and len(chosen.correct) == 12 and len(chosen.by_class) == 10
    assert not right[chosen.mistakes].any() and right[chosen.correct].all()
    assert sure[chosen.mistakes].min() >= np.sort(sure[~right])[-24] - 1e-6
    assert sure[chosen.correct].max() <= np.sort(sure[right])[11] + 1e-6
    recall = [right[labels == label].mean() for label in chosen.by_class]
    assert recall == sorted(recall)
    for label, some in chosen.by_class.items():
        assert (labels[some] == label).all() and len(some) == 4


@pytest.mark.parametrize("most", [0, 5, 30, 37, 60])
def test_never_more_than_asked_for(most: int) -> None:
    assert len(chosen_from(*made_up(400), most).all) <= most


def test_everything_right_or_wrong() -> None:
    logits, _ = made_up(50)
    everything_right = chosen_from(logits, logits.argmax(1), 100)
    assert everything_right.mistakes.size == 0 and len(everything_right.correct) == 12
    assert chosen_from(logits, (logits.argmax(1) + 1) % 10, 100).correct.size == 0


@pytest.mark.parametrize(
    ("architecture", "size", "side"),
    [("resnet18", 224, 7), ("resnet18", 64, 4), ("resnet18", 32, 4), ("vgg11_bn", 128, 4), ("swin_t", 224, 7)],
)
def test_the_map_is_the_last_one_that_shows_something(architecture: str, size: int, side: int) -> None:
    model = build(config(architecture, size), 1).eval()
    layer = last_map(model, torch.zeros(1, 3, size, size))
    assert layer is not None
    seen = []
    layer.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    model(torch.zeros(1, 3, size, size))
    assert tuple(seen[0][2:]) == (side, side)


def test_what_ends_in_tokens_has_no_map_but_a_gradient() -> None:
    model = build(config("vit_b_16", 32), 1).eval()
    assert last_map(model, torch.zeros(1, 3, 32, 32)) is None
    torch.nn.init.normal_(model.head.weight)  # torchvision begins with zeros, which nothing speaks for
    heat = _attributed(model, None, torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1]))
    assert heat.shape == (2, 32, 32) and heat.amax() == 1


def test_heat_is_where_the_class_is() -> None:
    """A network that answers by the redness of what it sees, shown a red square."""
    model = build(config("resnet18", 64), 1).eval()
    convolution, head = torch.nn.Conv2d(3, 2, 8, stride=8), torch.nn.Linear(2, 2)
    net = torch.nn.Sequential(
        torch.nn.Sequential(convolution, torch.nn.ReLU()), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head
    )
    with torch.no_grad():
        convolution.weight.zero_()
        assert convolution.bias is not None
        convolution.bias.zero_()
        convolution.weight[0, 0] = 1.0
        head.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    model.net, model.head_name = net, "3"
    image = torch.full((1, 3, 64, 64), 60, dtype=torch.uint8)
    image[0, 0, 8:24, 40:56] = 250
    heat = _attributed(model, last_map(model, image), image, torch.tensor([0]))[0]
    where = heat.flatten().argmax().item()
    assert 8 <= where // 64 < 24 and 40 <= where % 64 < 56
    assert heat[40:].mean() < 0.1 * heat[8:24, 40:56].mean()


def test_without_heat_the_picture_is_grey_and_with_it_coloured() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    grey = overlaid(pixels, np.zeros((8, 8), np.float32))
    assert (grey == grey[..., :1]).all()
    hot = overlaid(pixels, np.ones((8, 8), np.float32)).astype(int)
    assert (hot[..., 0] > hot[..., 2]).mean() > 0.9
