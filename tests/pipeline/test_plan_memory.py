"""What the planner says of memory and of files that go again, against the networks and the engine themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline_helper import write_job

from cryoiso.core.config import Job
from cryoiso.core.errors import InputError
from cryoiso.engines.relion import images
from cryoiso.io.imageprep import IngestSettings
from cryoiso.io.ingest import ingest
from cryoiso.io.shards import ShardSource
from cryoiso.methods.anisotropy.settings import PRESETS as CORRECTIONS
from cryoiso.nets import channel_parts
from cryoiso.nets.hvae import ConditionalHvae
from cryoiso.nets.hvae_parts import HvaeConfig
from cryoiso.nets.unet import Unet3d
from cryoiso.parallel.context import Context
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.jobfile import read_job
from cryoiso.pipeline.planning import job_size, memory
from cryoiso.pipeline.planning.job_size import Problem, Stored, most, problem_of
from cryoiso.pipeline.planning.memory import (
    ALONE_BYTES,
    TRAINED_BYTES,
    gpu_memory,
    memory_of_stages,
    metadata_of_stages,
)
from cryoiso.pipeline.planning.plan import Layout, as_dict, as_lines, make_plan
from cryoiso.pipeline.planning.rates import built_in
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.workflow import folder_stages

GIB = 2**30


def problem(n: int = 1000, box: int = 64, device: str = "cpu", **sections) -> Problem:
    job = Job.model_validate({"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, **sections})
    return Problem(job, n, box, 3.0, 150.0, device=device)


def auxiliary(box: int = 64, device: str = "cpu", **keys) -> Problem:
    return problem(1000, box, device, run={"workflow": "auxiliary"}, auxiliary=keys)


def realign(device: str = "cpu", **keys) -> Problem:
    return problem(1000, 64, device, run={"workflow": "realign"}, correct=keys)


# --- trainings


def left_for_backward(module: torch.nn.Module, forward) -> int:
    """Bytes that a forward pass keeps, each storage once, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def of_generator(preset: str, box: int, n: int, bfloat16: bool = False) -> float:
    config = HvaeConfig.preset(preset, box)
    module = ConditionalHvae(config)
    seen, condition = torch.randn(2, n, 1, box, box)
    given = seen, condition, torch.randn(n, 6), torch.randn(n, config.latent_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        return left_for_backward(module, lambda: module(*given))


def of_unet(preset: str, cube: int, n: int, bfloat16: bool = False) -> float:
    module = Unet3d(CORRECTIONS[preset].network)
    x = torch.randn(n, 1, cube, cube, cube)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        return left_for_backward(module, lambda: module(x))


@pytest.mark.parametrize("preset", ["small", "paper"])
@pytest.mark.parametrize("box, n", [(16, 2), (32, 1), (32, 2)])
def test_generators_keep_what_the_plan_counts_for_a_pixel(preset, box, n):
    assert of_generator(preset, box, n) == pytest.approx(n * box**2 * TRAINED_BYTES["generator", preset][0], rel=0.03)


@pytest.mark.parametrize("preset, cubes", [("small", (16, 24, 32)), ("paper", (8, 16))])
def test_correction_networks_keep_what_the_plan_counts_for_a_voxel(preset, cubes):
    for cube in cubes:
        found = of_unet(preset, cube, 2)
        assert found == pytest.approx(2 * cube**3 * TRAINED_BYTES["unet", preset][0], rel=0.03)
    # one alone is convolved as two slabs, whose edges weigh less in larger ones
    assert 0.9 < of_unet(preset, cubes[-1], 1) / (cubes[-1] ** 3 * ALONE_BYTES[preset]) < 1.1


def test_gpus_keep_joined_channels_in_bfloat16(monkeypatch):
    monkeypatch.setattr(channel_parts, "in_parts", lambda x: False)
    more = of_generator("small", 32, 2, True) - of_generator("small", 16, 2, True)  # copies of the weights cancel
    assert more == pytest.approx(2 * (32**2 - 16**2) * TRAINED_BYTES["generator", "small"][1], rel=0.05)
    more = of_unet("small", 16, 2, True) - of_unet("small", 8, 2, True)
    assert more == pytest.approx(2 * (16**3 - 8**3) * TRAINED_BYTES["unet", "small"][1], rel=0.05)
    more = of_generator("paper", 32, 1, True) - of_generator("paper", 16, 1, True)
    assert more == pytest.approx((32**2 - 16**2) * TRAINED_BYTES["generator", "paper"][1], rel=0.05)
    more = of_unet("paper", 16, 1, True) - of_unet("paper", 8, 1, True)
    assert more == pytest.approx((16**3 - 8**3) * TRAINED_BYTES["unet", "paper"][1], rel=0.05)


def test_memory_of_a_generator_grows_with_preset_box_and_batch():
    of = lambda p, ranks=1: memory_of_stages(p, ranks)["train-1"]  # noqa: E731
    published = auxiliary(256, preset="paper", batch=8)
    assert 8 * GIB < of(published) < 11 * GIB
    assert of(auxiliary(256, preset="paper", batch=16)) - of(published) > 1.3 * 8 * 256**2 * 9_500
    assert of(auxiliary(128, preset="paper", batch=8)) < of(published) / 3
    assert of(auxiliary(256, preset="small", batch=8)) < 3 * GIB
    assert of(published, 8) < of(published) / 2  # four ranks have a generator: two images each
    assert memory_of_stages(auxiliary(256, preset="paper"), 1)["generate-1"] > 9 * GIB


def test_memory_of_a_correction_is_of_one_sub_map_on_cpus_and_of_the_batch_on_gpus():
    of = lambda p: memory_of_stages(p, 1)["correct"]  # noqa: E731
    assert of(realign(preset="paper", batch=8)) == of(realign(preset="paper", batch=2)) > 1.8 * GIB
    assert of(realign(preset="paper")) > of(realign(preset="small")) + GIB
    inside = lambda **keys: memory_of_stages(realign(**keys), 1)["refine"]  # noqa: E731
    assert inside(preset="paper") > inside(preset="small")
    here = lambda **keys: gpu_memory(realign("cuda", preset="paper", **keys), 1)["correct"]  # noqa: E731
    assert here(batch=8) - here(batch=4) == pytest.approx(1.15 * 1.3 * 4 * 64**3 * 1561, rel=0.05)
    assert here(method="published") > 2 * here() - 2 * GIB


def test_gpus_need_memory_for_trainings_and_hosts_then_do_not():
    p = auxiliary(256, "cuda", batch=8)
    found = gpu_memory(p, 1)
    assert found["train-1"] > 6 * GIB and set(found) == set(folder_stages(p.job)) - {"ingest", "reference", "diagnose"}
    assert memory_of_stages(p, 1)["train-1"] < 4 * GIB
    made = make_plan(p, Layout(1, 1, 1), built_in("cuda"))
    assert as_dict(made)["gpu_bytes_per_rank"] == max(found.values())
    assert f"({max(found, key=lambda name: found[name])})" in "\n".join(as_lines(made))


# --- metadata


def test_memory_grows_with_the_box_and_shrinks_with_ranks():
    small, large = problem(100_000, 64), problem(100_000, 256)
    of = lambda p, ranks: max(memory_of_stages(p, ranks).values())  # noqa: E731
    assert of(large, 1) > 2.5 * of(small, 1)
    assert of(small, 16) < of(small, 1) + 64 * 2**20


def test_metadata_is_rank_0s_and_counts_once_on_a_node():
    p = problem(1_000_000, 64)
    made = make_plan(p, Layout(2, 0, 128), built_in("cpu"))
    told, metadata = as_dict(made), metadata_of_stages(p)["refine"]
    assert metadata > 0.6 * GIB
    others = max(row.other_ranks_bytes or 0 for row in made.rows)
    assert told["memory_bytes_per_rank"] >= others + metadata
    assert told["memory_bytes_per_node"] == told["memory_bytes_per_rank"] + 127 * others
    text = "\n".join(as_lines(made))
    assert f"memory of a node: {told['memory_bytes_per_node'] / GIB:.1f} GiB" in text
    threaded = make_plan(p, Layout(2, 0, 1), built_in("cpu"))
    assert f"one rank of 128 times the threads: {threaded.node_bytes / GIB:.1f} GiB" in text
    assert threaded.node_bytes < made.node_bytes / 5 and "times the threads" not in "\n".join(as_lines(threaded))


# --- RELION's copy of the images


class Blank:
    """Images of zeros."""

    def __init__(self, n: int, box: int) -> None:
        self.box_px = box
        self.particles = SimpleNamespace(
            uid=np.arange(n, dtype=np.uint64), group_values=lambda name: np.full(n, 3.0, np.float32)
        )

    def read(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), self.box_px, self.box_px), np.float32)


@pytest.mark.parametrize("n", [1, 30, 95])
def test_the_copy_has_the_files_and_bytes_that_are_planned(n, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "STACK_BYTES", 4 * 24**2 * 2)  # two images a stack, until there are 40 stacks
    images._export(Blank(n, 24), np.arange(n), tmp_path / "images", Context(), False, "RELION")
    found = [path.stat().st_size for path in (tmp_path / "images").iterdir()]
    planned = job_size._images_for_relion(n, 24)
    assert planned[1] == len(found) and planned[0] == pytest.approx(sum(found), abs=200)


def test_a_million_images_are_on_the_disk_twice_while_relion_works():
    relion = {"refine": {"engine": "relion"}}
    p = problem(1_000_000, 256, **relion)
    made = make_plan(p, Layout(1, 0, 1), built_in("cpu"))
    row = {row.stage: row for row in made.rows}["refine"]
    assert row.temporary_bytes == pytest.approx(4e6 * 256**2, rel=0.01) and row.temporary_files == 41
    told = as_dict(made)
    assert told["disk_bytes_at_once"] > told["disk_bytes"] + 200 * GIB and told["stages"][2]["temporary_files"] == 41
    assert "gets a copy of the images" in "\n".join(as_lines(made))
    for same in (replace(p, originals=True), problem(1_000_000, 256, relion={"images": "original"}, **relion)):
        assert "copy of the images" not in "\n".join(as_lines(make_plan(same, Layout(1, 0, 1), built_in("cpu"))))
    both = replace(problem(1000, 64, run={"workflow": "auxiliary"}, **relion), originals=True)
    copies = {s.name: s.temporary_bytes for s in job_size.disk(both)}
    assert copies["refine"] == 0 and copies["corefine-1"] == pytest.approx(4 * 1000 * 64**2, rel=0.01)


def test_most_at_once_is_what_was_left_and_what_goes_again():
    stored = [Stored("a", 10, 1, 100, 5), Stored("b", 20, 2, 50, 9), Stored("c", 30, 1)]
    assert most(stored) == (110, 12)
    assert most([Stored("a", 10, 1), Stored("b", 95, 2)]) == (105, 3)


@pytest.mark.parametrize("which", ["auto", "export", "original"])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_plan_decides_by_the_images_as_the_engine_does(which, normalise, data, tmp_path):
    """Before ingest, by a sample; after it the engine looks at the shards."""
    job = write_job(data, f"{which}.toml", refine_engine="relion", relion_images=which, particles_normalise=normalise)
    found = problem_of(inputs_of(job))
    settings = IngestSettings(normalise=normalise)
    shards = ShardSource(ingest(data / "particles.star", tmp_path / "shards", settings).parent)
    try:
        kept = images.usable_originals(shards, which)[0].all()
    except InputError:
        kept = False
    assert found.originals == kept
    assert kept or normalise or which == "export"  # as they are, they are what RELION would get


def inputs_of(job_file: Path) -> Inputs:
    _, job = read_job(job_file)
    return Inputs(job, RunFolder(job_file.parent / "run", folder_stages(job)), Context())


def test_what_a_run_asks_of_a_machine_is_what_its_device_needs(data):
    class OnGpu(Context):
        def device(self, preference: str | None = None) -> str:
            return "cuda:0"

    inputs = inputs_of(data / "job.toml")
    on_cpu = memory.needs_of(inputs, 1)
    inputs.comm = OnGpu()
    assert on_cpu.first_rank_bytes > 0 and memory.needs_of(inputs, 1).gpu_bytes > memory.GPU_BYTES
