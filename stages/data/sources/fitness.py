"""Whether what was read of a source is fit for a batch: nothing is written of one that is not."""

from stages.data.sources.account import NO_GROUP, Seen, account, as_text
from stages.data.sources.dispatch import Source
from stages.data.sources.layouts import some
from stages.data.sources.subset import check_classes
from stages.runtime.command import StageError


def check_fitness(source: Source, seen: Seen, role: str = "", is_first: bool = True) -> None:
    """Checks what all parts held.

    Args:
        source: as it was listed.
        seen: of all its parts.
        role: of the batch; empty: not known yet.
        is_first: of its role. Later ones to fine-tune on may be of one class, if only that has new images.

    Raises:
        StageError: no image is taken, a class that was asked for is not there, the role needs labels or classes that it
            does not have, or a grouping groups nothing.
    """
    check_classes(source.text, source.choice, seen.classes)
    if not seen.classes and not source.choice.labelled_only:
        raise StageError(f"source {source.text} holds no file")
    labelled = seen.classes != {""} and not source.choice.unlabelled
    if not seen.classes or (role == "finetune" and not labelled):
        unlabelled = [what for what in sorted(seen.noted) if what.startswith("unlabelled")]
        why = "; ".join([*source.notes, *unlabelled][:5])
        where = f"{why}. Where there are none: role: pretrain" if why else "role: pretrain"
        raise StageError(f"source {source.text} has no labels, and fine-tuning needs them: {where}")
    if source.grouping.text and not seen.groups:
        raise StageError(
            f"source {source.text}: `group={source.grouping.text}` puts no image into a group (the first is "
            f"{seen.noted[NO_GROUP].name}, without its split and class)"
        )
    if role == "finetune" and is_first and len(seen.classes - {""}) == 1:
        raise _one_class(source, seen)


def _one_class(source: Source, seen: Seen) -> StageError:
    """A folder that is read as the only class is often one around the classes."""
    (class_name,) = seen.classes - {""}
    folders = [f"{folder}/" for folder in seen.below.get(class_name, []) if folder]
    below = (
        f"In it lie {some(folders)}: if these are the classes, add ?class_level=N, for how many folders down they are"
        if folders
        else "It has no folders"
    )
    return StageError(
        f"source {source.text} was read as one class, {class_name}, and fine-tuning needs two or more. {below}. Else "
        f"bring the other classes too, or use role: pretrain. It was understood as\n{as_text(account(source, seen))}"
    )
