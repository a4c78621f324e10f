"""How a network is trained: keys that `pretrain` and `finetune` share. Every default is off or harmless."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.runtime.params_file import AtLeastZero, Count, Fraction, Positive, Section, Seed, Share

LOWER_IS_BETTER = ("train_loss", "val_loss")
Monitor = Literal["train_loss", "train_top1", "val_loss", "val_top1", "val_robust_top1", "knn_top1"]


class Adversarial(Section):
    """Training on attacked images (Madry et al. 2018; Wong, Rice & Kolter 2020)."""

    method: Literal["fgsm", "pgd"] = "fgsm"
    """`fgsm`: one step from a random start, guarded against catastrophic overfitting. `pgd`: `steps` steps."""
    epsilon: Annotated[float, Field(gt=0, le=255)] = 4.0
    """Maximum change of a pixel, of 255."""
    step_size: Positive | None = None
    """Of 255. Null: 1.25 epsilon for fgsm, 2.5 epsilon / steps for pgd."""
    steps: Count = 7
    """Steps of `pgd` in training."""
    val_steps: Count = 10
    """Steps of the PGD attack that measures robust top-1 on val after each epoch."""
    val_images: Count = 500
    """Maximum number of val images that it is measured on."""


class Recipe(Section):
    """One training run, for any objective."""

    epochs: Count = 10
    batch_size: Annotated[int, Field(ge=4)] = 64
    """Images per step, over all processes."""
    accumulate: Count = 1
    """Gradient accumulation: each batch is split into this many parts, to fit into memory. Batch norm sees one part,
    and so do the losses of self-supervision, which compare the images of a batch."""
    optimiser: Literal["sgd", "adamw", "muon"] = "sgd"
    """`sgd`: with Nesterov momentum; `adamw`; `muon`: Muon for matrices and convolutions, SGD for the rest."""
    lr: Positive = 0.1
    """The peak of the schedule."""
    momentum: Fraction = 0.9
    """Momentum of SGD and Muon; the first beta of AdamW."""
    muon_scale: Positive = 1.0
    """Learning rate of Muon's matrices, as a multiple of the rate of norms and biases (`backbone_lr` in fine-tuning,
    else `lr`). Muon never trains the head."""
    weight_decay: AtLeastZero = 5e-4
    """Not applied to norms and biases."""
    schedule: Literal["cosine", "one_cycle", "steps"] = "cosine"
    """`cosine`: a half cosine to 0 after the warm-up. `one_cycle`: the same, while momentum falls by 0.1 and rises
    again (Smith 2018). `steps`: divided by ten after each of `milestones`."""
    warmup: Fraction = 0.2
    """Share of all steps during which the learning rate rises."""
    milestones: list[Count] = Field(default_factory=list)
    """Epochs after which `steps` divides the learning rate by ten."""
    label_smoothing: Fraction = 0.1
    mixup: AtLeastZero = 0.0
    """Alpha of the Beta distribution by which two images are mixed (Zhang et al. 2018); 0: off. If `cutmix` is on too,
    each batch gets one of the two."""
    cutmix: AtLeastZero = 0.0
    """Alpha of the Beta distribution for the size of the pasted window (Yun et al. 2019); 0: off."""
    min_crop_area: Annotated[float, Field(gt=0, le=1)] = 0.35
    """RandomResizedCrop: the smallest crop, as a share of the image's area."""
    flip: bool = True
    """Horizontal flip of every other image."""
    augment: Literal["none", "trivial", "rand"] = "none"
    """`trivial`: TrivialAugment Wide (Müller & Hutter 2021); `rand`: RandAugment (Cubuk et al. 2020); both by DALI."""
    rand_operations: Annotated[int, Field(ge=1, le=8)] = 2
    """RandAugment: number of operations, one after the other."""
    rand_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """RandAugment: strength of its operations, of 30."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Maximum rotation in degrees, either direction."""
    erasing: Share = 0.0
    """Share of images that get a window erased (Zhong et al. 2020)."""
    ema: Fraction = 0.0
    """Decay per step of the moving average of weights (EMA), which is validated and saved; 0: no average."""
    dropout: Fraction | None = None
    """Rate of every dropout layer, or before the head if there is none. Null: the architecture's own."""
    stochastic_depth: Fraction | None = None
    """Probability that the last residual branch is skipped; earlier ones less, in proportion (Huang et al. 2016). Null:
    the architecture's own."""
    clip_norm: Positive | None = None
    """Maximum norm of all gradients together."""
    start_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Progressive resizing: crop size in pixels of the first epochs; grows evenly to `end_size`, in multiples of 8."""
    full_size_from: Share = 0.6
    """Progressive resizing reaches `end_size` after this share of the epochs."""
    end_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Crop size in pixels of the last epochs. If it is a little below `model.image_size`, objects look as large in
    training as in evaluation (Touvron et al. 2019). Null: `model.image_size`."""
    monitor: Monitor = "val_loss"
    """The metric that `patience` watches."""
    patience: Count | None = None
    """Early stopping: ends after this many epochs without a better `monitor`, and saves the weights of the best epoch.
    Null: trains all epochs, and saves the weights of the last."""
    adversarial: Adversarial | None = None
    """Null: no adversarial training."""
    seed: Seed = 1

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
