"""Exporting: a classifier as one file that runs without this project, and what that file is held to.

Whatever the runtime, it is asked alike: images (n, 3, S, S) uint8 in, logits (n, C) float32 out, both in the memory of
the CPU, so that latencies of a GPU include both ways.
"""

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export.passes import move_to_device_pass

from stages.evaluation.metrics import log_probabilities
from stages.runtime.command import StageError
from stages.training.networks.models import Classifier

Logits = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Ask = Callable[[Pixels], Logits]

INPUT, OUTPUT = "images", "logits"
"""Names of the graph's input and output."""
FACTS = "model.json"
"""Under this name the facts about a model are within its file too: ONNX metadata, an extra file of pt2."""
MOST_OF_ONNX = 2**31 - 2**20
"""Bytes of weights: a protobuf message may have 2 GiB, and the graph is in it as well."""
MOST_DIFFERENT = 1e-3
"""Of any probability, as when a version is examined: more than another order of summation changes, less than a wrong
layer or normalisation does. Measured with ResNet-18 on 400 photos: 5e-7. A changed first place within it is a tie to
three digits."""
WARM_UP = 3
TIMED = 40
"""Runs of which the median and the 95th percentile are taken."""
BATCH = 32


def write(model: Classifier, facts: Mapping[str, Any], form: str, path: Path) -> None:
    """Writes the model with a dynamic number of images. The same model gives the same bytes.

    Args:
        model: on the CPU, in evaluation mode.
        facts: what is kept within the file as `model.json`; `image_size` counts.
        form: `onnx` (torch.onnx.export through torch.export, weights inside) or `pt2` (torch.export.save).

    Raises:
        StageError: the exporter cannot translate the architecture, or it is too large for ONNX.
    """
    size = sum(value.nbytes for value in model.state_dict().values())
    if form == "onnx" and size > MOST_OF_ONNX:
        raise StageError(f"{size / 1e9:.1f} GB of weights do not fit into one ONNX file (2 GB); use --format pt2")
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is deprecated within the exporters themselves
            (_write_onnx if form == "onnx" else _write_pt2)(_exported_program(model, facts["image_size"]), text, path)
    except OSError:
        raise
    except Exception as error:  # of any kind: what there is in the world that an exporter cannot translate
        first = next(iter(str(error).strip().splitlines()), "")
        raise StageError(
            f"{facts['architecture']} cannot be exported as {form} by torch {torch.__version__}: "
            f"{type(error).__name__}: {first[:300]}"
        ) from error


def _exported_program(model: Classifier, side: int) -> torch.export.ExportedProgram:
    # Two images: torch.export takes a dimension of 0 or 1 for a constant.
    example = (torch.zeros(2, 3, side, side, dtype=torch.uint8),)
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes={INPUT: {0: torch.export.Dim("n", min=1)}})
    for node in program.graph.nodes:  # where on this machine its line of code lies is nobody's business
        node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: torch.export.ExportedProgram, text: str, path: Path) -> None:
    import onnx

    for name in ("onnxscript", "onnx_ir"):  # they tell of every pass over the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    made = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    assert made is not None  # it is only with a file to write to
    graph = made.model_proto
    for part in (*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        del part.metadata_props[:]  # how PyTorch called what it was translated from
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    del graph.graph.value_info[:]  # shapes in between, by another name of n; every runtime infers them
    onnx.helper.set_model_props(graph, {FACTS: text})
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def _write_pt2(program: torch.export.ExportedProgram, text: str, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={FACTS: text})


# ----------------------------------------------------------------------------------------------------------- asking


def asked(model: torch.nn.Module, device: str = "cpu") -> Ask:
    """What a model says that is on the device already; in float32."""

    def ask(images: Pixels) -> Logits:
        with torch.inference_mode():
            return model(torch.from_numpy(images).to(device)).cpu().numpy()

    return ask


def opened(path: Path, form: str, threads: int, device: str = "cpu") -> Ask | None:
    """The file in a runtime of its own: ONNX Runtime, or what torch.export.load makes of it.

    None where this ONNX Runtime cannot use the device.

    Args:
        threads: of ONNX Runtime on the CPU; PyTorch's are those of the process.
        device: `cpu` or `cuda`.
    """
    if form == "pt2":
        with path.open("rb") as file:
            program = torch.export.load(file)
        if device != "cpu":
            program = move_to_device_pass(program, device)
        return asked(program.module(), device)
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider:  # it goes back to the CPU and only logs that
        return None
    return lambda images: np.asarray(session.run([OUTPUT], {INPUT: images})[0])


# --------------------------------------------------------------------------------------------- what it is held to


@dataclass(frozen=True)
class Difference:
    """Between what two models say to the same images."""

    images: int
    logit: float
    """The largest of any image and class, absolute."""
    probability: float
    """The same of softmax(logits), 0-1."""
    changed: int
    """Images with another class in the first place."""


def compare(original: Ask, exported: Ask, batches: Iterable[Pixels]) -> Difference:
    """Asks both about the same pixels (n, 3, S, S). What is no number counts as infinitely far away."""
    images = changed = 0
    logit = probability = 0.0
    for pixels in batches:
        before, now = original(pixels).astype(np.float64), exported(pixels).astype(np.float64)
        images += len(pixels)
        changed += int((before.argmax(1) != now.argmax(1)).sum())
        logit = max(logit, _largest(before - now))
        probability = max(probability, _largest(np.exp(log_probabilities(before)) - np.exp(log_probabilities(now))))
    return Difference(images, logit, probability, changed)


def _largest(differences: npt.NDArray[np.float64]) -> float:
    largest = float(np.abs(differences).max(initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def check(difference: Difference, form: str) -> None:
    """Holds the exported model to `MOST_DIFFERENT`.

    Raises:
        StageError: it does not answer as the original does.
    """
    if not difference.probability <= MOST_DIFFERENT:
        raise StageError(
            f"the {form} file does not answer as the registered model does: on {difference.images:,} test images its "
            f"probabilities are up to {difference.probability:.3g} away (at most {MOST_DIFFERENT:g}), logits up to "
            f"{difference.logit:.3g}, and {difference.changed:,} answers change. Nothing was kept of it; try the "
            f"other format"
        )


def latency(ask: Ask, images: Pixels) -> dict[str, list[float]]:
    """Milliseconds of one image and of a batch: median and 95th percentile of `TIMED` runs each, after a warm-up.

    Args:
        images: (n, 3, S, S), of which the batch is made; one after the other, over and over where they are fewer.
    """
    batch = np.ascontiguousarray(np.resize(images, (BATCH, *images.shape[1:])))
    singles = [batch[i : i + 1] for i in range(BATCH)]
    return {"single_ms": _milliseconds(ask, singles), "batch_ms": _milliseconds(ask, [batch])}


def _milliseconds(ask: Ask, inputs: list[Pixels]) -> list[float]:
    taken = []
    for i in range(WARM_UP + TIMED):
        began = time.perf_counter()
        ask(inputs[i % len(inputs)])
        taken.append(1000 * (time.perf_counter() - began))
    median, p95 = np.percentile(taken[WARM_UP:], [50, 95])
    return [round(float(median), 3), round(float(p95), 3)]
