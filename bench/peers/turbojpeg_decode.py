"""The limit of every loader on the CPU: libjpeg-turbo decodes the JPEGs whole, from memory, and no more is done."""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from threading import local

import simplejpeg

from bench.peers.protocol import Round, arguments, labelled_images, serve


def prepare(options: argparse.Namespace) -> Round:
    """Reads the images; those that are no JPEGs are left out."""
    contents = {path: path.read_bytes() for path, _ in labelled_images(options.images, options.epoch)}
    jpegs = [
        content
        for path, _ in labelled_images(options.images, options.epoch)
        if (content := contents[path]).startswith(b"\xff\xd8")
    ]
    sizes = [simplejpeg.decode_jpeg_header(content)[:2] for content in set(jpegs)]
    largest = max(3 * height * width for height, width in sizes)
    own = local()

    def decode(piece: list[bytes]) -> int:
        # One buffer a thread: pages of fresh memory would cost a tenth.
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(largest)
        for content in piece:
            simplejpeg.decode_jpeg(content, buffer=own.buffer)
        return len(piece)

    pool = ThreadPoolExecutor(options.threads)

    def epoch() -> dict[str, float]:
        began = time.perf_counter()
        # Threads take 50 at once, so that handing out costs nothing.
        pieces = [jpegs[start : start + 50] for start in range(0, len(jpegs), 50)]
        decoded = sum(pool.map(decode, pieces))
        return {"images_per_second": decoded / (time.perf_counter() - began), "first_batch_seconds": 0.0}

    return epoch


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    serve(["simplejpeg"], lambda: prepare(given))
