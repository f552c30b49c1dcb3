"""The scenes of the rendered world, painted as canvases larger than the frame.

Landscapes have their horizon above the middle and rows of waves, dunes, trees or houses below it, so that every part of
a canvas shows what it is and how the camera moves. Colours are muted, for subjects to stand out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

CANVAS = 384
"""Side of a canvas in pixels; at zoom 1 one of them is one pixel of a 128 frame."""

PLACES: dict[str, str] = {
    "sea": "over the sea",
    "hills": "over the hills",
    "desert": "in the desert",
    "night": "in the night",
    "street": "on the street",
    "forest": "in the forest",
    "snow": "in the snow",
    "clouds": "in the clouds",
    "meadow": "on the meadow",
    "city": "over the city",
    "mountains": "over the mountains",
    "bricks": "on bricks",
    "checkerboard": "on a checkerboard",
    "stripes": "on stripes",
    "dots": "on dots",
    "wood": "on wood",
}
"""Scene and how a caption places a subject in it."""
SCENES: tuple[str, ...] = tuple(PLACES)
"""Every scene a caption can name."""
PATTERNS: tuple[str, ...] = ("bricks", "checkerboard", "stripes", "dots", "wood")
"""Scenes that look alike after a step, so that a result that is drawn a step off still looks right."""

HORIZON = 165.0
"""Height of the horizon from the top of a canvas."""
_OVER = 2  # painted this much larger, then reduced: antialiasing

Colour = tuple[float, float, float]
"""Red, green and blue from 0 to 255."""


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """The colour a share `t` of the way from `a` to `b`."""
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


class Brush:
    """A canvas being painted, in canvas pixels; random choices come from `rng`."""

    def __init__(self, rng: np.random.Generator, top: Colour, bottom: Colour) -> None:
        self.rng = rng
        side = CANVAS * _OVER
        # Of one painting to the next the light differs a little.
        self.light = np.clip(rng.normal(1.0, 0.022, 3) * rng.uniform(0.94, 1.05), 0.88, 1.08)
        t = np.linspace(0, 1, side)[:, None, None]
        rows = np.asarray(top, float) * (1 - t) + np.asarray(bottom, float) * t
        self.image = Image.fromarray(np.repeat(rows, side, 1).clip(0, 255).astype(np.uint8), "RGB")
        self.pen = ImageDraw.Draw(self.image)

    def between(self, low: float, high: float) -> float:
        """A random number between `low` and `high`."""
        return float(self.rng.uniform(low, high))

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """A filled polygon."""
        self.pen.polygon([(x * _OVER, y * _OVER) for x, y in points], fill=_ink(colour))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """A filled ellipse about (x, y)."""
        box = ((x - rx) * _OVER, (y - ry) * _OVER, (x + rx) * _OVER, (y + ry) * _OVER)
        self.pen.ellipse(box, fill=_ink(colour))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """A filled rectangle."""
        if (x1 - x0) * _OVER >= 1 and (y1 - y0) * _OVER >= 1:
            self.pen.rectangle((x0 * _OVER, y0 * _OVER, x1 * _OVER - 1, y1 * _OVER - 1), fill=_ink(colour))

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        """An open line."""
        scaled = [(x * _OVER, y * _OVER) for x, y in points]
        self.pen.line(scaled, fill=_ink(colour), width=max(1, round(width * _OVER)), joint="curve")

    def ridge(self, y: float, height: float, length: float, sharp: float = 0.0) -> Callable[[float], float]:
        """A random skyline, a function from x to y: waves of `length` and `height`, from rolling (0) to peaked (1)."""
        phases = self.rng.uniform(0, 2 * math.pi, 3)
        lengths = length * np.array([1.0, 0.53, 0.29]) * self.rng.uniform(0.85, 1.15, 3)

        def at(x: float) -> float:
            total = 0.0
            for weight, wave, phase in zip((0.6, 0.27, 0.13), lengths, phases):
                turn = 2 * math.pi * x / wave + phase
                rolling, peaked = math.sin(turn), 1 - 4 * abs((turn / (2 * math.pi)) % 1 - 0.5)
                total += weight * (rolling * (1 - sharp) + peaked * sharp)
            return y - height * total

        return at

    def fill_below(self, skyline: Callable[[float], float], colour: Colour) -> None:
        """Everything below a skyline."""
        points = [(float(x), skyline(float(x))) for x in range(-4, CANVAS + 5, 3)]
        self.polygon([*points, (CANVAS + 4, CANVAS + 4), (-4, CANVAS + 4)], colour)

    def cloud(self, x: float, y: float, size: float, colour: Colour, shade: Colour) -> None:
        """A puffy cloud with a shaded flat base."""
        puffs = [(self.between(-1, 1), self.between(-0.35, 0.05), self.between(0.32, 0.55)) for _ in range(6)]
        for drop, tint in ((0.16, shade), (0.0, colour)):
            for dx, dy, radius in puffs:
                self.ellipse(x + dx * size, y + (dy + drop) * size, radius * size * 0.95, radius * size * 0.72, tint)

    def sky(self, bottom: float, colour: Colour, shade: Colour, count: int = 9, size: float = 17) -> None:
        """Clouds spread evenly above `bottom`."""
        for i in range(count):
            x = (i + self.between(0.15, 0.85)) * CANVAS / count
            y = self.between(0.04, 1) ** 0.8 * (bottom - 0.9 * size)
            self.cloud(x, y, size * self.between(0.6, 1.25), colour, shade)

    def scatter(self, spacing: float, top: float = 0.0, bottom: float = CANVAS) -> list[tuple[float, float]]:
        """Points spread evenly but not regularly, `spacing` apart, from far (above) to near (below)."""
        points = []
        rows = max(1, round((bottom - top) / spacing))
        for i in range(rows):
            shift = self.between(0, spacing)
            for j in range(-1, round(CANVAS / spacing) + 1):
                x = (j + self.between(0.1, 0.9)) * spacing + shift
                points.append((x, top + (i + self.between(0.1, 0.9)) * (bottom - top) / rows))
        return sorted(points, key=lambda point: point[1])

    def done(self) -> np.ndarray:
        """The painting: (CANVAS, CANVAS, 3) uint8, with faint soft blotches so that no area is quite flat."""
        small = np.asarray(self.image.resize((CANVAS, CANVAS), Image.Resampling.BOX), np.float32)
        coarse = self.rng.normal(0, 1, (24, 24)).astype(np.float32)
        blotches = np.asarray(Image.fromarray(coarse, "F").resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))
        return (small * self.light * (1 + 0.03 * blotches[..., None])).clip(0, 255).astype(np.uint8)


def _ink(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, round(c))) for c in colour)
    return red, green, blue


def _sea(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (150, 190, 214), (214, 226, 226))
    brush.sky(HORIZON, (240, 243, 244), (196, 212, 222), 8, 15)
    for _ in range(7):  # gulls
        x, y, s = brush.between(0, CANVAS), brush.between(20, HORIZON - 15), brush.between(3, 5)
        brush.line(
            [
                (x - s, y - s * 0.5),
                (x - s * 0.4, y - s * 0.6),
                (x, y),
                (x + s * 0.4, y - s * 0.6),
                (x + s, y - s * 0.5),
            ],
            (84, 94, 104),
            1,
        )
    far, near = (104, 164, 172), (28, 88, 108)
    brush.box(0, HORIZON, CANVAS, CANVAS, far)
    y, step = HORIZON + 1, 5.0
    while y < CANVAS + 30:
        t = min(1.0, (y - HORIZON) / 170)
        length = 12 + 30 * t
        shift = brush.between(0, length)
        colour = mix(far, near, t)
        height = length * 0.26

        def crest(
            x: float, y: float = y, length: float = length, shift: float = shift, height: float = height
        ) -> float:
            return y - height * abs(math.sin(math.pi * (x + shift) / length)) ** 0.8

        brush.line(
            [(x, crest(x) - 0.6) for x in np.arange(-4, CANVAS + 4, 2.0)],
            mix(colour, (226, 240, 240), 0.62),
            1 + 1.2 * t,
        )
        points = [(float(x), crest(float(x))) for x in np.arange(-4, CANVAS + 5, 2.0)]
        brush.polygon(
            [*points, (CANVAS + 4, CANVAS + 4), (-4, CANVAS + 4)], mix(colour, (10, 60, 84), brush.between(0, 0.16))
        )
        y += step
        step = min(17.0, step * 1.18)
    return brush


def _hills(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (158, 198, 222), (226, 232, 216))
    brush.sky(HORIZON - 12, (244, 246, 244), (206, 218, 224), 8, 15)
    y, step, i = HORIZON - 6.0, 22.0, 0
    while y < CANVAS + 40:
        t = min(1.0, (y - HORIZON + 6) / 200)
        base = mix((160, 190, 140), (74, 122, 58), t)
        colour = mix(base, (188, 186, 92) if i % 2 else (54, 100, 62), 0.3)
        skyline = brush.ridge(y, 9 + 5 * t, 130 + 70 * t)
        brush.fill_below(skyline, colour)
        if i % 3 == 1:  # furrows follow the hill
            for k in range(1, 6):
                brush.line(
                    [(x, skyline(x) + k * (3 + 2.2 * t)) for x in range(-2, CANVAS + 4, 4)],
                    mix(colour, (60, 84, 40), 0.3),
                    1,
                )
        for _ in range(round(9 - 3 * t)):
            x = brush.between(0, CANVAS)
            r = (3.2 + 4 * t) * brush.between(0.7, 1.2)
            top = skyline(x) + brush.between(0, step * 0.5)
            dark = mix(colour, (24, 62, 40), 0.6)
            brush.ellipse(x, top - r * 0.5, r, r * 0.95, dark)
            brush.ellipse(x - r * 0.25, top - r * 0.8, r * 0.55, r * 0.5, mix(dark, (150, 180, 90), 0.3))
        y, step, i = y + step, step * 1.13, i + 1
    return brush


def _desert(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (206, 196, 178), (238, 218, 178))
    for x, y in brush.scatter(44, 6, HORIZON - 20):  # streaks of haze
        brush.ellipse(
            x,
            y,
            brush.between(16, 30),
            brush.between(1.5, 3),
            mix((238, 222, 190), (190, 172, 150), brush.between(0, 0.8)),
        )
    brush.ellipse(brush.between(130, 254), brush.between(50, 110), 15, 15, (252, 240, 206))
    for i in range(3):
        x = (i + brush.between(0.2, 0.8)) * CANVAS / 3
        s = brush.between(22, 40)
        brush.polygon([(x, HORIZON - s), (x - s * 1.1, HORIZON + 8), (x + s * 0.3, HORIZON + 8)], (214, 176, 122))
        brush.polygon([(x, HORIZON - s), (x + s * 0.3, HORIZON + 8), (x + s * 1.0, HORIZON + 8)], (160, 122, 84))
    y, step = HORIZON, 17.0
    while y < CANVAS + 30:
        t = min(1.0, (y - HORIZON) / 200)
        skyline = brush.ridge(y, 7 + 5 * t, 140 + 60 * t, 0.35)
        colour = mix((226, 190, 136), (190, 140, 86), t * 0.8 + brush.between(0, 0.2))
        brush.fill_below(skyline, mix(colour, (120, 82, 56), 0.34))
        phase, wave = brush.between(0, 6.28), brush.between(80, 130)

        def lit(
            x: float,
            skyline: Callable[[float], float] = skyline,
            phase: float = phase,
            wave: float = wave,
            t: float = t,
        ) -> float:
            return skyline(x) + (4 + 4 * t) * (1 + math.sin(2 * math.pi * x / wave + phase))

        brush.fill_below(lit, colour)
        for k in range(1, 5):
            ripple = [(x, lit(x) + k * (3.2 + 2 * t) + math.sin(x * 0.35 + k)) for x in np.arange(-2, CANVAS + 4, 3.0)]
            brush.line(ripple, mix(colour, (140, 98, 62), 0.3), 0.8)
        for _ in range(4):
            x, r = brush.between(0, CANVAS), brush.between(1.6, 3.2) * (1 + t)
            top = lit(x) + brush.between(2, step)
            brush.ellipse(x, top, r * 1.3, r * 0.8, (118, 88, 68))
        y, step = y + step, step * 1.14
    return brush


def _night(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (14, 18, 46), (42, 46, 92))
    for x, y in brush.scatter(56):  # haze between the stars
        brush.ellipse(
            x, y, brush.between(18, 34), brush.between(6, 14), mix((28, 32, 70), (56, 54, 104), brush.between(0, 1))
        )
    moon_x, moon_y = brush.between(140, 244), brush.between(150, 200)
    for radius, glow in ((30, (52, 56, 100)), (24, (70, 72, 112)), (18, (228, 222, 190))):
        brush.ellipse(moon_x, moon_y, radius, radius, glow)
    for dx, dy, r in ((-6, -4, 4), (5, 3, 5), (-2, 8, 2.5), (7, -8, 2)):
        brush.ellipse(moon_x + dx, moon_y + dy, r, r, (200, 192, 160))
    for x, y in brush.scatter(13):
        s = 0.5 + 1.5 * brush.between(0, 1) ** 3
        tint = mix((236, 236, 220), (180, 200, 244), brush.between(0, 1))
        if math.hypot(x - moon_x, y - moon_y) < 26:
            continue
        if s > 1.1:
            r = 2.6 * s
            brush.polygon(
                [
                    (x, y - r),
                    (x + s * 0.6, y - s * 0.6),
                    (x + r, y),
                    (x + s * 0.6, y + s * 0.6),
                    (x, y + r),
                    (x - s * 0.6, y + s * 0.6),
                    (x - r, y),
                    (x - s * 0.6, y - s * 0.6),
                ],
                tint,
            )
        else:
            brush.ellipse(x, y, s, s, tint)
    return brush


def _street(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (150, 150, 150), (150, 150, 150))
    walls: list[Colour] = [
        (168, 124, 104),
        (150, 146, 128),
        (122, 134, 146),
        (176, 158, 124),
        (136, 112, 120),
        (126, 142, 122),
    ]

    def fronts(top: float, bottom: float) -> None:
        x = -brush.between(0, 40)
        while x < CANVAS:
            width = brush.between(52, 78)
            wall = walls[int(rng.integers(len(walls)))]
            brush.box(x, top, x + width, bottom, wall)
            brush.box(x, top, x + width, top + 5, mix(wall, (60, 54, 54), 0.5))
            brush.box(x, top, x + 1.5, bottom, mix(wall, (40, 36, 36), 0.6))
            columns = max(2, round(width / 24))
            floors = max(1, int((bottom - top - 48) // 30))
            for floor in range(floors):
                for column in range(columns):
                    wx, wy = x + (column + 0.5) * width / columns - 6, top + 12 + floor * 30
                    brush.box(wx - 1.5, wy - 1.5, wx + 13.5, wy + 19.5, mix(wall, (236, 230, 216), 0.6))
                    brush.box(wx, wy, wx + 12, wy + 18, (70, 88, 104))
                    brush.polygon([(wx, wy + 12), (wx, wy), (wx + 8, wy)], (118, 140, 152))
            awning = mix(walls[int(rng.integers(len(walls)))], (110, 50, 50), 0.4)
            for k in range(8):
                piece = width / 8
                brush.box(
                    x + 2 + k * (piece - 0.5),
                    bottom - 36,
                    x + 2 + (k + 1) * (piece - 0.5),
                    bottom - 27,
                    awning if k % 2 else (214, 206, 190),
                )
            brush.box(x + 6, bottom - 26, x + width - 24, bottom - 6, (66, 80, 92))
            brush.polygon([(x + 6, bottom - 10), (x + 6, bottom - 26), (x + 22, bottom - 26)], (112, 132, 142))
            brush.box(x + width - 18, bottom - 26, x + width - 6, bottom, mix(wall, (50, 40, 36), 0.7))
            x += width

    def pavement(top: float, bottom: float) -> None:
        brush.box(0, top, CANVAS, bottom, (166, 160, 152))
        x = -brush.between(0, 16)
        while x < CANVAS:
            brush.line([(x, top), (x - 5, bottom)], (134, 128, 122), 1)
            x += 17
        brush.line([(0, (top + bottom) / 2), (CANVAS, (top + bottom) / 2)], (134, 128, 122), 1)
        brush.box(0, bottom, CANVAS, bottom + 3, (204, 198, 188))
        brush.box(0, bottom + 3, CANVAS, bottom + 6, (104, 100, 100))

    def road(top: float, bottom: float) -> None:
        brush.box(0, top, CANVAS, bottom, (92, 92, 98))
        for x, y in brush.scatter(9, top + 4, bottom - 4):
            brush.ellipse(x, y, brush.between(0.6, 2.4), 0.7, mix((76, 76, 82), (116, 116, 120), brush.between(0, 1)))
        x, middle = -brush.between(0, 30), (top + bottom) / 2
        while x < CANVAS:
            brush.polygon(
                [(x, middle - 2.2), (x + 20, middle - 2.2), (x + 19, middle + 2.2), (x - 1, middle + 2.2)],
                (222, 214, 180),
            )
            x += 34
        x = brush.between(110, 250)
        for k in range(6):  # a crossing
            y = top + 6 + k * (bottom - top - 8) / 6
            brush.polygon([(x, y), (x + 30, y), (x + 28, y + 6), (x - 2, y + 6)], (226, 224, 216))

    fronts(-20, 84)
    fronts(50, 168)
    pavement(168, 190)
    road(196, 262)
    pavement(262, 284)
    fronts(290, CANVAS + 20)
    return brush


def _pine(brush: Brush, x: float, y: float, height: float, colour: Colour, tip: Colour | None = None) -> None:
    brush.box(x - height * 0.04, y - height * 0.12, x + height * 0.04, y, mix(colour, (66, 46, 34), 0.6))
    for k, (low, high, wide) in enumerate(((0.1, 0.5, 0.3), (0.34, 0.74, 0.23), (0.58, 1.0, 0.16))):
        points = [(x - wide * height, y - low * height), (x, y - high * height), (x + wide * height, y - low * height)]
        brush.polygon(points, mix(colour, (255, 255, 255), 0.04 * k))
        shade = [
            (x, y - high * height),
            (x + wide * height, y - low * height),
            (x + wide * height * 0.2, y - low * height),
        ]
        brush.polygon(shade, mix(colour, (0, 10, 10), 0.25))
        if tip is not None:
            middle = low + (high - low) * 0.5
            cap = [
                (x - wide * height * 0.55, y - middle * height),
                (x, y - high * height),
                (x + wide * height * 0.55, y - middle * height),
            ]
            brush.polygon(cap, tip)


def _forest(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (190, 210, 200), (96, 128, 104))
    rows = 12
    for i in range(rows):
        t = i / (rows - 1)
        y = 44 + (CANVAS + 20) * t**1.05
        colour = mix((150, 182, 164), (46, 96, 62), min(1.0, t * 1.35) ** 0.8)
        skyline = brush.ridge(y - 4, 4, 120)
        brush.fill_below(skyline, mix(colour, (150, 168, 104), 0.5))
        x = -brush.between(0, 20)
        while x < CANVAS + 20:
            height = (34 + 30 * min(1.0, t * 1.3)) * brush.between(0.75, 1.2)
            tone = mix(colour, (34, 74, 58) if brush.between(0, 1) < 0.5 else (120, 150, 76), brush.between(0.05, 0.4))
            _pine(brush, x, skyline(x) + brush.between(-2, 4), height, tone)
            x += height * brush.between(0.34, 0.62)
    return brush


def _snow(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (140, 154, 178), (196, 204, 218))
    y, step, i = HORIZON - 30.0, 24.0, 0
    while y < CANVAS + 40:
        t = min(1.0, (y - HORIZON + 30) / 220)
        skyline = brush.ridge(y, 8 + 4 * t, 150)
        colour = mix((206, 214, 228), (226, 230, 238), t)
        brush.fill_below(skyline, mix(colour, (150, 166, 198), 0.55 if i % 2 else 0.25))
        shift = 5 + 3 * t

        def bright(x: float, skyline: Callable[[float], float] = skyline, shift: float = shift) -> float:
            return skyline(x) + shift * (1.2 + math.sin(x * 0.045 + shift))

        brush.fill_below(bright, colour)
        x = brush.between(0, 40)
        while x < CANVAS:
            height = (16 + 18 * t) * brush.between(0.7, 1.25)
            _pine(
                brush,
                x,
                skyline(x) + brush.between(2, step * 0.6),
                height,
                mix((92, 116, 128), (54, 84, 92), t),
                (236, 240, 246),
            )
            x += brush.between(24, 52) + 10 * t
        y, step, i = y + step, step * 1.1, i + 1
    for x, y in brush.scatter(15):
        r = 0.7 + 1.3 * brush.between(0, 1) ** 2
        brush.ellipse(x, y, r, r, (248, 250, 252))
    return brush


def _clouds(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (96, 146, 196), (152, 190, 220))
    for x, y in brush.scatter(52):
        size = brush.between(13, 25)
        brush.cloud(x, y, size, (238, 241, 245), mix((188, 204, 222), (168, 186, 210), brush.between(0, 1)))
    return brush


def _meadow(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (134, 164, 84), (92, 134, 62))
    for x, y in brush.scatter(30):
        brush.ellipse(
            x, y, brush.between(12, 22), brush.between(5, 9), mix((112, 150, 70), (146, 172, 90), brush.between(0, 1))
        )
    for x, y in brush.scatter(9.5):
        h = brush.between(4, 8)
        tone = mix((70, 112, 48), (164, 190, 102), brush.between(0, 1))
        for lean in (-0.5, 0.0, 0.5):
            brush.polygon([(x - 0.9, y), (x + lean * h, y - h), (x + 0.9, y)], tone)
    petals: list[Colour] = [(240, 234, 222), (226, 190, 112), (214, 150, 164), (180, 160, 206)]
    for x, y in brush.scatter(24):
        tone, r = petals[int(rng.integers(len(petals)))], brush.between(1.7, 2.7)
        brush.line([(x, y), (x + 0.5, y + 7)], (64, 100, 48), 1)
        for k in range(5):
            angle = 2 * math.pi * k / 5
            brush.ellipse(x + r * 1.1 * math.cos(angle), y + r * 1.1 * math.sin(angle), r * 0.8, r * 0.8, tone)
        brush.ellipse(x, y, r * 0.7, r * 0.7, (196, 148, 64))
    return brush


def _city(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (116, 118, 158), (232, 188, 164))
    brush.sky(HORIZON - 40, (196, 170, 182), (150, 140, 172), 8, 14)
    for i in range(7):
        t = i / 6
        base = HORIZON + 30 + 44 * i
        colour = mix((150, 134, 160), (48, 50, 78), t**0.6)
        x = -brush.between(0, 20)
        while x < CANVAS:
            width, height = brush.between(20, 38) * (0.8 + 0.4 * t), brush.between(34, 92) * (0.8 + 0.3 * t)
            wall, top = mix(colour, (118, 96, 120), brush.between(0, 0.3)), base - height
            brush.box(x, top, x + width, CANVAS, wall)
            brush.box(x + width * 0.72, top, x + width, CANVAS, mix(wall, (20, 20, 40), 0.22))
            if brush.between(0, 1) < 0.35:
                brush.box(x + width * 0.45, top - 9, x + width * 0.45 + 1.5, top, wall)
            elif brush.between(0, 1) < 0.4:
                brush.polygon([(x, top), (x + width / 2, top - 8), (x + width, top)], wall)
            wy = top + 5
            while wy < base + 40:
                wx = x + 3.5
                while wx < x + width - 5:
                    lit = brush.between(0, 1) < 0.55
                    brush.box(
                        wx,
                        wy,
                        wx + 3.4,
                        wy + 4.6,
                        mix((236, 204, 128), wall, 0.15 + 0.4 * (1 - t)) if lit else mix(wall, (24, 26, 50), 0.35),
                    )
                    wx += 6.6
                wy += 8.6
            x += width + brush.between(-1, 3)
    return brush


def _mountains(rng: np.random.Generator) -> Brush:
    brush = Brush(rng, (154, 172, 206), (226, 216, 220))
    brush.sky(HORIZON - 40, (240, 238, 242), (204, 206, 222), 7, 14)
    for i in range(7):
        t = i / 6
        base = HORIZON + 24 + 42 * i
        colour = mix((142, 150, 178), (62, 72, 90), min(1.0, t * 1.2))
        x = -brush.between(20, 60)
        peaks = []
        while x < CANVAS + 50:
            peaks.append((x, base - brush.between(38, 66), brush.between(44, 66)))
            x += brush.between(44, 68)
        for x, top, half in peaks:
            height = base + 34 - top
            wide = half * height / 70

            def side(
                share: float, sign: float, x: float = x, top: float = top, height: float = height, wide: float = wide
            ) -> tuple[float, float]:
                return x + sign * wide * share, top + height * share

            brush.polygon([(x, top), side(1, -1), side(1, 1)], colour)
            brush.polygon(
                [(x, top), side(1, 1), (x + wide * 0.12, top + height), (x - wide * 0.06, top + height * 0.5)],
                mix(colour, (24, 28, 46), 0.36),
            )
            snow = brush.between(0.24, 0.36)
            cap = [
                (x, top),
                side(snow, -1),
                (x - wide * snow * 0.45, top + height * snow * 0.8),
                (x - wide * snow * 0.1, top + height * snow * 1.15),
                (x + wide * snow * 0.4, top + height * snow * 0.75),
                side(snow, 1),
            ]
            brush.polygon(cap, (236, 238, 244))
            brush.polygon(
                [
                    (x, top),
                    (x - wide * snow * 0.04, top + height * snow * 0.8),
                    (x + wide * snow * 0.4, top + height * snow * 0.75),
                    side(snow, 1),
                ],
                (188, 198, 220),
            )
        x = 0.0
        while x < CANVAS:  # a line of trees at the foot
            _pine(
                brush, x, base + 30 + brush.between(-4, 4), brush.between(9, 15), mix((96, 120, 118), (40, 66, 60), t)
            )
            x += brush.between(8, 18)
    return brush


_TONES: tuple[tuple[Colour, Colour], ...] = (
    ((206, 198, 184), (98, 92, 92)),
    ((188, 178, 158), (84, 104, 96)),
    ((176, 186, 196), (70, 80, 104)),
    ((204, 186, 178), (116, 78, 84)),
    ((182, 194, 170), (92, 100, 70)),
    ((190, 180, 200), (84, 72, 106)),
    ((214, 204, 170), (128, 104, 74)),
    ((160, 180, 178), (54, 76, 82)),
)
"""Pairs of muted tones for the patterns: light and dark."""


def _bricks(rng: np.random.Generator) -> Brush:
    mortar: Colour = (188, 178, 166)
    brush = Brush(rng, mortar, mortar)
    base: Colour = [(158, 96, 78), (140, 106, 90), (150, 88, 80), (128, 100, 92)][int(rng.integers(4))]
    wide, high = brush.between(26, 34), brush.between(12, 15)
    for row in range(-1, int(CANVAS / high) + 2):
        for column in range(-1, int(CANVAS / wide) + 2):
            x, y = (column + 0.5 * (row % 2)) * wide, row * high
            tone = mix(base, (84, 58, 54) if brush.between(0, 1) < 0.5 else (196, 146, 120), brush.between(0, 0.45))
            brush.box(x + 1, y + 1, x + wide - 1, y + high - 1, tone)
            brush.box(x + 1, y + 1, x + wide - 1, y + 2.2, mix(tone, (236, 214, 196), 0.3))
            brush.box(x + 1, y + high - 2.4, x + wide - 1, y + high - 1, mix(tone, (40, 26, 26), 0.3))
    return brush


def _turned(x: float, y: float, angle: float) -> tuple[float, float]:
    half = CANVAS / 2
    return half + x * math.cos(angle) - y * math.sin(angle), half + x * math.sin(angle) + y * math.cos(angle)


def _checkerboard(rng: np.random.Generator) -> Brush:
    light, dark = _TONES[int(rng.integers(len(_TONES)))]
    brush = Brush(rng, light, light)
    side, angle = brush.between(17, 27), brush.between(-0.5, 0.5)
    count = int(CANVAS / side) + 1
    for i in range(-count, count):
        for j in range(-count, count):
            tone = mix(dark if (i + j) % 2 else light, (128, 128, 128), brush.between(0, 0.14))
            corners = ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))
            brush.polygon([_turned(a * side, b * side, angle) for a, b in corners], tone)
    return brush


def _stripes(rng: np.random.Generator) -> Brush:
    light, dark = _TONES[int(rng.integers(len(_TONES)))]
    brush = Brush(rng, light, light)
    angle = brush.between(0.35, 1.25) * (1 if rng.random() < 0.5 else -1)
    x = -CANVAS * 0.8
    while x < CANVAS * 0.8:
        width = brush.between(9, 22)  # uneven, so that no shift looks like another
        tone = mix(dark, light, brush.between(0, 0.25))
        corners = ((x, -300), (x + width, -300), (x + width, 300), (x, 300))
        brush.polygon([_turned(a, b, angle) for a, b in corners], tone)
        # Dashes along the light stripes show movement along them.
        gap, y = brush.between(10, 18), -300 + brush.between(0, 40)
        while y < 300:
            dash = (
                (x + width + gap * 0.4, y),
                (x + width + gap * 0.6, y),
                (x + width + gap * 0.6, y + 12),
                (x + width + gap * 0.4, y + 12),
            )
            brush.polygon([_turned(a, b, angle) for a, b in dash], mix(light, dark, 0.55))
            y += brush.between(24, 44)
        x += width + gap
    return brush


def _dots(rng: np.random.Generator) -> Brush:
    pair = _TONES[int(rng.integers(len(_TONES)))]
    ground, spot = pair if rng.random() < 0.4 else pair[::-1]
    brush = Brush(rng, ground, ground)
    step, angle = brush.between(24, 32), brush.between(-0.6, 0.6)
    count = int(CANVAS / step) + 1
    for i in range(-count, count):
        for j in range(-count, count):
            x, y = _turned((i + 0.5 * (j % 2)) * step, j * step * 0.87, angle)
            r = step * brush.between(0.2, 0.34)
            brush.ellipse(x, y, r, r, mix(spot, ground, brush.between(0, 0.3)))
    return brush


def _wood(rng: np.random.Generator) -> Brush:
    base: Colour = [(172, 130, 88), (150, 110, 74), (186, 150, 108), (134, 98, 72)][int(rng.integers(4))]
    brush = Brush(rng, base, base)
    high = brush.between(26, 36)
    for row in range(int(CANVAS / high) + 1):
        x, y = -brush.between(0, 90), row * high
        while x < CANVAS:
            length = brush.between(80, 140)
            tone = mix(base, (104, 72, 48) if brush.between(0, 1) < 0.5 else (214, 178, 134), brush.between(0, 0.35))
            brush.box(x, y, x + length, y + high, tone)
            bumps = [
                (brush.between(0.2, 0.8) * length, brush.between(0.3, 0.7) * high)
                for _ in range(1 if brush.between(0, 1) < 0.6 else 0)
            ]
            for k in range(1, 6):
                level, phase = k * high / 6, brush.between(0, 6)
                grain = []
                for along in np.arange(0, length, 3.0):
                    bend = 1.1 * math.sin(along * 0.07 + phase)
                    for bx, by in bumps:
                        bend += math.copysign(5.0, level - by) * math.exp(
                            -(((along - bx) / 9) ** 2) - ((level - by) / 9) ** 2
                        )
                    grain.append((x + along, y + level + bend))
                brush.line(grain, mix(tone, (82, 54, 36), 0.42), 0.9)
            for bx, by in bumps:
                brush.ellipse(x + bx, y + by, 4, 2.6, mix(tone, (70, 44, 30), 0.6))
                brush.ellipse(x + bx, y + by, 2, 1.2, mix(tone, (50, 30, 20), 0.8))
            brush.box(x + length - 1.2, y, x + length, y + high, (74, 50, 36))
            x += length
        brush.box(0, y + high - 1.4, CANVAS, y + high, (74, 50, 36))
    return brush


_PAINTERS: dict[str, Callable[[np.random.Generator], Brush]] = {
    "sea": _sea,
    "hills": _hills,
    "desert": _desert,
    "night": _night,
    "street": _street,
    "forest": _forest,
    "snow": _snow,
    "clouds": _clouds,
    "meadow": _meadow,
    "city": _city,
    "mountains": _mountains,
    "bricks": _bricks,
    "checkerboard": _checkerboard,
    "stripes": _stripes,
    "dots": _dots,
    "wood": _wood,
}


def paint(scene: str, variant: int) -> np.ndarray:
    """One canvas: (CANVAS, CANVAS, 3) uint8; always the same for the same variant."""
    return _PAINTERS[scene](np.random.default_rng([SCENES.index(scene), variant])).done()


def paint_scenes(variants: int) -> Tensor:
    """Every scene in `variants` versions: (scenes, variants, 3, CANVAS, CANVAS) float in [0, 1]."""
    canvases = np.stack([np.stack([paint(scene, v) for v in range(variants)]) for scene in SCENES])
    return torch.from_numpy(canvases).permute(0, 1, 4, 2, 3).float() / 255
