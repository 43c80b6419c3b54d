"""Builds commlib._core, the C++ core with the CPU backend. It links against neither PyTorch nor CUDA."""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCES = sorted(glob("csrc/cpu/*.cc") + glob("csrc/heap/*.cc") + ["csrc/bindings.cc"])

# -ffp-contract=off: multiply and add stay apart, so all vector widths give the same bits.
core = Pybind11Extension(
    "commlib._core",
    SOURCES,
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"],
    extra_link_args=["-pthread"],
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
)

with ParallelCompile(default=os.cpu_count() or 1):
    setup(ext_modules=[core], cmdclass={"build_ext": build_ext})
