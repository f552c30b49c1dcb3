"""Hostile content: ways in which files that the program reads back may be damaged, forged or of another kind."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

DEEP = b"[" * 100_000

#: Values that no field expects, and that JSON can say.
VALUES: tuple[Any, ...] = (
    None,
    [],
    {},
    "",
    "x" * 5000,
    -1,
    0,
    True,
    10**400,
    float("inf"),
    float("nan"),
    [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]],
    {"a": {"b": [None]}},
    "\x1b[31m\r\n\a",
    "../../etc/passwd",
    "/etc/passwd",
    "\ud800",
    "</script><script>alert(1)</script>",
)


def damages(content: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """(what it is, content) of a file that is not what it was, and that cannot be used."""
    yield "empty", b""
    yield "half", content[: len(content) // 2]
    yield "zeroed", bytes(len(content))
    yield "noise", chance.randbytes(len(content))
    yield "nested without end", DEEP
    yield "a web page", b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n"
    yield "a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    yield "null", b"null"


def flipped(content: bytes, chance: random.Random) -> bytes:
    """The content with eight bytes changed."""
    changed = bytearray(content)
    for _ in range(8):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def forged(record: Mapping[str, Any], chance: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    """(what it is, JSON) of a record without one of its fields, or with a value that this field does not expect.

    Args:
        record: A right one.
        chance: Chooses the values.
        each: How many of each field.
    """
    for name in record:
        yield f"no {name}", json.dumps({key: value for key, value in record.items() if key != name}).encode()
        for value in chance.sample(VALUES, each):
            yield f"{name}: {value!r:.40}", json.dumps({**copy.deepcopy(record), name: value}).encode()


def huge_png(side: int) -> bytes:
    """A picture of side × side grey pixels in about a kilobyte a megapixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    row = compressor.compress(bytes(side + 1)) + compressor.flush(zlib.Z_FULL_FLUSH)
    # One row's code is that of all: compressing 900 MB takes seconds. Adler's sum of n zeros is n × 2¹⁶ + 1.
    total = ((side + 1) * side % 65521 << 16) + 1
    rows = b"\x78\x9c" + row * side + b"\x03\0" + struct.pack(">I", total)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def safetensors(header: Any, content: bytes = b"") -> bytes:
    """A file of safetensors with any header: a JSON value, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def tensor_files() -> Iterator[tuple[str, bytes]]:
    """(what it is, content) of files that say they are safetensors and hold nothing that can be used."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    yield "no tensors", safetensors({})
    yield "a header nested without end", safetensors(DEEP)
    yield "a header that is a list", safetensors([1])
    yield "a header longer than the file", struct.pack("<Q", 1 << 40) + b"{}"
    yield "a header of the largest length", struct.pack("<Q", (1 << 64) - 1) + b"{}"
    yield "offsets beyond the end", safetensors({"a": entry})
    yield "offsets that go back", safetensors({"a": {**entry, "data_offsets": [8, 0]}}, bytes(8))
    yield "a negative shape", safetensors({"a": {**entry, "shape": [-2]}}, bytes(8))
    yield "a shape that overflows", safetensors({"a": {**entry, "shape": [1 << 62, 1 << 62]}}, bytes(8))
    yield "a type of nobody", safetensors({"a": {**entry, "dtype": "F999"}}, bytes(8))
    yield "a tensor of no network", safetensors({"a": entry}, bytes(8))
    yield "metadata that is a list", safetensors({"__metadata__": [1], "a": entry}, bytes(8))
    yield "terminal escapes in a name", safetensors({"\x1b[2J\a": entry}, bytes(8))
    yield (
        "thousands of strange names",
        safetensors(
            {
                f"lora_unet_strange_{i}.lora_down.weight": {**entry, "data_offsets": [8 * i, 8 * i + 8]}
                for i in range(3000)
            },
            bytes(8 * 3000),
        ),
    )
