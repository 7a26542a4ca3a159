"""The bytes of a file, decompressed in pieces that are small whatever it claims to be."""

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

from soup_jax import inputs

# What decompressing one frame of zstd may take; `zstd --long` needs this, --long=28 and more do not
# fit.
MAX_WINDOW_BYTES = 128 << 20
_READ_BYTES = 1 << 16
_PIECE_BYTES = 1 << 18  # of decompressed data at a time


class TooLargeError(Exception):
    """More than a document or a compressed file may take; the message says what to do."""


def chunks(path: str, compression: str) -> Iterator[bytes]:
    """The decompressed bytes in small pieces; EOFError when a compressed stream ends early.

    Concatenated members are read on, and truncation is an error.
    """
    with inputs.open_file(path) as f:
        if compression == ".gz":
            yield from _gunzip(f)
        elif compression == ".zst":
            yield from _unzstd(f)
        else:
            while data := f.read(_READ_BYTES):
                yield data


def _gunzip(f: BinaryIO) -> Iterator[bytes]:
    stream: Any = None
    while data := f.read(_READ_BYTES):
        while data:
            if stream is None:
                data = data.lstrip(b"\0")  # padding after a member, as gzip itself allows
                if not data:
                    break
                stream = zlib.decompressobj(wbits=31)
            piece = stream.decompress(data, _PIECE_BYTES)
            while len(piece) == _PIECE_BYTES and not stream.eof:  # perhaps there is more of it
                yield piece
                piece = stream.decompress(stream.unconsumed_tail, _PIECE_BYTES)
            yield piece
            data = stream.unused_data if stream.eof else b""
            stream = None if stream.eof else stream
    if stream is not None:
        raise EOFError("the compressed data ends early")


def _unzstd(f: BinaryIO) -> Iterator[bytes]:
    # Block by block, of which none holds more than 128 kB: one call of the library decompresses all
    # that it is given, and 64 kB may hold gigabytes. Its own reader of streams takes truncation for
    # the end of the file.
    while first := f.read(1):
        if first == b"\0":  # padding
            continue
        head = first + _exactly(f, 4)
        if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a frame of something else
            size = int.from_bytes(head[4:] + _exactly(f, 3), "little")
            while size > 0:
                size -= len(_exactly(f, min(size, _READ_BYTES)))
            continue
        head += _exactly(f, zstandard.frame_header_size(head) - len(head))
        frame = zstandard.get_frame_parameters(head)
        if frame.window_size > MAX_WINDOW_BYTES:
            raise TooLargeError(
                f"decompressing takes {frame.window_size:,} bytes, the limit is "
                f"{MAX_WINDOW_BYTES:,}: recompress it, `zstd -dc --long=31 FILE | zstd > NEW`"
            )
        stream = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        stream.decompress(head)
        last = False
        while not last:
            block = _exactly(f, 3)
            number = int.from_bytes(block, "little")
            last, repeated = bool(number & 1), number >> 1 & 3 == 1
            yield stream.decompress(block + _exactly(f, 1 if repeated else number >> 3))
        if frame.has_checksum:
            stream.decompress(_exactly(f, 4))


def _exactly(f: BinaryIO, num_bytes: int) -> bytes:
    data = f.read(num_bytes)
    if len(data) < num_bytes:
        raise EOFError("the compressed data ends early")
    return data
