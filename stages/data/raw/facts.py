"""Facts: one row per image. Scan writes them, validate extends them, shard and evaluate read them."""

import pyarrow as pa

FACTS = pa.schema(
    [
        ("key", pa.string()),  # <batch>/<source split>/<class>/<file name>: unique over all batches
        ("batch", pa.string()),
        ("source_split", pa.string()),  # train, val, test, or all (one pool)
        ("class_name", pa.string()),  # empty: unlabelled
        ("tar", pa.string()),  # raw tar, relative to data/raw/<role>/<batch>/
        ("offset", pa.int64()),  # of the image's first byte in the tar
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("format", pa.string()),  # by magic number: JPEG, PNG, ..., empty where it is no image
        ("width", pa.int32()),  # as stored, before orientation; 0 where unknown
        ("height", pa.int32()),
        ("mode", pa.string()),  # as PIL names it: RGB, L, CMYK, P, RGBA, I;16, ...
        ("orientation", pa.int8()),  # EXIF, 1 to 8; 1 where absent
        ("decodes", pa.bool_()),  # strictly, to the last byte
        ("error", pa.string()),  # why not; empty where it decodes
        ("hash", pa.uint64()),  # perceptual (64-bit difference hash); 0 where it does not decode
        ("brightness", pa.float32()),  # mean luminance, 0-255; NaN where it does not decode
        ("contrast", pa.float32()),  # standard deviation of luminance
        ("group", pa.string()),  # images that belong together: the same name is the same group in all batches; or empty
    ]
)
ACCEPTED = FACTS.append(pa.field("split", pa.string())).append(
    pa.field("label", pa.int32())  # index in data/classes/<role>.json; -1: unlabelled
)
QUARANTINE = (
    FACTS.append(pa.field("role", pa.string()))
    .append(pa.field("reason", pa.string()))  # the expectation that failed
    .append(pa.field("duplicate_of", pa.string()))  # key of the image that stays; empty where the reason is another
)
