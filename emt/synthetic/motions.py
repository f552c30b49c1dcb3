"""Motions of the rendered world: families of object and camera motion, drawn in batches.

Coordinates are those of a 128-pixel frame, x to the right, y down, the frame spanning [0, 128] with its centre at
(64, 64); the centre of the top-left pixel is (0.5, 0.5). Angles are radians and positive clockwise on the screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

FRAME = 128.0
"""Side of the frame in which motions are expressed, in pixels."""

FAMILIES: tuple[str, ...] = (
    "still",
    "line",
    "arc",
    "bounce",
    "zigzag",
    "orbit",
    "grow",
    "shrink",
    "spin",
    "stop-and-go",
    "sway",
    "jump",
    "walk",
    "spline",
)
"""Families of object motion to train on. `still` is drawn only where the camera moves."""

HELD_OUT_FAMILIES: tuple[str, ...] = ("figure-eight", "spiral", "rectangle", "pendulum")
"""Families of object motion that training never draws."""

CAMERA_FAMILIES: tuple[str, ...] = ("static", "pan", "zoom", "roll", "shake", "pan-zoom", "zoom-roll", "drift")
"""Families of camera motion to train on; `static` does not move."""

HELD_OUT_CAMERA_FAMILIES: tuple[str, ...] = ("circle", "dolly", "pan-roll")
"""Families of camera motion that training never draws."""

_WEIGHTS = {"spline": 4.0, "still": 2.0, "line": 1.5, "orbit": 1.5}
_CAMERA_WEIGHTS = {"static": 0.0, "pan": 1.5, "drift": 2.0, "roll": 1.5, "zoom": 1.5, "shake": 0.7}
_STATIONARY = ("still", "grow", "shrink", "spin")
_UPRIGHT = ("still", "bounce", "sway", "jump", "walk", "rectangle", "pendulum")
_CANDIDATES = 24
_TOLERANCE = 6.0  # pixels
_APART = 22.0  # pixels between two subjects across, at the start


@dataclass
class Motions:
    """A batch of motions, without any appearance; every tensor has the clips as its first dimension.

    Attributes:
        position: (n, frames, 2 subjects, 2) centre of each subject on the screen, x and y in pixels of a 128 frame. Of
            two subjects the first is the one that starts further left; captions name it first.
        scale: (n, frames, 2) side of each subject's sprite on the screen in pixels; 0 for an absent second subject.
        rotation: (n, frames, 2) radians, clockwise on the screen, 0 is upright.
        subjects: (n,) how many subjects the clip has, 1 or 2.
        camera: (n, frames, 4) pan x, pan y, log zoom and roll relative to frame 0. A point of the scene seen at `p` in
            frame 0 is seen at `c + pan + exp(zoom) * R(roll) @ (p - c)` with `c` the centre of the frame.
        family: (n, 2) index into `FAMILIES + HELD_OUT_FAMILIES`; -1 for an absent second subject.
        camera_family: (n,) index into `CAMERA_FAMILIES + HELD_OUT_CAMERA_FAMILIES`.
        attached: (n,) whether the subjects stand in the scene and so move with it; else the camera leaves them alone.
    """

    position: Tensor
    scale: Tensor
    rotation: Tensor
    subjects: Tensor
    camera: Tensor
    family: Tensor
    camera_family: Tensor
    attached: Tensor

    def __len__(self) -> int:
        return self.position.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> Motions:
        """The clips that `index` selects along the first dimension: a slice, a mask or a list of numbers."""
        return Motions(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Motions:
        """A copy with every tensor on `device`."""
        return Motions(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def displacements(self, side: int) -> Tensor:
        """From each place to where what it sees was in frame 0: (n, frames, 2, side, side), x and y in pixels.

        A place is the centre of a cell of a grid of `side` by `side` over the frame. Where subjects are, discs of four
        fifths of their sprites, it sees them, the second above the first; elsewhere the scene.
        """
        x, y = places(side, self.camera.device)
        pan_x, pan_y, zoom, roll = (part[..., None, None] for part in self.camera.unbind(-1))
        found = torch.stack(turned(x - pan_x, y - pan_y, -roll, torch.exp(-zoom)), 2)
        for i in range(2):
            centre_x, centre_y = (part[:, :, i, None, None] - FRAME / 2 for part in self.position.unbind(-1))
            scale, rotation = self.scale[:, :, i, None, None], self.rotation[:, :, i, None, None]
            growth = scale[:, :1] / scale.clamp(min=1.0)
            was_x, was_y = turned(x - centre_x, y - centre_y, rotation[:, :1] - rotation, growth)
            was = torch.stack([was_x + centre_x[:, :1], was_y + centre_y[:, :1]], 2)
            found = torch.where(self._seen(i, side)[:, :, None], was, found)
        return found - torch.stack(torch.broadcast_tensors(x, y))

    def poses(self, side: int) -> Tensor:
        """Pose of the subject at each place: (n, frames, 4, side, side), all 0 where it sees the scene.

        Sine and cosine of its rotation, its turn since the frame before in radians, and the log of its sprite's side
        in quarters of the frame. Places are those of `displacements`.
        """
        n, frames = self.camera.shape[:2]
        found = self.camera.new_zeros(n, frames, 4, side, side)
        for i in range(2):
            rotation, size = self.rotation[:, :, i], (self.scale[:, :, i] * (4 / FRAME)).clamp(min=0.1).log()
            turn = rotation.diff(dim=1, prepend=rotation[:, :1])
            pose = torch.stack([rotation.sin(), rotation.cos(), turn, size], 2)[..., None, None]
            found = torch.where(self._seen(i, side)[:, :, None], pose, found)
        return found

    def _seen(self, i: int, side: int) -> Tensor:
        """Return whether places see subject `i`: (n, frames, side, side)."""
        return discs(self.position[:, :, i], 0.4 * self.scale[:, :, i], side)


def places(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres of the cells of a grid over the frame, relative to its centre: x (1, side) and y (side, 1)."""
    at = (torch.arange(side, device=device) + 0.5) * (FRAME / side) - FRAME / 2
    return at[None], at[:, None]


def discs(position: Tensor, radius: Tensor, side: int) -> Tensor:
    """Which cells of a grid over the frame lie within `radius` (…) of `position` (…, 2), pixels: (…, side, side)."""
    x, y = places(side, position.device)
    centre_x, centre_y = (part[..., None, None] - FRAME / 2 for part in position.unbind(-1))
    return torch.hypot(x - centre_x, y - centre_y) < radius[..., None, None]


def shortest(turn: Tensor) -> Tensor:
    """The same turns, radians, in [−π, π)."""
    return torch.remainder(turn + math.pi, 2 * math.pi) - math.pi


def turned(x: Tensor, y: Tensor, angle: Tensor, gain: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Points turned about the origin, clockwise on the screen, and `gain` times as far from it."""
    return gain * (torch.cos(angle) * x - torch.sin(angle) * y), gain * (torch.sin(angle) * x + torch.cos(angle) * y)


def uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) drawn where `generator` lives, so that a CPU generator gives every device the same."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def choose(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` indices drawn in proportion to `weights` (k,); returns (n,) on the device of `weights`."""
    bounds = (weights / weights.sum()).cumsum(0)
    return torch.searchsorted(bounds, uniform((n,), generator, weights.device), right=True).clamp(max=len(weights) - 1)


def _profile(u: Tensor, kind: Tensor, a: Tensor) -> Tensor:
    """Progress from 0 to 1 over the clip. `u` (frames,), `kind` and `a` (…, 1) in [0, 1); returns (…, frames)."""
    smooth = u * u * (3 - 2 * u)
    power = 1.3 + 1.2 * a
    uneven = u + (0.5 * a + 0.2) * torch.sin(2 * math.pi * (u + a)) / (2 * math.pi)
    uneven = uneven - uneven[..., :1]
    uneven = uneven / uneven[..., -1:]
    out = u.expand(torch.broadcast_shapes(u.shape, kind.shape))
    out = torch.where(kind > 0.35, smooth, out)
    out = torch.where(kind > 0.55, u**power, out)
    out = torch.where(kind > 0.7, 1 - (1 - u) ** power, out)
    return torch.where(kind > 0.85, uneven, out)


def _fourier(t: Tensor, r: Tensor, terms: int) -> Tensor:
    """A smooth random curve: a sum of `terms` cosines of falling amplitude. `t` (…, frames), `r` (…, 2 * terms)."""
    out = torch.zeros_like(t)
    for k in range(terms):
        phase = 2 * math.pi * r[..., 2 * k, None]
        out = out + (r[..., 2 * k + 1, None] * 2 - 1) / (k + 1) * torch.cos(math.pi * (k + 1) * t + phase)
    return out


def _triangle(t: Tensor) -> Tensor:
    """A triangle wave of period 1 between -1 and 1, -1 at 0."""
    return 1 - 4 * (torch.remainder(t, 1) - 0.5).abs()


Path = tuple[Tensor, Tensor, Tensor, Tensor]
"""x, y in arbitrary units (fitted into the frame later), log size, rotation; each (…, frames)."""


def _paths(family: str, t: Tensor, r: Tensor) -> Path:
    """The path of one family. `t` (…, frames) is progress from 0 to 1 (or back), `r` (…, 16) in [0, 1) its shape."""
    zero = torch.zeros_like(t)
    tau = 2 * math.pi * t

    def p(i: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * r[..., i, None]

    sign = torch.where(p(15) < 0.5, -1.0, 1.0)
    if family == "line":
        return t, zero, zero, zero
    if family == "arc":
        angle = p(0, 1.2, 3.6) * t
        return torch.cos(angle), torch.sin(angle) * p(1, 0.7, 1.2), zero, zero
    if family == "bounce":
        decay = torch.exp(-p(2, 0.0, 1.2) * t)
        return t * p(0, 0.6, 2.0), -torch.sin(math.pi * (p(1, 1.5, 3.2) * t + p(3))).abs() * decay, zero, zero
    if family == "zigzag":
        return t * p(0, 1.5, 3.0), _triangle(p(1, 1.25, 2.6) * t + p(2)) * 0.5, zero, zero
    if family == "orbit":
        angle = sign * tau * p(0, 0.7, 1.5) + 2 * math.pi * p(1)
        return torch.cos(angle), torch.sin(angle) * p(2, 0.45, 1.0), zero, zero
    if family in ("grow", "shrink"):
        direction = 1.0 if family == "grow" else -1.0
        return t * p(0), _fourier(t, r[..., 2:6], 2), direction * p(1, 0.5, 1.0) * (_forward(t) - 0.5), zero
    if family == "spin":
        return t * p(0), _fourier(t, r[..., 2:6], 2), zero, sign * p(1, 1.2, 6.0) * (t - p(6))
    if family == "stop-and-go":
        steps = torch.floor(p(0, 2.0, 3.999))
        inside = torch.remainder(t * steps, 1).clamp(max=1)
        moving = ((inside - 0.4) / 0.6).clamp(0, 1)
        stair = (torch.floor(t * steps) + moving * moving * (3 - 2 * moving)) / steps
        return torch.where(t >= 1, 1.0, stair), zero, zero, zero
    if family == "sway":
        angle = tau * p(0, 0.9, 2.0) + 2 * math.pi * p(1)
        return torch.sin(angle), torch.cos(angle).square() * p(2, 0.0, 0.25), zero, torch.sin(angle) * p(3, 0.0, 0.45)
    if family == "jump":
        phase = torch.remainder(t * p(0, 1.0, 2.4) + p(1, 0.0, 0.4), 1)
        air = ((phase - 0.25) / 0.65).clamp(0, 1)
        return t * p(2, 0.0, 0.8), -4 * air * (1 - air), zero, zero
    if family == "walk":
        step = math.pi * (p(0, 2.5, 4.5) * t + p(1))
        return t * 4, -torch.sin(step).abs() * p(2, 0.2, 0.5), zero, torch.sin(step) * p(3, 0.08, 0.3)
    if family == "spline":
        return _fourier(t, r[..., :8], 4), _fourier(t, r[..., 8:16], 4), zero, zero
    if family == "figure-eight":
        angle = sign * tau * p(0, 0.85, 1.15) + 2 * math.pi * p(1)
        return torch.sin(angle), torch.sin(2 * angle) * p(2, 0.35, 0.55), zero, zero
    if family == "spiral":
        angle = sign * tau * p(0, 1.2, 1.8) + 2 * math.pi * p(1)
        radius = 0.15 + 0.85 * t
        return radius * torch.cos(angle), radius * torch.sin(angle), zero, zero
    if family == "rectangle":
        side = torch.remainder(sign * t * p(0, 0.8, 1.1) + p(1), 1)
        return (
            (_triangle(side) * 2).clamp(-1, 1),
            (_triangle(side + 0.25) * 2).clamp(-1, 1) * p(2, 0.6, 1.0),
            zero,
            zero,
        )
    if family == "pendulum":
        angle = p(0, 0.5, 1.0) * torch.cos(tau * p(1, 0.8, 1.6) + 2 * math.pi * p(2))
        return -torch.sin(angle), torch.cos(angle), zero, angle
    return zero, zero, zero, zero  # still


def _forward(t: Tensor) -> Tensor:
    """Progress made to run from 0 to 1 where it was reversed, so that growing grows."""
    return torch.where(t[..., :1] > 0.5, 1 - t, t)


def _camera(family: str, u: Tensor, r: Tensor, swift: Tensor) -> Tensor:
    """The camera of one family, not yet relative to frame 0: (n, frames, 4).

    `u` (frames,), `r` (n, 24), `swift` (n,) bool: whose way is as often long as short.
    """
    n, frames = r.shape[0], u.shape[0]

    def p(i: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * r[:, i, None]

    def sign(i: int) -> Tensor:
        return torch.where(p(i) < 0.5, -1.0, 1.0)

    def far(i: int, power: float) -> Tensor:
        return torch.where(swift[:, None], p(i), p(i).pow(power))

    zero = u.new_zeros(n, frames)
    steady = _profile(u, p(0), p(1))
    swing = torch.sin(2 * math.pi * (p(2, 0.6, 1.6) * u + p(3))) * 0.5
    swinging = torch.where(p(4) < 0.25, swing, steady)
    angle = 2 * math.pi * p(5)
    pan_x, pan_y = torch.cos(angle), torch.sin(angle)
    # Mostly slow, as in footage: textures that leap from frame to frame teach a new network nothing of how they move.
    distance = 6 + 54 * far(6, 2.0)
    zoom = sign(7) * (0.06 + 0.54 * far(8, 1.5))
    roll = sign(9) * (0.06 + 0.74 * far(10, 2.0))
    t = u.expand(n, frames)
    if family == "pan":
        parts = (swinging * distance * pan_x, swinging * distance * pan_y, zero, zero)
    elif family == "zoom":
        parts = (zero, zero, steady * zoom, zero)
    elif family == "roll":
        parts = (zero, zero, zero, swinging * roll)
    elif family == "shake":
        # Tremble: cosines of 2 to 5 periods over the clip, a few pixels and a few hundredths of a radian.
        def tremble(i: int) -> Tensor:
            first = torch.sin(2 * math.pi * (p(i, 1.5, 3.0) * u + p(i + 1)))
            return first + 0.7 * torch.sin(2 * math.pi * (p(i + 1, 3.0, 5.0) * u + p(i)))

        strength = p(6, 1.5, 6.0)
        parts = (strength * tremble(11), strength * tremble(13), zero, p(8, 0.0, 0.05) * tremble(15))
    elif family == "pan-zoom":
        parts = (0.8 * distance * pan_x * steady, 0.8 * distance * pan_y * steady, 0.8 * zoom * steady, zero)
    elif family == "zoom-roll":
        parts = (zero, zero, 0.8 * zoom * steady, 0.8 * roll * steady)
    elif family == "drift":
        slow = t * p(4, 0.6, 1.2)
        x, y, z = _fourier(slow, r[:, 11:17], 3), _fourier(slow, r[:, 17:23], 3), _fourier(slow, r[:, 5:9], 2)
        reach = distance / torch.maximum(_range(x), _range(y)).clamp(min=0.5)
        zooming = torch.where(p(23) < 0.5, 0.0, 0.4 / _range(z).clamp(min=0.4))
        w = _fourier(slow, r[:, :4], 2)
        rolling = torch.where(p(9) < 0.5, 0.0, 0.7 * p(10) / _range(w).clamp(min=0.4))
        parts = (x * reach, y * reach, z * zooming, w * rolling)
    elif family == "circle":
        turn = sign(9) * 2 * math.pi * p(10, 0.7, 1.1) * steady + angle
        parts = (0.45 * distance * torch.cos(turn), 0.45 * distance * torch.sin(turn), zero, zero)
    elif family == "dolly":
        parts = (zero, zero, zoom * torch.sin(math.pi * u * p(2, 0.8, 1.5)), zero)
    elif family == "pan-roll":
        parts = (0.8 * distance * pan_x * steady, 0.8 * distance * pan_y * steady, zero, 0.8 * roll * steady)
    else:
        parts = (zero, zero, zero, zero)  # static
    return torch.stack(parts, -1)


def _range(x: Tensor) -> Tensor:
    """Largest minus smallest over the last dimension, which stays with size 1."""
    return x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)


def _draw(names: tuple[str, ...], family: Tensor, make: Callable[[str], Tensor], first: int = 0) -> Tensor:
    """For each clip the result of its own family. `family` (n, …) indices counted from `first`; `make(name)` (n, …)."""
    out = torch.zeros_like(make(names[0]))
    for i, name in enumerate(names):
        chosen = (family == i + first).reshape(family.shape + (1,) * (out.ndim - family.ndim))
        out = torch.where(chosen, make(name), out)
    return out


def _cost(path: Tensor, two: Tensor) -> Tensor:
    """By how many pixels placements leave the frame, overlap, start level or grow too large or small: (n, candidates).

    `path` stacks x, y, scale and rotation, each (n, candidates, 2, frames); `two` (n,) says whether the second counts.
    """
    x, y, scale, _ = path.unbind(0)
    reach = 0.42 * scale
    outside = torch.stack([reach - x, x + reach - FRAME, reach - y, y + reach - FRAME, scale - 88, 23 - scale])
    alone = outside.amax((0, -1)).clamp(min=0)
    gap = torch.hypot(x[:, :, 0] - x[:, :, 1], y[:, :, 0] - y[:, :, 1]) - reach.sum(2)
    start = (x[:, :, 0, 0] - x[:, :, 1, 0]).abs()
    both = alone.amax(-1) + (-gap.amin(-1)).clamp(min=0) + (_APART - start).clamp(min=0)
    return torch.where(two[:, None], both, alone[..., 0])


def draw_motions(
    n: int,
    generator: torch.Generator,
    *,
    frames: int = 16,
    held_out: bool = False,
    two_subjects: float = 0.2,
    camera: float = 0.4,
    turning: float = 0.35,
    swift: float = 0.0,
    device: torch.device | str = "cpu",
) -> Motions:
    """Draw `n` motions; the same generator state gives the same motions.

    Args:
        n: How many clips.
        generator: Source of all randomness; its device may differ from `device`.
        frames: Frames of a clip.
        held_out: Draw only families that training never draws (a static camera stays possible).
        two_subjects: Share of clips with two subjects.
        camera: Share of clips with a moving camera.
        turning: Share of subjects that also turn, whatever their family.
        swift: Share of moving cameras that go as often far as near; the others mostly move little, as in footage.
        device: Where the result lives.
    """
    device = torch.device(device)
    k = _CANDIDATES
    u = torch.linspace(0, 1, frames, device=device)
    names = HELD_OUT_FAMILIES if held_out else FAMILIES
    first = len(FAMILIES) if held_out else 0
    cameras = HELD_OUT_CAMERA_FAMILIES if held_out else CAMERA_FAMILIES
    first_camera = len(CAMERA_FAMILIES) if held_out else 0

    flags = uniform((n, 4), generator, device)
    subjects = 1 + (flags[:, 0] < two_subjects).long()
    two = subjects == 2
    moving = flags[:, 1] < camera
    attached = moving & (flags[:, 2] < 0.5)
    swiftly = flags[:, 3] < swift

    weights = torch.tensor([_WEIGHTS.get(name, 1.0) for name in names], device=device)
    family = choose(weights, 2 * n, generator).reshape(n, 2)
    if not held_out:  # with a camera at rest something else has to move
        instead = 1 + choose(weights[1:], 2 * n, generator).reshape(n, 2)
        family = torch.where((family == 0) & ~moving[:, None], instead, family)
    family = family + first
    camera_weights = torch.tensor([_CAMERA_WEIGHTS.get(name, 1.0) for name in cameras], device=device)
    camera_family = torch.where(moving, choose(camera_weights, n, generator) + first_camera, 0)
    shape = uniform((n, 24), generator, device)
    view = _draw(cameras, camera_family, lambda name: _camera(name, u, shape, swiftly), first_camera)
    view = view - view[:, :1]

    # Many placements of each path are drawn at once and the first that stays in the frame, and keeps two subjects
    # apart, is taken: no loop over clips, and no family is rejected more often than another.
    r = uniform((n, k, 2, 16), generator, device)
    s = uniform((n, k, 2, 16), generator, device)
    t = _profile(u, s[..., 0, None], s[..., 1, None])
    t = torch.where(s[..., 2, None] < 0.5, 1 - t, t)
    which = family[:, None].expand(n, k, 2)
    x, y, log_size, rotation = _draw(names, which, lambda name: torch.stack(_paths(name, t, r), -1), first).unbind(-1)

    def among(group: tuple[str, ...]) -> Tensor:
        indices = [i for i, name in enumerate(FAMILIES + HELD_OUT_FAMILIES) if name in group]
        return torch.isin(which, torch.tensor(indices, device=device))[..., None]

    def q(i: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * s[..., i, None]

    # Any direction, except where gravity gives one.
    angle = torch.where(among(_UPRIGHT), 0.0, 2 * math.pi * q(3))
    x, y = turned(x, y, angle)
    # Every family may also change its size and turn.
    log_size = log_size + torch.where(q(4) < 0.3, q(5, -0.35, 0.35) * torch.sin(math.pi * u * q(6, 0.4, 1.6)), 0.0)
    turn = q(8, -1.6, 1.6) * t + q(9, -0.25, 0.25) * torch.sin(2 * math.pi * (u + q(6)))
    rotation = rotation + torch.where((q(7) < turning) & ~among(("pendulum",)), turn, 0.0)
    lean = torch.where(among(("pendulum", "walk", "sway")), 0.0, q(10, -0.3, 0.3))
    rotation = rotation + torch.where(q(7) < 0.6, lean, 0.0)

    pair = two[:, None, None, None]
    side = torch.where(pair, q(11, 34.0, 46.0), q(11, 40.0, 64.0))
    log_size = log_size - log_size.mean(-1, keepdim=True)
    scale = (side * torch.exp(log_size)).clamp(25.0, 84.0)
    # Fit the path between margins that keep nearly all of the subject in the frame.
    margin = 0.46 * scale.amax(-1, keepdim=True)
    half_x, half_y = _range(x) / 2, _range(y) / 2
    unit = 1 / torch.maximum(half_x, half_y).clamp(min=1e-3)
    room = FRAME / 2 - margin
    follows = attached[:, None, None, None]
    reach = torch.where(pair | follows, q(12, 0.25, 0.7), q(12, 0.35, 1.0)) * room
    reach = torch.where(among(_STATIONARY), q(12, 0.0, 9.0), reach)
    x = (x - (x.amax(-1, keepdim=True) + x.amin(-1, keepdim=True)) / 2) * unit * reach
    y = (y - (y.amax(-1, keepdim=True) + y.amin(-1, keepdim=True)) / 2) * unit * reach
    x = x + FRAME / 2 + q(13, -1.0, 1.0) * (room - half_x * unit * reach)
    y = y + FRAME / 2 + q(14, -1.0, 1.0) * (room - half_y * unit * reach)

    # What stands in the scene moves, grows and turns with it.
    pan_x, pan_y, zoom, roll = (part[:, None, None] for part in view.unbind(-1))
    gain = torch.exp(zoom)
    from_x, from_y = turned(x - FRAME / 2, y - FRAME / 2, roll, gain)
    carried_x, carried_y = FRAME / 2 + pan_x + from_x, FRAME / 2 + pan_y + from_y
    free = torch.stack([x, y, scale, rotation])
    carried = torch.stack([carried_x, carried_y, scale * gain, rotation + roll])
    free_cost, carried_cost = _cost(free, two), _cost(carried, two)
    # Where no placement in the scene stays in view, the subject does not stand in the scene after all.
    attached = attached & (carried_cost.amin(1) < _TOLERANCE)
    x, y, scale, rotation = torch.where(attached[:, None, None, None], carried, free).unbind(0)
    cost = torch.where(attached[:, None], carried_cost, free_cost)
    # Among equals the first: an order that does not depend on how a device breaks ties.
    best = (cost + 1e-4 * torch.arange(k, device=device)).argmin(1)
    row = torch.arange(n, device=device)[:, None]
    # Captions alone distinguish two subjects: the first one named is the one that starts further left.
    start = x[row[:, 0], best, :, 0]  # (n, 2)
    swapped = (two & (start[:, 1] < start[:, 0])).long()
    order = torch.stack([swapped, 1 - swapped], -1)
    family = family.gather(1, order)

    def pick(value: Tensor) -> Tensor:
        return value[row, best[:, None], order].transpose(1, 2)  # (n, frames, 2)

    present = torch.stack([torch.ones_like(two), two], -1)  # (n, 2)
    return Motions(
        position=torch.where(present[:, None, :, None], torch.stack([pick(x), pick(y)], -1), FRAME / 2),
        scale=torch.where(present[:, None], pick(scale), 0.0),
        rotation=torch.where(present[:, None], pick(rotation), 0.0),
        subjects=subjects,
        camera=view,
        family=torch.where(present, family, -1),
        camera_family=camera_family,
        attached=attached,
    )
