"""The build and the installed package: object files, imports, metadata, command line."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ssl_fast

# make test names the folder of the build, and then missing objects are a failure.
BUILD_DIR = os.environ.get("SSL_FAST_BUILD_DIR") or None
OBJECTS = sorted(
    path
    for path in Path(BUILD_DIR or Path(__file__).parents[1] / "build").glob(
        f"cp{sys.version_info.major}{sys.version_info.minor}-*/CMakeFiles/*.dir/csrc/**/*.o"
    )
    if "ssl_fast_cuda.dir" not in path.parts
)
# nm's letters for weak and unique symbols: of several copies the linker keeps any one.
WEAK = re.compile(r"^[0-9a-f]* +[WwVvu] (?P<name>.*)$", re.MULTILINE)


def isa_of(path):
    """The ISA whose object library the file belongs to; None for the core and the bindings."""
    found = re.search(r"ssl_fast_(\w+)\.dir", str(path))
    return found[1] if found else None


def run(*command, cwd):
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def objects():
    if not OBJECTS and BUILD_DIR is None:
        pytest.skip("no object files: the package was not built in this checkout (make test does)")
    assert OBJECTS, f"no object files under {BUILD_DIR}"
    return OBJECTS


def tool(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_every_isa_was_compiled(objects):
    isas = {isa_of(path) for path in objects} - {None}
    assert "baseline" in isas
    if platform.machine() == "x86_64":
        assert "avx2" in isas


def test_isa_objects_have_no_weak_symbols(objects, tmp_path):
    """Of an inline function that two ISAs share, an older CPU could be given the newer copy."""
    weak = {}
    for path in objects:
        if isa_of(path) not in (None, "baseline"):
            listing = run(tool("nm"), "--demangle", str(path), cwd=tmp_path)
            assert listing.returncode == 0, listing.stderr
            names = [match["name"] for match in WEAK.finditer(listing.stdout)]
            if names:
                weak[f"{isa_of(path)}/{path.name}"] = names
    assert not weak


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the registers are x86-64's")
def test_baseline_code_uses_no_wide_registers(objects, tmp_path):
    """Core, bindings and baseline kernels run on any x86-64: nothing there needs AVX."""
    for path in objects:
        if isa_of(path) in (None, "baseline"):
            listing = run(tool("objdump"), "-d", "--no-show-raw-insn", str(path), cwd=tmp_path)
            assert listing.returncode == 0, listing.stderr
            wide = re.search(r".*%[yz]mm\d+.*", listing.stdout)
            assert wide is None, f"{path}: {wide[0]}"


def test_extension_loads_without_torch(tmp_path):
    """The module finds its own OpenMP runtime; torch's need not be in the process already."""
    native = pytest.importorskip("ssl_fast._native", reason="the native backend is not built")
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_native', sys.argv[1])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print('torch' in sys.modules)\n"
    )
    done = run(sys.executable, "-c", script, native.__file__, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_stub_has_the_names_of_the_extension():
    native = pytest.importorskip("ssl_fast._native", reason="the native backend is not built")
    stub = Path(ssl_fast.__file__).with_name("_native.pyi").read_text()
    declared = set(re.findall(r"^(?:def |class )?([a-zA-Z]\w*)[(:]", stub, re.MULTILINE))
    assert declared == {n for n in dir(native) if not n.startswith("_")}


def test_command_line_help(tmp_path):
    done = run(sys.executable, "-m", "ssl_fast", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_unknown_command_is_refused(tmp_path):
    done = run(sys.executable, "-m", "ssl_fast", "no-such-command", cwd=tmp_path)
    assert done.returncode == 2
    assert "no-such-command" in done.stderr


def test_installed_metadata():
    metadata = importlib.metadata.metadata("ssl_fast")
    assert metadata["Version"] == ssl_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = importlib.metadata.requires("ssl_fast") or []
    unconditional = {
        re.match(r"[\w-]+", line)[0] for line in requirements if "extra ==" not in line
    }
    assert unconditional == {"torch", "numpy"}


def test_types_are_shipped():
    assert (Path(ssl_fast.__file__).parent / "py.typed").is_file()


@pytest.mark.skipif(BUILD_DIR is None, reason="only make test promises an installed package")
def test_tests_run_against_the_installed_package():
    assert Path(ssl_fast.__file__).is_relative_to(sys.prefix)
    assert importlib.util.find_spec("ssl_fast._native") is not None
