"""Which of libjpeg's warnings mean damage, pixels that are missing or wrong, and which only an odd file.

libjpeg tells its first warning only. So what is harmless is mended in a copy, and the copy must decode without any.
"""

import re
import struct

import simplejpeg

SEGMENT = ">BBH"  # FF, marker, length without the two
START_OF_SCAN, END = 0xDA, b"\xff\xd9"
SEQUENTIAL = (0xC0, 0xC1)
LONGEST = 65_500
"""Pixels of a side."""
SPARE = "extraneous bytes before marker 0xd9"
SHORT = "premature end"
READ_AHEAD = 16
"""At least as many bytes as the decoder has taken beyond those that it needed, and does not count as spare."""


def mended(data: bytes, warning: str) -> bytes | None:
    """A copy without what libjpeg warns of, where no pixel depends on it; None: the warning is of damage.

    Args:
        data: a JPEG.
        warning: libjpeg's, on `data`.
    """
    segments = _segments(data)
    scan = segments.get(START_OF_SCAN)
    if scan is None:
        return None
    if warning.startswith("Warning: unknown JFIF revision"):
        at = segments[0xE0] + 9
        return data[:at] + b"\x01\x02" + data[at + 2 :]
    if warning.startswith("Invalid SOS parameters for sequential"):  # the decoder takes these anyway
        at = scan + 5 + 2 * data[scan + 4]
        return data[:at] + b"\x00\x3f\x00" + data[at + 3 :]
    if SPARE in warning:
        return _without_spare_bytes(data, segments, scan, warning)
    return None


def _segments(data: bytes) -> dict[int, int]:
    """Where each marker up to the first scan first comes (ITU-T T.81, B.1)."""
    found, at = dict[int, int](), 2
    try:
        while True:
            while data[at + 1] == 0xFF:  # fill bytes
                at += 1
            prefix, marker, length = struct.unpack_from(SEGMENT, data, at)
            if prefix != 0xFF or length < 2:
                return found
            found.setdefault(marker, at)
            if marker == START_OF_SCAN:
                return found
            at += 2 + length
    except (struct.error, IndexError):
        return found


def _without_spare_bytes(data: bytes, segments: dict[int, int], scan: int, warning: str) -> bytes | None:
    end = data.find(END, scan)
    frame = next((at for marker, at in segments.items() if marker in SEQUENTIAL), None)
    # In several scans, of a progressive JPEG or one with a scan a colour, the last one says little of the picture.
    one_scan = frame is not None and data[scan + 4] == data[frame + 9]
    if frame is not None and one_scan and _is_more_picture(data, frame, end):
        return None
    return _cut(data, end, warning)


def _cut(data: bytes, end: int, warning: str) -> bytes | None:
    """Without the spare bytes; None where they begin earlier, within the picture: a disk fills up what it has lost."""
    found = re.search(rf"(\d+) {SPARE}", warning)
    spare = int(found[1]) if found else 0
    filling = end - len(data[:end].rstrip(data[end - 1 : end]))
    return None if filling > spare + READ_AHEAD else data[: end - spare] + data[end:]


def _is_more_picture(data: bytes, frame: int, end: int) -> bool:
    """Whether the bytes to spare are blocks of the picture, for which damage before them has left no room.

    A scan does not say which shape its blocks make. So the frame is given another shape, with as many more blocks as
    there are bytes for: the end of a real scan is the end of a block, and its last bits are ones (T.81, F.1.2.3).
    """
    height, width, colours = struct.unpack_from(">HHB", data, frame + 5)
    factors = [data[frame + 11 + 3 * colour] for colour in range(colours)]
    across, down = (8 * max(each >> 4 for each in factors), 8 * max(each & 15 for each in factors))
    if colours == 1:
        across = down = 8
    blocks = -(-width // across) * -(-height // down)

    def enough(count: int, last: int) -> bool | None:
        """Whether the bytes before `last` make so many blocks; None: no frame has this shape, or they are no data."""
        if (shape := _shape(count, LONGEST // across, LONGEST // down)) is None:
            return None
        sides = struct.pack(">HH", shape[1] * down, shape[0] * across)
        warning = first_warning(data[: frame + 5] + sides + data[frame + 9 : last] + END)
        return None if warning and SHORT not in warning and SPARE not in warning else SHORT not in warning

    low, high = blocks, blocks + 8 * (end - frame)
    step = 1
    while low + step < high:  # the first count that is too many, by doubling
        if enough(low + step, end) is False:
            high = low + step
        else:
            step *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if (answer := enough(middle, end)) is None:  # of three counts in a row, one is even
            middle = min(middle + 1, high - 1)
            if (answer := enough(middle, end)) is None:
                return False
        low, high = (middle, high) if answer else (low, middle)
    return low > blocks and data[end - 1] & 1 == 1 and enough(low, end - 1) is False


def _shape(count: int, widest: int, highest: int) -> tuple[int, int] | None:
    """Two factors of `count`, none too large."""
    for one in range(max(1, -(-count // highest)), min(widest, count) + 1):
        if count % one == 0:
            return one, count // one
    return None


def first_warning(data: bytes) -> str:
    """What libjpeg says of a JPEG, decoded at its smallest; empty where it says nothing."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1, strict=True)
    except ValueError as error:
        return str(error)
    return ""
