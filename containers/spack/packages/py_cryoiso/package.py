# ruff: noqa: F403, F405
"""Spack package, built from this source tree:

    spack repo add containers/spack
    spack develop --path $PWD py-cryoiso@0.2.0
    spack add py-cryoiso@0.2.0 && spack install

Versions follow pyproject.toml (tests/system/test_recipes.py).
"""

from spack.package import *
from spack_repo.builtin.build_systems.python import PythonPackage


class PyCryoiso(PythonPackage):
    """Correct poses, independent half-maps and an isotropic map from cryo-EM particles with preferred orientation."""

    license("BSD-3-Clause")

    version("0.2.0")

    depends_on("python@3.11:3.13", type=("build", "run"))
    depends_on("py-setuptools@68:", type="build")
    depends_on("py-torch@2.6:2.13", type=("build", "run"))
    depends_on("py-numpy@1.26:", type=("build", "run"))
    depends_on("py-scipy@1.11:", type=("build", "run"))
    depends_on("py-numba@0.60:", type=("build", "run"))
    depends_on("py-h5py@3.10:", type=("build", "run"))
    depends_on("py-mrcfile@1.5:", type=("build", "run"))
    depends_on("py-starfile@0.5.8:", type=("build", "run"))
    depends_on("py-pyarrow@14:", type=("build", "run"))
    depends_on("py-pandas@2.2:", type=("build", "run"))
    depends_on("py-gemmi@0.6.5:", type=("build", "run"))
    depends_on("py-mpi4py@4.1:", type=("build", "run"))
    depends_on("py-typer@0.12:", type=("build", "run"))
    depends_on("py-pydantic@2.6:", type=("build", "run"))
    depends_on("py-jinja2@3.1:", type=("build", "run"))
    depends_on("py-rich@13:", type=("build", "run"))
    depends_on("py-matplotlib@3.8:", type=("build", "run"))
