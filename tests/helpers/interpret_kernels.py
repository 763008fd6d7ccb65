"""Runs the Triton kernels in Triton's interpreter, in a process of its own: what is compiled and what is interpreted is
decided when Triton is imported.

    python interpret_kernels.py cases.pt found.pt

``cases.pt`` is a list of (function of ``gpu_kernels``, its arguments after the module of kernels); ``found.pt`` gets
what each returns, or for insertion the grid.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from cryoiso.physics import _triton_kernels, gpu_kernels


def main(cases: str, found: str) -> None:
    results = []
    for name, arguments in torch.load(cases, weights_only=False):
        made = getattr(gpu_kernels, name)(_triton_kernels, *arguments)
        results.append(arguments[0] if made is None else made)
    torch.save(results, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
