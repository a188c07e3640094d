"""Shapes as polygons: float [points, 2] with x to the right and y down, within the unit circle."""

from __future__ import annotations

import numpy as np


def _arc(start: float, stop: float, points: int = 40, radius: float = 1.0) -> np.ndarray:
    angles = np.radians(np.linspace(start, stop, points))
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _regular(corners: int, start: float) -> np.ndarray:
    return _arc(start, start + 360, corners + 1)[:-1]


def _star() -> np.ndarray:
    points = _regular(10, -90)
    points[1::2] *= 0.42
    return points


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 60)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2], 1) / 17.5


def _crescent_edge() -> np.ndarray:
    corner = _arc(310, 310, 1)[0]  # the upper tip; the edge bows to the left between the tips
    y = np.linspace(corner[1], -corner[1], 40)
    x = corner[0] - 0.85 * np.sqrt(1 - (y / corner[1]) ** 2)
    return np.stack([x, y], 1)


def _cross() -> np.ndarray:
    w = 0.3
    quarter = np.array([(w, -0.95), (w, -w), (0.95, -w)])
    turn = np.array([[0, 1], [-1, 0]])  # a quarter turn, from the upper right downwards
    parts = [quarter]
    for _ in range(3):
        parts.append(parts[-1] @ turn)
    return np.concatenate(parts)


_POLYGONS = {
    "circle": _arc(0, 360, 60) * 0.9,
    "square": np.array([(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)]),
    "triangle": _regular(3, -90),
    "diamond": np.array([(0, -1), (0.55, 0), (0, 1), (-0.55, 0)]),
    "cross": _cross(),
    "ring": np.concatenate([_arc(0, 360, 60) * 0.95, _arc(360, 0, 60) * 0.58]),
    "star": _star(),
    "heart": _heart(),
    "moon": np.concatenate([_arc(50, 310), _crescent_edge()]),
    "arrow": np.array(
        [(1, 0), (0.2, -0.7), (0.2, -0.28), (-0.95, -0.28), (-0.95, 0.28), (0.2, 0.28), (0.2, 0.7)]
    ),
    "hexagon": _regular(6, 0) * 0.95,
    "house": np.array([(-0.62, 0.75), (-0.62, -0.1), (0, -0.9), (0.62, -0.1), (0.62, 0.75)]),
}


def outline(shape: str, x: float, y: float, radius: float, angle: float) -> list[tuple[float, ...]]:
    """The corners of a shape around (x, y), turned by `angle` degrees clockwise."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    points = radius * _POLYGONS[shape] @ np.array([[c, s], [-s, c]]) + (x, y)
    return [tuple(point) for point in points]
