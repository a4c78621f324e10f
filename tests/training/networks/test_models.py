"""Models: every architecture with a new head, small stems, auxiliary heads, files, weights to start from."""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.ops import StochasticDepth

from stages.params.finetune import Finetune, Lora
from stages.runtime.command import StageError
from stages.training.finetuning.strategies import STRATEGIES, merge
from stages.training.loop.optimisation import optimiser
from stages.training.methods.published_weights import normalisation, start_from
from stages.training.networks.layer_groups import blocks, trainable
from stages.training.networks.models import (
    Classifier,
    build,
    check_takes,
    copy_backbone,
    fresh_head,
    load_classifier,
    replace_head,
    save_classifier,
)
from stages.training.networks.regularisation import regularise, training_mode
from tests.training.images import CONFIG

SIZES = {
    "alexnet": 64, "vgg16_bn": 32, "googlenet": 64, "inception_v3": 80, "resnet18": 32, "resnet50": 32,
    "resnext50_32x4d": 32, "densenet121": 32, "mobilenet_v3_small": 32, "efficientnet_b0": 32, "convnext_tiny": 32,
    "vit_b_16": 32, "swin_t": 32,
}  # fmt: skip
"""Small, but large enough for each."""


def made(architecture: str, seed: int = 1, **config: Any) -> Classifier:
    """A network for two classes, unless said otherwise."""
    return build(CONFIG | {"architecture": architecture, "image_size": SIZES.get(architecture, 32)} | config, seed)


def images(architecture: str, count: int = 2) -> torch.Tensor:
    """Noise of the size that it takes."""
    size = SIZES.get(architecture, 32)
    return torch.randint(0, 255, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def same_weights(first: Classifier, second: Classifier) -> bool:
    """To the last bit."""
    one, two = first.net.state_dict(), second.net.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("architecture", list(SIZES))
def test_every_architecture_gets_a_head_a_backbone_blocks_and_strategies(architecture: str) -> None:
    source = made(architecture, classes=list("abcdef"))
    target = made(architecture, seed=2)
    check_takes(target, SIZES[architecture])
    before = target.head.weight.clone()
    copy_backbone(source, target)
    assert torch.equal(target.head.weight, before) and target.head.out_features == 2
    with torch.no_grad():
        seen = [model.eval().features(images(architecture)) for model in (source, target)]
        assert torch.equal(*seen) and seen[0].shape == (2, target.head.in_features)
        assert target(images(architecture)).shape == (2, 2)

    in_order = [id(weights) for block in blocks(target) for weights in block]
    of_head = {id(weights) for weights in target.head.parameters()}
    assert len(in_order) == len(set(in_order))
    assert {*in_order, *of_head} == {id(weights) for weights in target.parameters()}
    assert len(blocks(target)) >= 6

    groups = STRATEGIES["last_block"](target, Finetune())
    trained = {id(weights) for parameters, _ in groups for weights in parameters}
    assert trained == {id(weights) for weights in target.parameters() if weights.requires_grad}
    assert 0 < len(trained) < len(in_order)


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v3_small", "vit_b_16", "swin_t"])
def test_low_rank_updates_change_nothing_at_first_and_merge_into_plain_weights(architecture: str) -> None:
    model = made(architecture).eval()
    names = sorted(model.net.state_dict())
    with torch.no_grad():
        plain = model.features(images(architecture))
    groups = STRATEGIES["lora"](model, Finetune(lora=Lora(rank=2)))
    with torch.no_grad():
        assert torch.equal(model.features(images(architecture)), plain)
        for weights in groups[0][0]:
            weights.add_(0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)))
        changed = model.features(images(architecture))
    assert (changed - plain).norm() > 0.01 * plain.norm()
    count, share = trainable(model)
    assert count == sum(weights.numel() for parameters, _ in groups for weights in parameters)
    assert share < 0.1
    merge(model)
    assert sorted(model.net.state_dict()) == names
    with torch.no_grad():
        assert (model.features(images(architecture)) - changed).norm() < 1e-3 * changed.norm()


def test_a_rank_above_a_layer_s_is_refused() -> None:
    with pytest.raises(StageError, match=r"`finetune.lora.rank` is 100, but the rank of the layer conv1 .* 64 at most"):
        STRATEGIES["lora"](made("resnet18"), Finetune(lora=Lora(rank=100)))


def test_bias_trains_biases_norms_and_the_head_alone() -> None:
    model = made("resnet18")
    STRATEGIES["bias"](model, Finetune())
    trained = {name for name, weights in model.net.named_parameters() if weights.requires_grad}
    assert trained == {name for name, weights in model.net.named_parameters() if weights.ndim == 1} | {"fc.weight"}
    assert trainable(model)[1] < 0.01


def test_full_is_slower_in_earlier_blocks() -> None:
    model = made("resnet18")
    finetune = Finetune(lr=1.0, backbone_lr=0.5, layer_decay=0.5)
    *earlier, head = STRATEGIES["full"](model, finetune)
    assert head[1] == 1.0
    assert [lr for _, lr in earlier] == [0.5**power for power in range(9, 0, -1)]  # the stem and eight blocks
    assert [len(parameters) for parameters, _ in STRATEGIES["full"](model, Finetune())] == [60, 2]


@pytest.mark.parametrize(
    ("architecture", "stem", "side"),
    [
        ("resnet18", "standard", 8), ("resnet18", "half", 16), ("resnet18", "small", 32), ("densenet121", "small", 32),
        ("googlenet", "half", 16), ("mobilenet_v3_small", "small", 32), ("efficientnet_b0", "half", 16),
        ("convnext_tiny", "half", 16), ("swin_t", "half", 16),
    ],
)  # fmt: skip
def test_a_stem_keeps_so_much_of_the_resolution(architecture: str, stem: str, side: int) -> None:
    model = made(architecture, stem=stem, image_size=32).eval()
    sides: list[int] = []
    first_block = {
        "resnet18": "layer1", "densenet121": "features.denseblock1", "googlenet": "conv2",
        "efficientnet_b0": "features.1",
        "mobilenet_v3_small": "features.1", "convnext_tiny": "features.1", "swin_t": "features.1",
    }[architecture]  # fmt: skip

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sides.append(inputs[0].shape[2])  # of swin (n, H, W, C), of the others (n, C, H, W)

    model.net.get_submodule(first_block).register_forward_pre_hook(note)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 2)
    assert sides == [side]


@pytest.mark.parametrize(("architecture", "stem"), [("vit_b_16", "half"), ("vgg16_bn", "small"), ("swin_t", "small")])
def test_a_stem_that_an_architecture_cannot_have_is_refused(architecture: str, stem: str) -> None:
    with pytest.raises(StageError, match=rf"`model.stem`: {architecture} has no stem that could be {stem}"):
        made(architecture, stem=stem)


@pytest.mark.parametrize(("architecture", "size", "heads"), [("googlenet", 224, 2), ("inception_v3", 299, 1)])
def test_auxiliary_heads_are_for_training_alone(architecture: str, size: int, heads: int, tmp_path: Path) -> None:
    config = CONFIG | {"architecture": architecture, "image_size": size}
    model = build(config, seed=1, auxiliary_heads=True)
    check_takes(model, size)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with torch.no_grad():
        outputs = model.train()(pixels)
        assert isinstance(outputs, tuple) and [each.shape for each in outputs] == [(2, 2)] * (1 + heads)
        assert isinstance(model.eval()(pixels), torch.Tensor)
    assert model.auxiliary_weight > 0
    model.net.load_state_dict(before)
    save_classifier(model, config, tmp_path / "model")
    loaded, _ = load_classifier(tmp_path / "model")
    assert not [name for name in loaded.net.state_dict() if "aux" in name.lower()]
    copy_backbone(loaded, model)


def test_auxiliary_heads_that_an_image_is_too_small_for_are_refused() -> None:
    model = build(CONFIG | {"architecture": "inception_v3"}, seed=1, auxiliary_heads=True)
    with pytest.raises(StageError, match=r"`model.auxiliary_heads`: those of Inception3 take no image of 80 px"):
        check_takes(model, 80)


def test_a_network_without_a_linear_head_is_refused() -> None:
    with pytest.raises(StageError, match="squeezenet1_1 has no linear head"):
        made("squeezenet1_1")


def test_a_projector_takes_the_place_of_the_head_and_gives_it_back() -> None:
    model = made("resnet18")
    replace_head(model, nn.Sequential(nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 8)))
    assert model(images("resnet18")).shape == (2, 8)
    assert model.features(images("resnet18")).shape == (2, 512)
    fresh_head(model, 512, 2, bias=True, seed=1)
    assert list(model.net.state_dict()) == list(made("resnet18").net.state_dict())
    fresh_head(model, 512, 2, bias=False, seed=1)  # maxvit_t has none
    assert list(model.net.state_dict()) == list(made("resnet18").net.state_dict())[:-1]


def test_a_network_that_counts_its_versions_is_copied_and_loaded(tmp_path: Path) -> None:
    source, target = made("mnasnet0_5"), made("mnasnet0_5", seed=2)
    copy_backbone(source, target)
    save_classifier(target, CONFIG | {"architecture": "mnasnet0_5"}, tmp_path / "model")
    assert same_weights(load_classifier(tmp_path / "model")[0], target)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_auxiliary_heads_are_trained_once_by_every_strategy(strategy: str) -> None:
    model = build(CONFIG | {"architecture": "googlenet", "image_size": 224}, seed=1, auxiliary_heads=True)
    recipe = Finetune.model_validate({"strategy": strategy, "lora": Lora(rank=1)})
    groups = STRATEGIES[strategy](model, recipe)
    optimiser(groups, recipe)  # torch refuses a parameter of two groups
    assert {id(each) for each in model.net.get_submodule("aux1").parameters()} <= {id(each) for each in groups[-1][0]}


def test_bias_trains_attention_s_biases() -> None:
    model = made("vit_b_16")
    STRATEGIES["bias"](model, Finetune(strategy="bias"))
    left = [name for name, each in model.net.named_parameters() if name.endswith("bias") and not each.requires_grad]
    assert not left


@pytest.mark.parametrize("architecture", ["resnet18", "vit_b_16", "convnext_tiny"])
def test_dropout_and_stochastic_depth_act_where_weights_are_frozen(architecture: str) -> None:
    model = made(architecture)
    regularise(model, 0.0, 0.5)  # no dropout, so that what differs below is what was skipped
    STRATEGIES["lora"](model, Finetune(strategy="lora", lora=Lora(rank=1)))
    training_mode(model)
    assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout | StochasticDepth))
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        first = model.features(images(architecture, 4))
        assert not torch.equal(first, model.features(images(architecture, 4)))


def test_a_saved_model_loads_the_same_and_saves_the_same(tmp_path: Path) -> None:
    model = made("resnet18", stem="half")
    config = CONFIG | {"stem": "half"}
    for name in ("a", "b"):
        save_classifier(model, config, tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    loaded, config_loaded = load_classifier(tmp_path / "a")
    assert config_loaded == config and same_weights(model, loaded)
    with pytest.raises(StageError, match="holds no model"):
        load_classifier(tmp_path / "c")


@pytest.mark.parametrize(("architecture", "size"), [("vit_b_16", 40), ("inception_v3", 32), ("alexnet", 32)])
def test_a_size_that_the_architecture_cannot_take_is_known_before_training(architecture: str, size: int) -> None:
    with pytest.raises(StageError, match=f"`model.image_size`: .* takes no image of {size} px"):
        check_takes(made(architecture, image_size=size), size)
    with pytest.raises(StageError, match=r"`start_size`: VisionTransformer takes no image of 48 px"):
        check_takes(made("vit_b_16", image_size=64), 48, "`start_size`")


# ----------------------------------------------------------------------------------------------------- regularisation


@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_b0", "vit_b_16", "mobilenet_v3_small"])
def test_dropout_and_stochastic_depth_act_in_training_alone_and_change_no_name(architecture: str) -> None:
    plain, regularised = made(architecture), made(architecture)
    regularise(regularised, 0.5, 0.5)
    assert list(plain.net.state_dict()) == list(regularised.net.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(images(architecture)), regularised.eval()(images(architecture)))
        torch.manual_seed(1)
        first = regularised.train().features(images(architecture, 4))
        torch.manual_seed(2)
        assert not torch.equal(first, regularised.features(images(architecture, 4)))


@pytest.mark.parametrize(
    "architecture", ["resnet50", "swin_t", "regnet_y_400mf", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5"]
)
def test_stochastic_depth_skips_branches(architecture: str) -> None:
    model = made(architecture)
    regularise(model, 0.0, 0.5)
    features = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            features.append(model.train().features(images(architecture, 4)))
    assert torch.equal(features[0], features[1]) and not torch.equal(features[0], features[2])


def test_dropout_sets_the_layers_that_are_there() -> None:
    model = made("alexnet")
    regularise(model, 0.25, None)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.25}


def test_stochastic_depth_needs_residual_branches() -> None:
    with pytest.raises(StageError, match="`stochastic_depth`: AlexNet has no residual branches"):
        regularise(made("alexnet"), None, 0.1)


# ----------------------------------------------------------------------------------------------- weights to start from


@pytest.mark.parametrize("classes", [2, 5])
def test_a_safetensors_file_of_torchvision_s_names_is_started_from(classes: int, tmp_path: Path) -> None:
    net = torchvision.models.resnet18(num_classes=5)
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    model = made("resnet18", classes=list("abcde")[:classes])
    start_from(model, "resnet18", str(tmp_path / "mine.safetensors"))
    own = model.net.state_dict()
    same = {
        name
        for name, value in net.state_dict().items()
        if value.shape == own[name].shape and torch.equal(value, own[name])
    }
    assert same >= {name for name in own if not name.startswith("fc.")}
    assert ("fc.weight" in same) == (classes == 5)


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "resnet18", "densenet121", "mnasnet0_5"])
def test_published_weights_are_loaded_from_where_torchvision_keeps_them(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download itself cannot be tried here: what it leaves is made, with the old ones' oddities."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    known = torchvision.models.get_model_weights(architecture).DEFAULT
    torch.manual_seed(3)
    net = torchvision.models.get_model(architecture)
    published = net.state_dict()
    if architecture == "densenet121":
        for name in [name for name in published if "denselayer" in name]:
            published[re.sub("(norm|conv)([12])", r"\1.\2", name)] = published.pop(name)
    if architecture in ("densenet121", "resnet18"):
        published = OrderedDict((name, each) for name, each in published.items() if "num_batches" not in name)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(published, tmp_path / "hub/checkpoints" / Path(known.url).name)
    for weights in ("torchvision", "torchvision:IMAGENET1K_V1"):
        model = made(architecture)
        start_from(model, architecture, weights)
        own, expected = model.net.state_dict(), net.state_dict()
        same = [torch.equal(own[name], expected[name]) for name in own if not name.startswith(f"{model.head_name}.")]
        assert all(same) and len(same) > 10


def test_published_weights_bring_their_own_normalisation() -> None:
    assert normalisation("resnet18", "torchvision") == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert normalisation("googlenet", "torchvision") == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert normalisation("efficientnet_v2_l", "torchvision:IMAGENET1K_V1") == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert normalisation("resnet18", "mine.safetensors") is None


def test_position_embeddings_are_brought_to_the_size(tmp_path: Path) -> None:
    save_file(made("vit_b_16", image_size=64).net.state_dict(), tmp_path / "mine.safetensors")
    model = made("vit_b_16")
    start_from(model, "vit_b_16", str(tmp_path / "mine.safetensors"))
    of_file = load_file(tmp_path / "mine.safetensors")
    own = model.net.state_dict()
    assert torch.equal(own["conv_proj.weight"], of_file["conv_proj.weight"])
    assert own["encoder.pos_embedding"].shape == (1, 5, 768)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = made("resnet18")
    (tmp_path / "text.safetensors").write_text("no weights", encoding="utf-8")
    broken = {name: value.clone() for name, value in model.net.state_dict().items()}
    broken["bn1.weight"][0] = torch.nan
    save_file(broken, tmp_path / "broken.safetensors")
    save_file(made("resnet50").net.state_dict(), tmp_path / "other.safetensors")
    for weights, words in {
        "nowhere.safetensors": "there is no file nowhere.safetensors",
        str(tmp_path / "text.safetensors"): "is not a safetensors file",
        str(tmp_path / "broken.safetensors"): "bn1.weight holds what is not a number",
        str(tmp_path / "other.safetensors"): r"does not fit .*; and \d+ more",
        "torchvision:IMAGENET7": "torchvision has no IMAGENET7 of resnet18; there are: IMAGENET1K_V1",
    }.items():
        with pytest.raises(StageError, match=words):
            start_from(model, "resnet18", weights)
    with pytest.raises(StageError, match=r"does not fit `model.architecture`.*class_token is missing"):
        start_from(made("vit_b_16"), "vit_b_16", str(tmp_path / "other.safetensors"))
    with pytest.raises(StageError, match=r"`model.architecture`: torchvision has no 'resnet19'; near: resnet1"):
        normalisation("resnet19", "torchvision")


def test_where_published_weights_cannot_be_had_it_says_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(StageError, match=r"cannot be had .* put it into .*hub/checkpoints"):
        start_from(made("resnet18"), "resnet18", "torchvision")
