"""From a stream's colours to sRGB: the filters of ffmpeg that show a frame as players do.

Sources: ITU-T H.273 (names of primaries, transfers, matrices), ITU-R BT.2100 (PQ and HLG), ITU-R BT.2408 (a
diffuse white of 203 cd/m², or 75% of the HLG signal).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WHITE = 203
"""Luminance, in cd/m², that is white in an SDR picture (ITU-R BT.2408)."""
PEAK = 1000
"""Luminance from which on a PQ picture is clipped; between white and it, highlights are compressed."""

_UNKNOWN = ("unknown", "unspecified", "reserved", "")
_RGB = re.compile(r"gbr|rgb|bgr|[ab]*0?(rgb|bgr)|argb|abgr|x2|pal8|xyz")
# Matrices that swscale does not know (it would take them for BT.601's); zimg does.
_ONLY_ZIMG = ("ycgco", "bt2020c", "chroma-derived-nc", "chroma-derived-c", "ictcp")
# Those that neither knows.
_UNREAD = {"smpte2085": "Y'D'zD'x", "ipt-c2": "IPT-C2", "ycgco-re": "YCgCo-R", "ycgco-ro": "YCgCo-R"}
_WIDE = ("bt2020", "smpte431", "smpte432")
_LOGARITHMIC = ("log100", "log316")  # swscale refuses them, even where it leaves them as they are
_ENCODED_LIGHT = ("linear", *_LOGARITHMIC)  # shown as they are, they would be far too dark or grey
_HDR = ("smpte2084", "arib-std-b67")
_ZIMG_TRANSFERS = (*_HDR, *_ENCODED_LIGHT, "bt709", "smpte170m", "iec61966-2-1", "bt2020-10", "bt2020-12")

# The HLG signal as PQ's, in 16 bits: scene light, with 75% of the signal as SDR white. BT.2100's system gamma is for
# a display of 1000 cd/m²; without it colours are those of the SDR picture that the signal was graded with.
_HLG_LIGHT = "if(lte(val/65535,0.5),(val/65535)^2/3,(exp((val/65535-0.55991073)/0.17883277)+0.28466892)/12)"
_PQ_POWER = f"pow({_HLG_LIGHT}/0.265*{WHITE}/10000,0.1593017578125)"
_HLG_AS_PQ = f"65535*pow((0.8359375+18.8515625*{_PQ_POWER})/(1+18.6875*{_PQ_POWER}),78.84375)"


@dataclass(frozen=True)
class Colours:
    """Tags of a stream's frames, in ffmpeg's names, "unknown" where there is none.

    Attributes:
        matrix: How Y'CbCr comes from R'G'B' ("gbr": it does not).
        primaries: The colours of red, green and blue.
        transfer: How a signal comes from light.
        range: "tv" or "pc" for limited or full.
        rgb: Whether pixels are stored as RGB.
        lines: Height of the picture as it is stored.
    """

    matrix: str = "unknown"
    primaries: str = "unknown"
    transfer: str = "unknown"
    range: str = "unknown"
    rgb: bool = False
    lines: int = 0

    @classmethod
    def read(cls, shown: str, pixels: str, lines: int) -> Colours:
        """Read what ffmpeg's showinfo filter says of a frame."""
        tags = dict(re.findall(r"color_(space|primaries|trc|range):(\S+)", shown))
        values = {name: "unknown" if tags.get(name, "") in _UNKNOWN else tags[name] for name in ("space", "primaries")}
        transfer, span = (tags.get(name, "unknown") for name in ("trc", "range"))
        rgb = bool(_RGB.match(pixels))
        if pixels.startswith("xyz"):  # of digital cinema: swscale knows its primaries and transfer, and leads to sRGB
            values["primaries"] = transfer = "unknown"
        if values["space"] == "gbr" and not rgb:  # a tag that contradicts the pixels
            values["space"] = "unknown"
        return cls(values["space"], values["primaries"], transfer, span, rgb, lines)

    def unread(self) -> str:
        """Reason why nothing here converts these colours; empty if they can be read."""
        if self.transfer == "smpte428":
            return "its light is encoded by SMPTE ST 428-1 (digital cinema), which is not read"
        if self.rgb:
            return ""
        if (name := _UNREAD.get(self.matrix)) is not None:
            return f"its colours are stored as {name}, which is not read"
        if self.matrix == "ictcp" and not self.hdr:
            return (
                f"its colours are tagged as ICtCp, which is defined for PQ and HLG, with the transfer {self.transfer}"
            )
        if self.matrix == "bt2020c" and self.hdr:
            return "its colours are stored as BT.2020 of constant luminance with PQ or HLG, which is not read"
        return ""

    @property
    def hdr(self) -> bool:
        """Return whether the stream is PQ or HLG."""
        return self.transfer in _HDR

    @property
    def needs_zimg(self) -> bool:
        """Return whether more than a matrix and a range lie between the stream and sRGB."""
        wide = self.primaries in _WIDE
        return self.hdr or wide or self.transfer in _ENCODED_LIGHT or (not self.rgb and self.matrix in _ONLY_ZIMG)

    def decided_matrix(self) -> str:
        """The matrix, where the stream names none that which players take: by the primaries, else by the size."""
        if self.rgb or self.matrix != "unknown":
            return self.matrix
        if self.hdr or self.primaries == "bt2020":
            return "bt2020nc"
        return "bt709" if self.lines >= 720 or self.primaries in _WIDE else "smpte170m"

    def before_scaling(self) -> list[str]:
        """Filters for the frames as they are decoded: tags that swscale takes, of the decided matrix's."""
        decided, tags = self.decided_matrix(), []
        if not self.rgb and (decided not in (self.matrix, "smpte170m") or decided in _ONLY_ZIMG):  # swscale's default
            tags += [f"colorspace={'bt709' if decided in _ONLY_ZIMG else decided}"]
        if self.transfer in _LOGARITHMIC:
            tags += ["color_trc=bt709"]
        return [f"setparams={':'.join(tags)}"] if tags else []

    def while_scaling(self) -> str:
        """Options of the scale filter: what zimg converts keeps its range until then."""
        return f":in_range={self._span}:out_range={self._span}" if self.needs_zimg and not self.rgb else ""

    @property
    def _span(self) -> str:
        return "full" if self.range == "pc" else "limited"

    def after_scaling(self, alpha: bool) -> list[str]:
        """Filters for scaled frames of any pixel format, that lead to 8-bit RGB where swscale alone would not."""
        if not self.needs_zimg:
            return []
        primaries = self.primaries if self.primaries != "unknown" else "bt2020" if self.hdr else "bt709"
        transfer = self.transfer if self.transfer in _ZIMG_TRANSFERS else "bt709"
        planar = f"gbr{'a' * alpha}p16le" if self.rgb else f"yuv{'a' * alpha}444p16le"
        known = f"pin={primaries}:tin={transfer}"
        filters = [f"format={planar}"]
        if not self.rgb:
            known_yuv = f"min={self.decided_matrix()}:rin={self._span}:{known}"
            filters += [f"zscale={known_yuv}:m=gbr:r=full:p={primaries}:t={transfer}", f"format=gbr{'a' * alpha}p16le"]
        if transfer == "arib-std-b67":
            filters += [f"lutrgb=r='{_HLG_AS_PQ}':g='{_HLG_AS_PQ}':b='{_HLG_AS_PQ}'"]
            transfer = "smpte2084"
        known = f"min=gbr:rin=full:pin={primaries}:tin={transfer}"
        if transfer not in (*_ENCODED_LIGHT, "smpte2084"):
            return [*filters, f"zscale={known}:m=gbr:r=full:p=bt709:t={transfer}"]
        filters += [f"zscale={known}:m=gbr:r=full:p=bt709:t=linear:npl={WHITE}", f"format=gbr{'a' * alpha}pf32le"]
        if self.hdr:  # no change up to 95% of white; the colour of what is brighter is kept
            filters += [f"tonemap=mobius:param=0.95:peak={PEAK / WHITE:.6f}:desat=0"]
        return [*filters, "zscale=min=gbr:rin=full:pin=bt709:tin=linear:m=gbr:r=full:p=bt709:t=iec61966-2-1"]
