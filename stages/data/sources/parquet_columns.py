"""Which columns of a Parquet file hold images, labels and groups, by the query, the schema and `datasets`' metadata."""

import json
from typing import Any, NamedTuple

import pyarrow as pa

from stages.data.sources.labels import apart, nested
from stages.runtime.command import StageError

EMBED = (
    "write the dataset again with its images embedded (datasets: `from datasets.table import embed_table_storage`, "
    "`dataset.with_format('arrow').map(embed_table_storage, batched=True)`)"
)


class Columns(NamedTuple):
    """Which columns are read: those that the source's query names, or that the file's schema tells."""

    image: str | None = None
    """Of images; None: `image`, or the only one that Hugging Face's metadata calls an image."""
    label: str | None = None
    """Of labels, `meta.class` in a struct; None: `label`, or the only one with class names in the metadata."""
    unlabelled: bool = False
    """Nobody asks for labels."""
    group: str | None = None
    """Of the groups of images; None: there are none."""


class FoundColumns(NamedTuple):
    """The columns of one file; a label or group may lie in a struct, `meta.class`."""

    image: str
    label: str | None
    group: str | None
    class_names: tuple[str, ...] | None
    has_numbers: bool
    """Labels are numbers that have no names."""


def read_columns(where: str, schema: pa.Schema, columns: Columns) -> tuple[FoundColumns, tuple[str, ...]]:
    """The columns of a file, and what was guessed.

    Raises:
        StageError: one is not there or of a type that cannot be what it should, or several may be the labels.
    """
    features = _features(schema)
    image, notes = _image_column(where, schema, features, columns)
    _check_image(where, schema, image)
    label, more = _label_column(where, schema, features, columns)
    kind = _type_at(schema, label)
    if columns.unlabelled and columns.label is None and not _is_plain(kind):
        label = None  # nobody asks for it, and what it may hold must stop nobody
    if label is not None and not _is_label(kind):
        several = ": several classes for an image, of which Synset takes one" if _is_list(kind) else ""
        raise StageError(
            f"{where}: the column {label!r} is {kind}{several}; expected numbers of classes, or their names "
            f"({_listed(schema)}); ?label=COLUMN names another"
        )
    names = _class_names(features, label)
    found = FoundColumns(image, label, columns.group, names, names is None and label is not None and _is_number(kind))
    return found, (*notes, *more)


def _image_column(where: str, schema: pa.Schema, features: dict[str, Any], columns: Columns) -> tuple[str, list[str]]:
    """The column of images, and what was guessed."""
    if (image := columns.image or "image") in schema.names:
        return image, []
    found = [name for name in schema.names if columns.image is None and _kind(features.get(name)) == "Image"]
    if len(found) == 1:
        return found[0], [
            f"images are read from the column `{found[0]}`, the only one that the metadata calls an image"
        ]
    likely = [name for name in schema.names if _is_image(schema.field(name).type)]
    raise StageError(
        f"{where} has no column {image!r} ({_listed(schema)}); name the right ones: ?image=COLUMN&label=COLUMN"
        + (f". Images may be in: {', '.join(likely)[:200]}" if likely else "")
    )


def _label_column(
    where: str, schema: pa.Schema, features: dict[str, Any], columns: Columns
) -> tuple[str | None, list[str]]:
    """The column of labels, and what was guessed; None where nothing tells it.

    Raises:
        StageError: the one that is asked for is not there, or several may be meant.
    """
    for name in filter(None, (columns.label, columns.group)):
        if _type_at(schema, name) is None:
            raise StageError(
                f"{where} has no column {name!r} ({_listed(schema)}); "
                f"name the right ones: ?image=COLUMN&label=COLUMN&group=column:COLUMN"
            )
    if columns.label is not None:
        return columns.label, []
    named = [path for path in _class_labels(features) if _type_at(schema, path) is not None]
    has_label = "label" in schema.names
    if columns.unlabelled or (has_label and (not named or "label" in named)):
        return ("label" if has_label else None), []
    if len(named) == 1 and not has_label:
        return named[0], [f"labels are read from the column `{named[0]}`, the only one with class names"]
    if named:
        found = [*named, *(["label"] if has_label else [])]
        raise StageError(
            f"{where}: the labels may be in {', '.join(found)[:300]}; choose one: ?label={found[0]}, "
            f"or ?unlabelled=true for none"
        )
    return None, [
        f"no column is taken for labels, so all images are unlabelled ({_listed(schema)}); ?label=COLUMN names one"
    ]


def _listed(schema: pa.Schema) -> str:
    """The columns for people, without those that pandas adds."""
    shown = [f"{each.name} ({_short(each.type)})" for each in schema if not each.name.startswith("__")]
    return f"it has: {', '.join(shown)[:500]}"


def _short(kind: pa.DataType) -> str:
    return "struct" if pa.types.is_struct(kind) else "list" if _is_list(kind) else str(kind)


def _type_at(schema: pa.Schema, path: str | None) -> pa.DataType | None:
    """The type of a column, or of a field in a struct at `column.field`; None where there is none."""
    if path is None:
        return None
    if path in schema.names:
        return schema.field(path).type
    top, *rest = path.split(".")
    kind = schema.field(top).type if top in schema.names and rest else pa.null()
    for name in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind if rest else None


def _is_list(kind: pa.DataType | None) -> bool:
    return kind is not None and (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return _is_bytes(kind)


def _is_label(kind: pa.DataType | None) -> bool:
    kind = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    tests = (
        _is_number,
        pa.types.is_boolean,
        pa.types.is_null,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        _is_bytes,
    )
    return kind is not None and any(test(kind) for test in tests)


def _is_plain(kind: pa.DataType | None) -> bool:
    return kind is not None and (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    )


def _is_number(kind: pa.DataType | None) -> bool:
    kind = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return kind is not None and any(test(kind) for test in tests)


def _check_image(where: str, schema: pa.Schema, image: str) -> None:
    kind = schema.field(image).type
    if _is_image(kind):
        return
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        raise StageError(f"{where}: the column {image!r} names files and does not hold them; {EMBED}")
    several = " (several images in a row)" if _is_list(kind) and _is_image(kind.value_type) else ""
    raise StageError(
        f"{where}: the column {image!r} is {kind}{several}; expected bytes, or a struct with bytes and "
        f"path: encoded images, one a row ({_listed(schema)}); ?image=COLUMN names another"
    )


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's `datasets` keeps of the columns beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(feature: Any) -> str:
    return str(feature.get("_type")) if isinstance(feature, dict) else ""


def _class_labels(features: dict[str, Any], above: str = "") -> list[str]:
    """The columns that hold numbers of named classes; with a dot where they lie in a struct."""
    found = []
    for name, feature in features.items():
        if _kind(feature) == "ClassLabel":
            found.append(above + name)
        elif isinstance(feature, dict) and not above and "_type" not in feature:
            found += _class_labels(feature, f"{name}.")
    return found


def _class_names(features: dict[str, Any], label: str | None) -> tuple[str, ...] | None:
    """The names of the classes that the numbers of a column stand for."""
    feature = nested(features, label or "")
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return apart(names)
