"""The loop: epochs of steps, validation after each, and the curve.

A step depends on the state before it and on (seed, epoch, step, process) alone: order, crops, dropout and mixing are
drawn anew from those. So a checkpoint holds no random state and no reader's, and training goes on from any step as if
nothing had happened.
"""

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stages.params.training.recipe import LOWER_IS_BETTER, Recipe
from stages.runtime.command import StageError
from stages.runtime.progress import progress
from stages.training.loop.checkpoints.saving import Checkpointer, resume
from stages.training.loop.objectives import Metrics, Objective
from stages.training.loop.processes import StopSignals, is_first, rank, share_buffers, summed, world_size
from stages.training.loop.progressive_resizing import size_in
from stages.training.loop.state import Setup, State, initial_state
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier, take_weights
from stages.training.networks.regularisation import training_mode

logger = logging.getLogger(__name__)
CHECK_LOSS_EVERY = 50
"""Steps on a GPU: reading a loss back makes it wait."""
COMPILED_SHAPES = 256
"""At most: batches of two sizes, crops of some ten, in training, under attack and on val."""
EpochEnd = Callable[[Metrics, int], None]


def fit(setup: Setup, work: Path, on_epoch: EpochEnd) -> list[Metrics]:
    """Trains `setup.model` in place, leaves it in evaluation mode, and returns its curve, a dict an epoch.

    Args:
        work: folder for the checkpoint, from which a later call resumes, and progress.jsonl, the curve so far.
        on_epoch: called in process 0 after each epoch, with its metrics and its number (from 1).

    Raises:
        StageError: too few images, early stopping on a metric that is not measured, a loss that is not finite, or
            memory is full.
        SystemExit: SIGTERM or SIGINT came; a checkpoint was written.
    """
    model, recipe = setup.model, setup.recipe
    _check(setup)
    setup.compute.place(model)
    state = initial_state(setup)
    resume(state, work, setup.name)
    forward = _parallel(model, setup.compute)
    with StopSignals() as signals, _explained(setup.name):
        checkpointer = Checkpointer(state, work, signals, setup.name)
        while not _finished(state.curve, recipe):
            _epoch(setup, state, forward, checkpointer, on_epoch)
        checkpointer.stop_if_asked()  # a signal that came while the last epoch was written down
    final = state.best if state.best is not None else state.eval_model.net.state_dict()
    take_weights(model.net, final)
    model.eval()
    return state.curve


def _check(setup: Setup) -> None:
    name, feed, recipe = setup.name, setup.feed, setup.recipe
    if not feed.images:
        raise StageError(f"{name}: there is no training image that it could learn from")
    if recipe.batch_size > feed.images:
        raise StageError(
            f"{name}: `batch_size` is {recipe.batch_size}, but there are only {feed.images} training images; lower it"
        )
    smallest = feed.images // setup.steps_per_epoch
    if smallest // world_size() // recipe.accumulate < 2:
        raise StageError(
            f"{name}: {world_size()} processes and `accumulate: {recipe.accumulate}` leave parts of fewer than 2 of "
            f"the {smallest} images of a batch; raise `batch_size` or lower `accumulate`"
        )
    if recipe.start_size and recipe.start_size > (recipe.end_size or setup.image_size):
        raise StageError(
            f"{name}: `start_size` is {recipe.start_size}, more than `model.image_size` ({setup.image_size}), which it "
            "is to grow to; lower it"
        )
    objective = setup.objective
    measured = ["train_loss", *(["train_top1"] if objective.has_labels else []), *objective.metric_names]
    if recipe.patience and recipe.monitor not in measured:
        raise StageError(
            f"{name}: `patience` watches `{recipe.monitor}`, which is not measured here (only {', '.join(measured)}); "
            "set `patience` to null, choose another `monitor`, or raise `split.val_fraction` if val has no images"
        )


def _parallel(model: Classifier, compute: Compute) -> nn.Module:
    """The model as steps call it: compiled, its gradients averaged over all processes."""
    forward: nn.Module = model
    if world_size() > 1:
        # Else DDP would sort gradients anew after its first step, and add them up in another order than a process that
        # goes on from a checkpoint: of three numbers and more the sum is not the same to the last bit.
        forward = DistributedDataParallel(
            model, device_ids=[torch.cuda.current_device()] if compute.on_gpu else None, find_unused_parameters=True
        )
    if compute.compile:
        # One kernel a shape, whichever of an epoch's two batch sizes comes first after a checkpoint. Beyond the limit,
        # which is 8 by default, the rest would silently not be compiled, and other shapes after a checkpoint.
        torch._dynamo.config.recompile_limit = COMPILED_SHAPES
        forward.compile(dynamic=False)
    return forward


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Errors that other parameters would avoid, as a `StageError` that names them."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StageError(
            f"{name}: the GPU's memory is full; lower `batch_size`, or raise `accumulate`, which computes each batch "
            f"in parts: {str(error).splitlines()[0]}"
        ) from error
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise StageError(
            f"{name}: this network has an operation that a GPU computes in one way today and in another tomorrow; set "
            f"`training.deterministic` to false, or choose another architecture: {str(error).split('. ')[0]}"
        ) from error


# --------------------------------------------------------------------------------------------- an epoch and its steps


def _epoch(setup: Setup, state: State, forward: nn.Module, checkpointer: Checkpointer, on_epoch: EpochEnd) -> None:
    """What is left of the current epoch, and the validation after it."""
    began, done_before = time.monotonic(), state.step
    feed, recipe, steps = setup.feed, setup.recipe, setup.steps_per_epoch
    if state.step < steps:
        _train(setup, state, forward, checkpointer)
    rate = (steps - done_before) * feed.images / steps / (time.monotonic() - began)
    share_buffers(state.eval_model)
    state.eval_model.eval()
    metrics: Metrics = {"epoch": state.epoch, "lr": float(state.schedule.get_last_lr()[-1])}
    metrics["train_loss"] = state.loss / feed.images
    if state.objective.has_labels:
        metrics["train_top1"] = state.correct / feed.images
    with checkpointer.saving_when_stopped():
        metrics |= state.objective.measure(state.eval_model)
    _check_metrics(metrics, setup.name)
    _end_epoch(state, metrics, recipe)
    checkpointer.write_progress()
    if _finished(state.curve, recipe):
        checkpointer.save()
    if is_first():
        memory = _peak_memory(setup.compute)
        more = {"images_per_second": rate, "seconds": time.monotonic() - began, "peak_memory_mb": memory}
        on_epoch(metrics | more, len(state.curve))
        which = f"{setup.name}: epoch {len(state.curve)} of {recipe.epochs}"
        logger.info("%s, %s, %.0f images/s", which, _describe(metrics), rate)


def _end_epoch(state: State, metrics: Metrics, recipe: Recipe) -> None:
    before = [earlier[recipe.monitor] for earlier in state.curve if recipe.monitor in earlier]
    state.curve.append(metrics)
    if recipe.patience and not any(recipe.better(value, metrics[recipe.monitor]) for value in before):
        state.best = {key: value.clone() for key, value in state.eval_model.net.state_dict().items()}
    state.epoch, state.step, state.loss, state.correct = state.epoch + 1, 0, 0.0, 0.0


def _train(setup: Setup, state: State, forward: nn.Module, checkpointer: Checkpointer) -> None:
    """The steps that are left of the epoch."""
    training_mode(state.model)
    size = size_in(state.epoch, setup.recipe, setup.image_size)
    # Sums stay on the device: reading one back each step would make a GPU wait.
    sums = torch.tensor([state.loss, state.correct], dtype=torch.float64, device=setup.compute.device)
    check_every = CHECK_LOSS_EVERY if setup.compute.on_gpu else 1
    losses: list[tuple[int, float, Tensor]] = []  # of steps not checked yet
    batches = setup.feed.batches(state.epoch, state.step, size)
    for images, labels in progress(batches, setup.steps_per_epoch - state.step, f"{setup.name}, epoch {state.epoch}"):
        _seed(setup.recipe.seed, state.epoch, state.step)
        rate = float(state.schedule.get_last_lr()[-1])
        step_sums = _step(setup, state, forward, images, labels)
        sums += summed(step_sums)
        losses.append((state.step + 1, rate, step_sums[0]))
        if len(losses) >= check_every:
            _check_losses(state, losses, checkpointer)
        state.step += 1
        if checkpointer.due():
            _check_losses(state, losses, checkpointer)
            _check_weights(state, rate, checkpointer)
            state.loss, state.correct = sums.tolist()
            checkpointer.save()
            checkpointer.stop_if_asked()
    _check_losses(state, losses, checkpointer)
    _check_weights(state, rate, checkpointer)
    state.loss, state.correct = sums.tolist()


def _step(setup: Setup, state: State, forward: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """One step of the optimiser.

    Returns:
        the sum of losses and the number of correct answers over this process's images, (2,) float64.
    """
    recipe = setup.recipe
    batch_size = _batch_size(setup, state.step)
    state.optimiser.zero_grad(set_to_none=True)
    sums = torch.zeros(2, dtype=torch.float64, device=images.device)
    parts = np.array_split(np.arange(len(labels)), recipe.accumulate)
    pixels = images.unflatten(0, (setup.feed.views, len(labels)))
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        # Only the last part's backward pass averages gradients over the processes.
        hold = forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext()
        with hold:
            of_part = pixels[:, part[0] : part[-1] + 1].flatten(0, 1)
            loss, correct = state.objective.loss(forward, of_part, labels[part[0] : part[-1] + 1], state.steps_done)
            # DDP takes the mean over processes where the sum is meant.
            share = _images_in_loss(len(part), len(parts), batch_size, state.objective, images.device) / batch_size
            state.scaler.scale(loss * share * world_size()).backward()
        sums += torch.stack([loss.detach().double() * len(part), correct.double()])
    if recipe.clip_norm:
        state.scaler.unscale_(state.optimiser)
        trained = [parameter for group in state.optimiser.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    state.schedule.step()
    if state.ema:
        state.ema.update(state.model)
    return sums


def _batch_size(setup: Setup, step: int) -> int:
    """Images of this step's batch over all processes: batches are nearly equal, the first ones one larger."""
    images, steps = setup.feed.images, setup.steps_per_epoch
    return images // steps + (step < images % steps)


def _images_in_loss(part: int, parts: int, batch_size: int, objective: Objective, device: torch.device) -> int:
    """Images in the loss of one part of a batch: this process's, or those of all where the loss is global."""
    if not objective.global_loss:
        return part
    return batch_size if parts == 1 else int(summed(torch.tensor(part, device=device)))


def _seed(seed: int, epoch: int, step: int) -> None:
    """Seeds everything that torch draws in this step: dropout, mixing, starts of attacks."""
    (drawn,) = np.random.SeedSequence([seed, epoch, step, rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(drawn))


# ---------------------------------------------------------------------------------------------------- what is checked


def _check_weights(state: State, rate: float, checkpointer: Checkpointer) -> None:
    """Stops before weights are saved that a step has broken although its own loss was finite."""
    values = [value for value in state.model.net.state_dict().values() if value.is_floating_point()]
    if not torch.stack([value.isfinite().all() for value in values]).all():
        raise StageError(
            f"{checkpointer.name}: weights are not finite after step {state.step} of epoch {state.epoch}, at a "
            f"learning rate of {rate:g}, and no loss would be; lower `lr`, lengthen `warmup`, or set `clip_norm`. "
            f"{checkpointer.last_good()}"
        )


def _check_losses(state: State, waiting: list[tuple[int, float, Tensor]], checkpointer: Checkpointer) -> None:
    """Stops where a loss among (step, learning rate, loss) is not finite; else empties the list."""
    values = torch.stack([loss for _, _, loss in waiting]).tolist() if waiting else []
    for (step, rate, _), value in zip(waiting, values, strict=True):
        if not math.isfinite(value):
            raise StageError(
                f"{checkpointer.name}: the loss is {value} at step {step} of epoch {state.epoch}, at a learning rate "
                f"of {rate:g}; lower `lr`, lengthen `warmup`, or set `clip_norm`. {checkpointer.last_good()}"
            )
    waiting.clear()


def _finished(curve: list[Metrics], recipe: Recipe) -> bool:
    if len(curve) >= recipe.epochs:
        return True
    if not recipe.patience or not curve:
        return False
    values = [metrics[recipe.monitor] for metrics in curve]
    best = min(values) if recipe.monitor in LOWER_IS_BETTER else max(values)
    return values[::-1].index(best) >= recipe.patience


def _check_metrics(metrics: Metrics, name: str) -> None:
    for key, value in metrics.items():
        if not math.isfinite(value):
            raise StageError(f"{name}: {key} is {value} after epoch {metrics['epoch']:.0f}; lower `lr`")


def _peak_memory(compute: Compute) -> float:
    """In units of 1,000,000 bytes: of the GPU, or of this process."""
    if compute.on_gpu:
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _describe(metrics: Metrics) -> str:
    words = {"train_loss": "loss", "val_loss": "val loss", "val_top1": "val top-1", "val_robust_top1": "robust top-1"}
    words["knn_top1"] = "k-NN top-1"
    return ", ".join(f"{word} {metrics[key]:.3f}" for key, word in words.items() if key in metrics)
