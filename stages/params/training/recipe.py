"""How a network is trained: the keys that `pretrain` and `finetune` share. Every default is off or harmless."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.runtime.params_file import Section

Positive = Annotated[float, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

LOWER_IS_BETTER = ("train_loss", "val_loss")
Monitor = Literal["train_loss", "train_top1", "val_loss", "val_top1", "val_robust_top1", "knn_top1"]


class Adversarial(Section):
    """Training on images changed so as to be mistaken (Madry et al. 2018; Wong, Rice & Kolter 2020)."""

    method: Literal["fgsm", "pgd"] = "fgsm"
    """`fgsm`: one step from a random start, guarded against catastrophic overfitting. `pgd`: `steps` of them."""
    epsilon: Annotated[float, Field(gt=0, le=255)] = 4.0
    """The most by which a pixel is changed, of 255."""
    step_size: Positive | None = None
    """Of 255. Null: 1.25 epsilon for fgsm, 2.5 epsilon / steps for pgd."""
    steps: Count = 7
    """Of pgd in training."""
    val_steps: Count = 10
    """Of the PGD that measures robust top-1 on val after each epoch."""
    val_images: Count = 500
    """How many images of val it is measured on, at most."""


class Recipe(Section):
    """One run of training, whatever it minimises."""

    epochs: Count = 10
    batch_size: Annotated[int, Field(ge=4)] = 64
    """Images a step, over all processes."""
    accumulate: Count = 1
    """In so many parts, one after the other, each batch is computed, to fit into memory. Batch norms see a part, and
    so do the losses of self-supervision, which compare images of a batch."""
    optimiser: Literal["sgd", "adamw", "muon"] = "sgd"
    """`sgd` with Nesterov momentum; `adamw`; `muon`: matrices and convolutions by Muon, the rest by SGD."""
    lr: Positive = 0.1
    """The peak of the schedule."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD and Muon; AdamW's first beta."""
    muon_scale: Positive = 1.0
    """Muon's matrices learn at so many times the rate of the norms and biases beside them: in fine-tuning
    `backbone_lr`, else `lr`. The head is never Muon's."""
    weight_decay: AtLeastZero = 5e-4
    """Never of norms and biases."""
    schedule: Literal["cosine", "one_cycle", "steps"] = "cosine"
    """After the warm-up a half cosine to 0; `one_cycle`: momentum falls by 0.1 and rises again meanwhile (Smith 2018);
    `steps`: a tenth after each of `milestones`."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of all steps in which the learning rate rises."""
    milestones: list[Count] = Field(default_factory=list)
    """Epochs after which `steps` divides the learning rate by ten."""
    label_smoothing: Probability = 0.1
    mixup: AtLeastZero = 0.0
    """Alpha of the Beta that two images are mixed by (Zhang et al. 2018); 0: off. With `cutmix`, one of the two a
    batch."""
    cutmix: AtLeastZero = 0.0
    """Alpha of the Beta that decides how large a window of another image is (Yun et al. 2019); 0: off."""
    min_crop_area: Annotated[float, Field(gt=0, le=1)] = 0.35
    """RandomResizedCrop takes from this share of the image up to the whole."""
    flip: bool = True
    """Left and right change places in every other image."""
    augment: Literal["none", "trivial", "rand"] = "none"
    """`trivial`: TrivialAugment Wide (Müller & Hutter 2021); `rand`: RandAugment (Cubuk et al. 2020); both DALI's."""
    rand_operations: Annotated[int, Field(ge=1, le=8)] = 2
    """Of RandAugment, one after the other."""
    rand_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Of RandAugment's operations, of 30."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """By up to so many degrees to either side."""
    erasing: Share = 0.0
    """Share of images of which a window is erased (Zhong et al. 2020)."""
    ema: Probability = 0.0
    """Decay a step of the moving average of weights that is validated and kept; 0: the weights themselves are."""
    dropout: Probability | None = None
    """Of every dropout layer, or before the head where there is none. Null: as the architecture has it."""
    stochastic_depth: Probability | None = None
    """How often the last residual branch is skipped, and earlier ones in proportion (Huang et al. 2016). Null: as the
    architecture has it."""
    clip_norm: Positive | None = None
    """The most that the norm of all gradients may be."""
    start_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Progressive resizing: the size in pixels of the first epochs' crops, growing evenly up to `end_size`, in
    multiples of 8."""
    full_size_from: Share = 0.6
    """From this share of the epochs on, progressive resizing is at its end."""
    end_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    """The size in pixels of the last epochs' crops. A little below `model.image_size` things look as large in training
    as they do in evaluation (Touvron et al. 2019). Null: `model.image_size`."""
    monitor: Monitor = "val_loss"
    """What `patience` watches."""
    patience: Count | None = None
    """Early stopping after so many epochs without a better `monitor`, with the weights of the best one. Null: all
    epochs, and the weights of the last."""
    adversarial: Adversarial | None = None
    """Null: images as they are."""
    seed: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError("`schedule: steps` and `milestones` go together")
        if list(self.milestones) != sorted(set(self.milestones)) or any(
            each >= self.epochs for each in self.milestones
        ):
            raise ValueError(f"`milestones` must rise and lie below `epochs` ({self.epochs})")
        if self.batch_size < 2 * self.accumulate:
            raise ValueError(
                f"`batch_size` ({self.batch_size}) has fewer than 2 images for each of {self.accumulate} parts"
            )
        if self.start_size and self.end_size and self.start_size > self.end_size:
            raise ValueError(f"`start_size` ({self.start_size}) is more than `end_size` ({self.end_size})")
        if self.adversarial and (self.mixup or self.cutmix):
            raise ValueError("`adversarial` needs the label of each image: `mixup` and `cutmix` must be off")
        if self.monitor == "val_robust_top1" and not self.adversarial:
            raise ValueError("`monitor: val_robust_top1` needs `adversarial`")
        return self

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is a better value of `monitor` than `other`."""
        return one < other if self.monitor in LOWER_IS_BETTER else one > other
