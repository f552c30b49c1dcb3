"""Signs that a file is cut short or damaged: in its structure, and in what ffmpeg says of it."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import BinaryIO

from emt.video.names import show

_SAID = re.compile(r"^((?:\[[^\]\n]*\] )*)\[(error|fatal|panic|warning)\] (.+)$", re.MULTILINE)
_CUT = re.compile(r"partial file|ended prematurely|no index at the end")
_LOST = re.compile(
    r"Packet corrupt|corrupt input packet|PES packet size mismatch|Truncat|truncated|Error during demuxing"
)
_BAD_PICTURE = re.compile(r"corrupt decoded frame|Error submitting packet|Decoding error|Error while decoding stream")
# Said of good streams too.
_HARMLESS = re.compile(
    r"mmco: unref short failure|co located POCs unavailable|missing picture in access unit"
    r"|non-existing [SP]PS|no frame!|decode_slice_header error"  # before the first key frame of a recording
)
_NO_DECODER = re.compile(r"Parsed_|swscaler|\[(?:vf|af|vost|aost|out|graph|in)#|framecrc|rawvideo @|auto_")


def ends_early(path: Path, size: int) -> bool | None:
    """Return whether a file ends before its own structure says; None if it says nothing of its end.

    MP4 and MOV, Matroska, AVI, ASF (WMV), Ogg, GIF, MPEG-TS, Y4M and DV say it.

    Args:
        path: The file.
        size: Its size in bytes.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1024)
            if re.match(rb"....(?:ftyp|moov|mdat|free|wide|skip|styp)", head, re.DOTALL):
                return _boxes_end_early(file, size)
            if re.match(rb"RIFF....AVI ", head, re.DOTALL):
                return _chunks_end_early(file, size)
            if head.startswith(b"\x1a\x45\xdf\xa3"):
                return _beyond(_segment_end(head), size)
            if head.startswith(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"):
                return _beyond(_asf_size(file), size)
            if head.startswith(b"YUV4MPEG2 "):
                return _frames_end_early(head, size)
            if re.match(rb"\x1f\x07\x00[\x3f\xbf]", head):  # DV: frames of one size, or multiples of it, of 50 or 60 Hz
                return True if size % (144_000 if head[3] & 0x80 else 120_000) else None
            if head.startswith(b"GIF8"):
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return _gif_ends_early(data)
            if head.startswith(b"OggS"):
                file.seek(max(0, size - (1 << 17)))  # more than a page
                return _ogg_ends_early(file.read())
            for packet, sync in ((188, 0), (192, 4)):
                if len(head) > 4 * packet and all(head[sync + k * packet] == 0x47 for k in range(4)):
                    file.seek(size // packet * packet)
                    rest = file.read()
                    return True if rest and (len(rest) <= sync or rest[sync] == 0x47) else None
    except (OSError, ValueError):
        pass
    return None


def _beyond(end: int, size: int) -> bool | None:
    return end > size if end else None


def _boxes_end_early(file: BinaryIO, size: int) -> bool | None:
    """Return whether the last box of an MP4 or MOV file is not whole; None if there may be more fragments."""
    end, fragments = 0, False
    while end + 8 <= size:
        file.seek(end)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0 or not kind.isalnum():  # up to the end; or something else that was appended
            break
        fragments |= kind == b"moof"
        end += max(length, 8)
    return True if end > size else None if fragments else False


def _chunks_end_early(file: BinaryIO, size: int) -> bool:
    """Return whether the last RIFF chunk of an AVI file is not whole. One that was never finished has no length."""
    end = 0
    while end + 12 <= size:
        file.seek(end)
        header = file.read(12)
        length = int.from_bytes(header[4:8], "little")
        if header[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            break
        end += 8 + length
    return end > size


def _frames_end_early(head: bytes, size: int) -> bool | None:
    """Return whether the last frame of a Y4M file is not whole; None if its frames are of no known size."""
    header, _, rest = head.partition(b"\n")
    fields = {field[:1]: field[1:].decode("ascii", "replace") for field in header.split(b" ")[1:]}
    colours = re.match(r"(mono|420|422|444|411)(alpha)?\w*?(?:p?(\d\d?))?$", fields.get(b"C", "420"))
    if not rest.startswith(b"FRAME") or b"\n" not in rest or colours is None:
        return None
    try:
        width, height = int(fields[b"W"]), int(fields[b"H"])
    except (KeyError, ValueError):
        return None
    across, down = {"mono": (0, 0), "420": (2, 2), "422": (2, 1), "444": (1, 1), "411": (4, 1)}[colours[1]]
    samples = width * height * (2 if colours[2] else 1)
    if across:
        samples += 2 * -(-width // across) * -(-height // down)
    frame = rest.index(b"\n") + 1 + samples * (2 if int(colours[3] or 8) > 8 else 1)
    return (size - len(header) - 1) % frame != 0


def _gif_ends_early(data: mmap.mmap) -> bool:
    """Return whether a GIF file ends before its trailer; whatever follows that."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while at < len(data):
        if data[at] == 0x3B:
            return False
        if data[at] == 0x2C and at + 9 < len(data):
            flags = data[at + 9]
            at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif data[at] == 0x21:
            at += 2
        else:
            return True
        while at < len(data) and data[at]:  # blocks, up to an empty one
            at += 1 + data[at]
        at += 1
    return True


def _ogg_ends_early(tail: bytes) -> bool:
    """Return whether the last page of an Ogg file is not whole, or not marked as its stream's last."""
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[26] if len(page) > 26 else 0
    length = 27 + segments + sum(page[27 : 27 + segments])
    return len(page) < length or not page[5] & 4


def _segment_end(head: bytes) -> int:
    """End of the segment of a Matroska file by its header; 0 if it gives none, as live streams do not."""
    length, at = _ebml_number(head, 4)
    at += length
    if head[at : at + 4] != b"\x18\x53\x80\x67":
        return 0
    length, at = _ebml_number(head, at + 4)
    return at + length if length >= 0 else 0


def _ebml_number(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, -1 for "unknown", and where it ends."""
    width = 9 - (data[at : at + 1] or b"\xff")[0].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return -1 if value == (1 << 7 * width) - 1 else value, at + width


def _asf_size(file: BinaryIO) -> int:
    """Size that the header of an ASF file gives; 0 if it was broadcast."""
    file.seek(0)
    header = file.read(1 << 14)
    at = header.find(b"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11\x8e\xe4\x00\xc0\x0c\x20\x53\x65")
    if at < 0 or len(header) < at + 92 or header[at + 88] & 1:
        return 0
    return int.from_bytes(header[at + 40 : at + 48], "little")


def said(log: str) -> list[tuple[str, str, str]]:
    """Messages of ffmpeg: for each who said it, at which level, and the text. Only warnings and worse."""
    return [(match[1], match[2], match[3].strip()) for match in _SAID.finditer(log)]


def signs_of_a_cut(log: str) -> bool:
    """Return whether a demuxer says that the file ends too early."""
    return any(_CUT.search(text) for _, _, text in said(log))


def lost_packets(log: str) -> str:
    """The first message of a demuxer about packets that are lost or damaged; "" if there is none."""
    return next((text.rstrip(".") for _, _, text in said(log) if _LOST.search(text)), "")


def describe_decoding(path: Path, log: str, from_the_start: bool, cut_short: bool) -> str:
    """A line about pictures that could not be decoded whole; "" if all could.

    Args:
        path: The file.
        log: Messages of ffmpeg while it decoded.
        from_the_start: Whether it decoded from the first frame on. After a seek, decoders complain of references that
            they have not seen, of pictures which nobody sees; only pictures that came out damaged count then.
        cut_short: Whether it is known to be cut short: that alone damages its last pictures.
    """
    messages = [(who, level, text) for who, level, text in said(log) if not _HARMLESS.search(text)]
    bad = sum(bool(_BAD_PICTURE.search(text)) for _, _, text in messages)
    errors = [text for who, level, text in messages if level == "error" and not _NO_DECODER.search(who)]
    errors = [text for text in errors if not _CUT.search(text) and not _BAD_PICTURE.search(text)]
    if bad <= 2 if cut_short else not (bad or (errors and from_the_start)):
        return ""
    reason = f" ({errors[0].rstrip('.')})" if errors else ""
    pictures = f"{bad:,} of its pictures" if bad > 1 else "a picture of it" if bad else "a part of it"
    return (
        f"{show(path)} is damaged: {pictures} cannot be decoded whole{reason}; what moves in it may be read wrong."
        " Copy or download it again."
    )
