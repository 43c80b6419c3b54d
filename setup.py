"""Builds commlib._core, the C++ core with the CPU backend, and, if there is an nvcc, commlib._cuda.

Neither links against PyTorch or libcuda. COMMLIB_CUDA_ARCHS chooses the GPUs to compile for
(default "80 90 100"); "none" leaves the CUDA backend out. COMMLIB_WERROR=1 makes warnings errors, as in lint
and CI: another compiler has other warnings, which are no reason not to install.
"""

import importlib.util
import os
import subprocess
import sys
from glob import glob
from pathlib import Path

import pybind11
import setuptools
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from digest import digest
from nvcc import ARCHS, CUDA_HOME, WARNINGS, nvcc_command

HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
OLDEST_SETUPTOOLS = 77  # it knows `license = "MIT"` in pyproject.toml


def find_ucx_headers() -> list[str]:
    """Where ucp/api/ucp.h lies, or nothing: the library itself is loaded at run time."""
    homes = [os.environ.get("UCX_HOME"), "/opt/ucx", "/opt/hpcx/ucx", "/usr", "/usr/local"]
    wheel = importlib.util.find_spec("libucx")
    if wheel and wheel.origin:
        homes.append(str(Path(wheel.origin).parent))
    includes = [Path(home) / "include" for home in filter(None, homes)]
    return [str(i) for i in includes if (i / "ucp/api/ucp.h").exists()][:1]


UCX_INCLUDE = find_ucx_headers()


class BuildExtensions(build_ext):
    """Compiles .cu files with nvcc and hands the objects to the linker."""

    def run(self) -> None:
        sources = digest()  # as they are now: after an edit meanwhile, build again
        super().run()
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).with_suffix(".sources").write_text(f"{sources}\n")

    def build_extension(self, ext: Pybind11Extension) -> None:
        kernels = [s for s in ext.sources if s.endswith(".cu")]
        ext.sources = [s for s in ext.sources if not s.endswith(".cu")]
        for source in kernels:
            ext.extra_objects.append(self.compile_kernels(source))
        super().build_extension(ext)

    def compile_kernels(self, source: str) -> str:
        target = Path(self.build_temp) / f"{Path(source).stem}-{'-'.join(ARCHS)}.o"
        newest = max(os.path.getmtime(f) for f in [source, "csrc/nvcc.py", *HEADERS])
        if not target.exists() or target.stat().st_mtime < newest:
            target.parent.mkdir(parents=True, exist_ok=True)
            command = nvcc_command(source, target)
            print(*command, flush=True)
            subprocess.run(command, check=True)
        return str(target)


class BuildOnly(setuptools.Distribution):
    """Leaves pyproject.toml unread: an older setuptools refuses it, and a build in place does not need it."""

    def parse_config_files(self, *args: object, **kwargs: object) -> None:
        pass


def distribution(version: str, commands: list[str]) -> type[setuptools.Distribution]:
    """How this setuptools runs these commands; one that is too old only builds in place."""
    if int(version.partition(".")[0]) >= OLDEST_SETUPTOOLS:
        return setuptools.Distribution
    if "build_ext" in commands:
        return BuildOnly
    sys.exit(
        f"commlib: setuptools {version} cannot install it, {OLDEST_SETUPTOOLS} or newer can. "
        "`python setup.py build_ext --inplace` works with both."
    )


CUDA_BINDINGS = "csrc/bindings/cuda.cc"
# -ffp-contract=off: multiply and add stay apart, so all vector widths give the same bits.
core = Pybind11Extension(
    "commlib._core",
    sorted(
        glob("csrc/backend/*.cc")
        + glob("csrc/cpu/*.cc")
        + glob("csrc/heap/*.cc")
        + glob("csrc/net/*.cc")
        + [source for source in glob("csrc/bindings/*.cc") if source != CUDA_BINDINGS]
    ),
    include_dirs=["csrc", *UCX_INCLUDE],
    cxx_std=17,
    extra_compile_args=["-O3", "-ffp-contract=off", *WARNINGS],
    extra_link_args=["-pthread"],
    depends=["setup.py", "csrc/nvcc.py", *HEADERS],
)
extensions = [core]
if CUDA_HOME is None:
    print("commlib: no nvcc found (PATH, CUDA_HOME), so the CUDA backend is not built", file=sys.stderr)
else:
    extensions.append(
        Pybind11Extension(
            "commlib._cuda",
            sorted(
                glob("csrc/backend/*.cc")
                + glob("csrc/heap/*.cc")
                + ["csrc/net/inspection.cc", "csrc/net/network.cc", "csrc/net/topology.cc"]  # UCX is _core's
                + [CUDA_BINDINGS]
                + glob("csrc/cuda/*.cc")
                + glob("csrc/cuda/*.cu")
            ),
            include_dirs=["csrc", str(CUDA_HOME / "include"), pybind11.get_include()],
            library_dirs=[str(CUDA_HOME / "lib64"), str(CUDA_HOME / "targets/x86_64-linux/lib")],
            libraries=["cudart_static", "rt", "dl"],
            cxx_std=17,
            extra_compile_args=["-O3", *WARNINGS],
            extra_link_args=["-pthread", "-Wl,--exclude-libs,ALL"],
            depends=["setup.py", "csrc/nvcc.py", *HEADERS],
        )
    )

if __name__ == "__main__":
    with ParallelCompile(default=os.cpu_count() or 1):
        setuptools.setup(
            ext_modules=extensions,
            cmdclass={"build_ext": BuildExtensions},
            distclass=distribution(setuptools.__version__, sys.argv[1:]),
        )
