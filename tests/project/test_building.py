"""How the modules are built, and how a machine gets modules that another one has built."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
OLD_ENOUGH = """
0000000000000000      DF *UND*	0000000000000000 (GLIBC_2.34) dlopen
0000000000000000      DF *UND*	0000000000000000 (GLIBC_2.2.5) memcpy
0000000000000000      DF *UND*	0000000000000000 (GLIBCXX_3.4.9)  _ZNSo9_M_insertIdEERSoT_
0000000000017a30 g    DF .text	0000000000000b3c  Base        PyInit__core
"""
TOO_NEW = OLD_ENOUGH + "0000000000000000      DF *UND*	0000000000000000 (GLIBC_2.38) __isoc23_strtol\n"


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    return setup


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/gpu"))
    import module

    return module


@pytest.fixture
def wheel_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    import wheel_report

    return wheel_report


# -- setup.py ------------------------------------------------------------------------------------------------


def test_an_older_setuptools_builds_in_place(setup, monkeypatch):
    attributes = {"ext_modules": [setuptools.Extension("commlib._core", [])]}
    distribution = setup.distribution("68.2.2", ["--quiet", "build_ext", "--inplace"])(attributes)
    monkeypatch.chdir(ROOT)
    distribution.parse_config_files()
    assert distribution.metadata.name is None  # it has not read pyproject.toml


def test_an_older_setuptools_refuses_all_else_with_a_way_out(setup):
    with pytest.raises(SystemExit, match=r"68\.2\.2 .*77 or newer.*build_ext --inplace"):
        setup.distribution("68.2.2", ["bdist_wheel"])


def test_a_newer_setuptools_reads_pyproject(setup):
    assert setup.distribution("77.0.1", ["bdist_wheel"]) is setuptools.Distribution


ASKED = pytest.mark.parametrize(
    ("value", "asked"), [("1", True), ("0", False), ("", False), (None, False)], ids=repr
)


def output_of(command, werror, **variables):
    """With this COMMLIB_WERROR, or without one."""
    env = {"PATH": "/usr/bin:/bin", **variables} | ({} if werror is None else {"COMMLIB_WERROR": werror})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


@ASKED
def test_warnings_are_errors_only_when_asked_for(value, asked):
    code = "import setup; print(setup.core.extra_compile_args)"
    flags = output_of([sys.executable, "-c", code], value, COMMLIB_CUDA_ARCHS="none")
    assert ("-Werror" in flags) == asked


@ASKED
def test_warnings_of_kernels_are_errors_only_when_asked_for(value, asked):
    code = "import sys; sys.path.insert(0, 'csrc'); import nvcc; print(nvcc.nvcc_command('a.cu', 'a.o'))"
    command = output_of([sys.executable, "-c", code], value, CUDA_HOME="/nowhere")
    assert "-Wextra" in command and ("-Werror" in command) == asked


@ASKED
@pytest.mark.parametrize(
    "target",
    ["build/sanitize/tsan-objects/tests/cpp/main.o", "build/simt/any/tests/cpp/main.cc.o", "test-aarch64"],
)
def test_warnings_of_tests_in_cpp_are_errors_only_when_asked_for(value, asked, target):
    commands = output_of(["make", "--dry-run", "--always-make", target], value)
    assert "-Wextra" in commands and ("-Werror" in commands) == asked


# -- taking a wheel's modules --------------------------------------------------------------------------------


def make_wheel(module, directory, sources, modules=("_core", "_cuda")):
    """A wheel for the right Python that claims to be built from these sources."""
    suffix = module.SUFFIX.removesuffix(".so")
    with zipfile.ZipFile(directory / "commlib_ep-0.1.0-cp300-cp300-linux_x86_64.whl", "w") as archive:
        for name in modules:
            archive.writestr(f"commlib/{name}{suffix}.so", f"the module {name}")
            archive.writestr(f"commlib/{name}{suffix}.sources", f"{sources}\n")


def test_the_modules_of_a_wheel_of_these_sources_are_taken(module, tmp_path):
    package = tmp_path / "commlib"
    package.mkdir()
    make_wheel(module, tmp_path, module.digest())
    assert not module.is_there(package)
    assert module.take(tmp_path, package)
    assert module.is_there(package)
    assert (package / f"_cuda{module.SUFFIX}").read_text() == "the module _cuda"
    assert sorted(p.name for p in package.iterdir()) == sorted(module.FILES)


@pytest.mark.parametrize(
    ("sources", "modules", "said"),
    [("feedbeef", ("_core", "_cuda"), "of other sources, feedbeef"), (None, ("_core",), "no commlib/_cuda")],
)
def test_other_sources_or_a_missing_module_are_reported_and_nothing_is_taken(
    module, tmp_path, capsys, sources, modules, said
):
    package = tmp_path / "commlib"
    package.mkdir()
    make_wheel(module, tmp_path, sources or module.digest(), modules)
    assert not module.take(tmp_path, package)
    assert said in capsys.readouterr().out
    assert not list(package.iterdir())


def test_modules_of_other_sources_are_not_taken_for_built(module, tmp_path):
    for name in module.FILES:
        (tmp_path / name).write_text("feedbeef\n")
    assert not module.is_there(tmp_path)
    for name in module.SOURCES:
        (tmp_path / name).write_text(f"{module.digest()}\n")
    assert module.is_there(tmp_path)


# -- what a wheel asks of a machine --------------------------------------------------------------------------


def test_libraries_of_five_years_ago_are_enough(wheel_report):
    assert wheel_report.needs(OLD_ENOUGH) == {
        "GLIBC": ((2, 34), "dlopen"),
        "GLIBCXX": ((3, 4, 9), "_ZNSo9_M_insertIdEERSoT_"),
    }
    assert wheel_report.faults_of("_core", OLD_ENOUGH) == []


def test_what_asks_for_a_newer_library_is_refused_with_the_symbol(wheel_report):
    assert wheel_report.faults_of("_core", TOO_NEW) == ["_core needs GLIBC 2.38 for __isoc23_strtol"]


def test_a_wheel_without_the_cuda_module_is_refused(wheel_report, tmp_path, monkeypatch):
    path = tmp_path / "commlib_ep-0.1.0-cp312-cp312-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("commlib/_core.cpython-312-x86_64-linux-gnu.so", "")
    monkeypatch.setattr(wheel_report, "symbols_of", lambda module: OLD_ENOUGH)
    assert wheel_report.faults(path) == ["_cuda is not in it: was there an nvcc (PATH, CUDA_HOME)?"]
