"""A surface of triangles: closed, facing outwards, with the volume and area of what it surrounds."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from cryoiso.report.mesh import Mesh, packed, surface_mesh


def volume_and_area(mesh: Mesh) -> tuple[float, float]:
    a, b, c = (mesh.vertices[mesh.triangles[:, i]] for i in range(3))
    volume = np.einsum("ij,ij->i", a - a.mean(0), np.cross(b - a.mean(0), c - a.mean(0))).sum() / 6
    return float(volume), float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def edges_of(mesh: Mesh) -> np.ndarray:
    pairs = np.concatenate([mesh.triangles[:, p] for p in ([0, 1], [1, 2], [2, 0])])
    return np.unique(np.sort(pairs, 1), axis=0, return_counts=True)[1]


@pytest.mark.parametrize("stretch", ((1, 1, 1), (1.5, 1, 0.8)))
def test_an_ellipsoid(stretch):
    z, y, x = np.mgrid[:40, :40, :40] - 19.5
    mesh = surface_mesh(10 - np.sqrt((x / stretch[0]) ** 2 + (y / stretch[1]) ** 2 + (z / stretch[2]) ** 2), 0.0)
    volume, area = volume_and_area(mesh)
    assert volume == pytest.approx(4 / 3 * np.pi * 1000 * np.prod(stretch), rel=0.02), "positive: facing outwards"
    if stretch == (1, 1, 1):
        assert area == pytest.approx(4 * np.pi * 100, rel=0.02)
    counts = edges_of(mesh)
    assert set(counts) == {2} and len(mesh.vertices) - len(counts) + len(mesh.triangles) == 2
    extent = np.ptp(mesh.vertices, axis=0)
    assert np.allclose(extent, 20 * np.array(stretch), atol=0.5), "x, y, z of the map"


def test_what_reaches_the_border_is_closed_and_nothing_has_no_triangles():
    mesh = surface_mesh(np.ones((6, 6, 6)), 0.5)
    assert set(edges_of(mesh)) == {2} and volume_and_area(mesh)[0] > 100
    assert len(surface_mesh(np.zeros((6, 6, 6)), 0.5).triangles) == 0


def test_packing_keeps_places_and_values():
    z, y, x = np.mgrid[:20, :20, :20] - 9.5
    mesh = surface_mesh(7 - np.sqrt(x**2 + y**2 + z**2), 0.0)
    values = np.linspace(0, 1, len(mesh.vertices))
    values[3] = np.nan
    found = packed(mesh, values)
    raw = np.frombuffer(base64.b64decode(found["vertices"]), "<u2").reshape(-1, 3)
    assert np.allclose(raw / 65535 * found["scale"], mesh.vertices - mesh.vertices.min(0), atol=1e-3)
    shown = np.frombuffer(base64.b64decode(found["values"]), "u1")
    assert shown[3] == 255 and np.allclose(np.delete(shown / 254, 3), np.delete(values, 3), atol=0.003)
    triangles = np.frombuffer(base64.b64decode(found["triangles"]), "<u4").reshape(-1, 3)
    assert np.array_equal(triangles, mesh.triangles) and (found["n"], found["m"]) == (len(raw), len(triangles))
