"""What the trainings, the micelle's recovery and RELION's runs are resumed with: the same for all, or a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from micelle_helper import recover, trimer, trimers
from pipeline_helper import cryoiso_here
from pipeline_helper import simulate as simulate_files

from cryoiso.core.config import AuxiliarySection, CorrectSection, RefineSection, RelionSection
from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.identity import differences, plain, sketch_of
from cryoiso.core.protocols import RefineRequest
from cryoiso.engines.relion import engine as relion
from cryoiso.engines.relion.identity import deciding
from cryoiso.engines.relion.install import Relion
from cryoiso.io.mrc import read_map, write_map
from cryoiso.io.sources import ArraySource
from cryoiso.methods.anisotropy.settings import resolve
from cryoiso.methods.anisotropy.task import CorrectionTask
from cryoiso.methods.auxiliary.condition import Condition
from cryoiso.methods.auxiliary.settings import network, training
from cryoiso.methods.auxiliary.task import GeneratorTask
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate

BOX, PIXEL_A, N = 32, 6.0, 40


@pytest.fixture(scope="module")
def images() -> ArraySource:
    source = simulate(phantom_map(BOX, PIXEL_A, 14.0), N, snr_db=0.0, seed=5)
    return ArraySource(source.read(np.arange(N)), source.particles)


def test_a_sketch_tells_arrays_apart_and_not_their_last_bits():
    """Rounding in float32 is not seen; a mirrored, rolled or scaled map, and one voxel of a mask, are."""
    rng, volume = np.random.default_rng(1), phantom_map(BOX, PIXEL_A, 14.0).data
    noise = 1 + 1e-6 * rng.standard_normal(volume.shape)
    assert not list(differences({"map": sketch_of(volume)}, {"map": sketch_of(volume * noise)}))
    mask = (volume > 0.2 * volume.max()).astype(np.float32)
    larger = mask.copy()
    larger[0, 0, 0] = 1
    changed = [(volume, volume[:, :, ::-1]), (volume, np.roll(volume, 1, 1)), (volume, 1.01 * volume), (mask, larger)]
    for one, two in changed:
        assert list(differences({"map": sketch_of(one)}, {"map": sketch_of(two)})) == ["map differs"]
    assert sketch_of(np.zeros(5)) == sketch_of(np.zeros(5)) and list(plain(sketch_of(volume))) == ["sketch"]


# --- generators


def generator_identity(source: ArraySource, settings=None, reference=None) -> dict:
    chosen = settings or training(AuxiliarySection(preset="small"), "cpu")
    seen = Condition(reference or phantom_map(BOX, PIXEL_A, 14.0), np.ones(1))
    task = GeneratorTask(source, source.particles, np.arange(N // 2), seen, network(chosen, BOX), chosen, 1)
    return plain(task.configuration())


def test_a_generator_is_trained_on_with_the_same_particles_in_the_same_order(images):
    p, pixels, was = images.particles, images.read(np.arange(N)), generator_identity(images)
    order = np.random.default_rng(2).permutation(N // 2)
    order = np.concatenate([order, np.arange(N // 2, N)])
    reference = phantom_map(BOX, PIXEL_A, 14.0)
    cases = {
        "particles: row order differs": ArraySource(pixels[order], p.take(order)),
        "particles: offsets was none, is given": ArraySource(pixels, replace(p, shift_A=p.shift_A + 1)),
        "particles: poses differ": ArraySource(pixels, replace(p, rotation=p.rotation[:, [1, 0, 2]])),
        "particles: CTF differs": ArraySource(pixels, replace(p, phase_shift_deg=p.phase_shift_deg + 90)),
        "particles: uids differ": ArraySource(pixels, replace(p, uid=p.uid + np.uint64(1))),
        "images differ": ArraySource(2 * pixels, p),
    }
    for words, source in cases.items():
        assert list(differences(was, generator_identity(source))) == [words]
    mirrored = replace(reference, data=reference.data[:, :, ::-1].copy())
    assert "reference: density differs" in list(differences(was, generator_identity(images, reference=mirrored)))
    assert not list(differences(was, generator_identity(images)))


# --- anisotropy networks


def test_a_network_of_the_publication_is_trained_on_inside_the_same_mask():
    rng, settings = np.random.default_rng(3), resolve(CorrectSection(preset="small", method="published"), "cpu")
    volume, transfer = rng.standard_normal((BOX, BOX, BOX)).astype(np.float32), np.ones((BOX, BOX, BOX), np.float32)
    inside = np.zeros((BOX, BOX, BOX), bool)
    inside[8:24, 8:24, 8:24] = True
    other = inside.copy()
    other[8] = False
    tasks = [CorrectionTask([volume], transfer, mask, settings, 1) for mask in (inside, other, inside)]
    found = [plain(task.configuration()) for task in tasks]
    assert list(differences(found[0], found[1])) == ["maps differ"] and found[0] == found[2]


# --- the micelle


class StopsSoon(Context):
    """Stops while images are read."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 3

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_micelle_goes_on_with_the_same_images_only(tmp_path):
    """Each of these has the uids, poses and defocus values of the checkpoint, and all but one its sum of density."""
    source, _ = trimers(600)
    file = tmp_path / "micelle.npz"
    assert recover(source, comm=StopsSoon(), checkpoint_file=file).stopped
    p, pixels = source.particles, source.read(np.arange(600))
    mirrored = replace(trimer(), data=trimer().data[:, :, ::-1].copy())
    refused = [
        ({}, ArraySource(pixels, replace(p, phase_shift_deg=p.phase_shift_deg + 90)), "CTF differs"),
        ({}, ArraySource(pixels, replace(p, groups=tuple(replace(g, voltage_kV=100.0) for g in p.groups))), "optics"),
        ({}, ArraySource(pixels[::-1].copy(), p), "images differ"),
        ({"homologue": mirrored}, source, "protein differs"),
        ({"symmetry": "C1"}, source, "symmetry was C3, is C1"),
    ]
    for choice, images, words in refused:
        with pytest.raises(InputError, match=f"checkpoint is of another micelle recovery.*{words}"):
            recover(images, checkpoint_file=file, resume=True, **choice)
    assert not recover(source, checkpoint_file=file, resume=True).stopped


# --- RELION


@pytest.fixture
def without_relion(monkeypatch) -> None:
    monkeypatch.setattr(relion, "find_relion", lambda program: Relion("", "3.1.3", "", "", ""))


def prepared(source: ArraySource, folder: Path, resume: bool, program: dict | None = None, **changes) -> None:
    """What the engine does before it writes anything for RELION."""
    request = RefineRequest(
        source, phantom_map(BOX, PIXEL_A, 14.0), changes.pop("symmetry", "C3"), folder,
        RefineSection(engine="relion", **changes), seed=1, resume=resume, program=RelionSection(**(program or {})),
    )  # fmt: skip
    relion._Refinement(request, Context())._prepare_folders()


def test_relion_goes_on_with_what_it_began_with(images, tmp_path, without_relion):
    prepared(images, tmp_path, False, {"extra": "--gpu 0 --ini_high 40"})
    begun = tmp_path / "relion/run_it001_optimiser.star"
    begun.write_text("as if")
    prepared(images, tmp_path, True, {"extra": "--ini_high 40 --gpu 1:2 --pool 8", "ranks": 5}, max_iterations=40)
    order = np.random.default_rng(2).permutation(N)
    mixed = ArraySource(images.read(order), images.particles.take(order))
    cases = [
        ("particles: row order differs", mixed, {}),
        ("symmetry was C3, is D2", images, {"symmetry": "D2"}),
        ("settings: healpix_order was 2, is 3", images, {"healpix_order": 3}),
    ]
    for words, source, changes in cases:
        with pytest.raises(InputError, match=f"identity.json: the checkpoint is of another RELION run.*{words}"):
            prepared(source, tmp_path, True, {"extra": "--ini_high 40"}, **changes)
    with pytest.raises(InputError, match="relion: extra was --ini_high 40, is --ini_high 20"):
        prepared(images, tmp_path, True, {"extra": "--ini_high 20"})
    assert begun.read_text() == "as if"


@pytest.mark.parametrize("text", [None, "{", "[1]", "[" * 100_000, "\xff"])
def test_relion_does_not_go_on_where_nothing_tells_with_what(images, tmp_path, without_relion, text):
    prepared(images, tmp_path, False)
    (tmp_path / "relion/run_it001_optimiser.star").write_text("as if")
    file = tmp_path / "relion/identity.json"
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(CryoisoError, match=r"identity.json: (cannot be read|the checkpoint does not record)"):
        prepared(images, tmp_path, True)
    prepared(images, tmp_path, False)  # anew
    assert json.loads(file.read_text())["symmetry"] == "C3" and not list(tmp_path.glob("relion/run_*"))


def test_words_for_the_machine_do_not_decide():
    assert deciding("--gpu --j 4 --maxsig 500 --scratch_dir '/a b' --preread_images") == ["--maxsig", "500"]


# --- single commands


def test_a_refused_refinement_overwrites_neither_shards_nor_reference(tmp_path):
    """The particle file and the reference are compared before anything is made of them."""
    simulate_files(tmp_path, n=24)
    star, ref, out = tmp_path / "particles.star", tmp_path / "truth_map.mrc", tmp_path / "out"
    words = ("--out", out, "--healpix-order", 1, "--max-iterations", 1)
    assert cryoiso_here("refine", star, "--ref", ref, "--symmetry", "C3", *words).returncode == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    text = star.read_text().rstrip().splitlines()
    (tmp_path / "fewer.star").write_text("\n".join(text[:-1]) + "\n")
    volume = read_map(ref)
    write_map(tmp_path / "other.mrc", np.roll(volume.data[::-1], 1, 0), volume.pixel_size_A)
    for change, said in (
        ((star, "--symmetry", "C1", "--ref", ref), "symmetry was C3, is C1"),
        ((star, "--symmetry", "C3", "--ref", tmp_path / "other.mrc"), "reference: density differs"),
        ((tmp_path / "fewer.star", "--symmetry", "C3", "--ref", ref), "particles: number was 24, is 23"),
    ):
        done = cryoiso_here("refine", *change, *words, "--resume")
        assert done.returncode == 65 and said in done.stderr and done.stderr.count("error:") == 1, done.stderr
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert cryoiso_here("refine", star, "--ref", ref, "--symmetry", "C3", *words, "--resume").returncode == 0
