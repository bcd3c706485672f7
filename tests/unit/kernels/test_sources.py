"""The CUDA source compiles for every supported generation, spills no registers and keeps its loads in flight.

Needs no GPU: by nvcc where one is on PATH, and by NVRTC, as at run time, where the library is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sglang_xmem.cache import CACHE_VARIABLE
from sglang_xmem.copies import nvrtc
from sglang_xmem.copies.tuning import DEFAULT_TUNING, SMALL_UNIT_TUNING, CudaTuning
from sglang_xmem.errors import CopyError
from sglang_xmem.kernels import source

FILE = "page_copy.cu"
ARCHITECTURES = (80, 90, 100)
BULK = CudaTuning(variant="bulk", stages=6, stage_bytes=32768)
TUNINGS = {
    **{f"register{unroll}": CudaTuning(unroll=unroll) for unroll in (4, 8, 16)},
    "streaming": CudaTuning(streaming=True),
    "bulk": BULK,
    "bulk2": CudaTuning(variant="bulk", rings=2, stages=7, pending_stores=3),
    **{f"default_{a}_{b}": tuning for (a, b), tuning in DEFAULT_TUNING.items()},
    **{f"small_units_{a}_{b}": tuning for (a, b), tuning in SMALL_UNIT_TUNING.items()},
}
#: (tuning, bytes a vector, architecture)
BUILDS = [
    *((name, 16, arch) for name in TUNINGS for arch in ARCHITECTURES if arch >= 90 or TUNINGS[name].variant != "bulk"),
    *(("register8", vector, 90) for vector in (1, 2, 4, 8)),
]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def nvrtc_version() -> tuple[int, int] | None:
    """Version of the NVRTC library; None without it."""
    try:
        from cuda.bindings import nvrtc as bindings

        status, *version = bindings.nvrtcVersion()
    except (ImportError, RuntimeError):
        return None
    return None if status.value else (version[0], version[1])


needs_nvrtc = pytest.mark.skipif(nvrtc_version() is None, reason="no NVRTC library, or no cuda-bindings")


def compile_by_nvcc(directory: Path, name: str, vector: int, arch: int, *options: str) -> str:
    """Path of the output is directory/out; returns what the compiler says."""
    (directory / FILE).write_text(source(FILE))
    macros = [f"-D{key}={value}" for key, value in TUNINGS[name].macros(vector).items()]
    answer = subprocess.run(
        ["nvcc", f"-arch=sm_{arch}", "-std=c++17", *macros, *options, "-o", str(directory / "out"), FILE],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout + answer.stderr


@needs_nvcc
@pytest.mark.parametrize(("name", "vector", "arch"), BUILDS)
def test_nvcc_compiles_without_spills(name: str, vector: int, arch: int, tmp_path: Path) -> None:
    said = compile_by_nvcc(tmp_path, name, vector, arch, "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings")
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), said
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    tuning = TUNINGS[name]
    assert int(registers[1]) * 32 * tuning.warps <= 65536, said


@needs_nvcc
def test_a_source_that_spills_is_noticed(tmp_path: Path) -> None:
    TUNINGS["spilling"] = CudaTuning(threads=1024, unroll=32)
    try:
        said = compile_by_nvcc(tmp_path, "spilling", 16, 90, "-cubin", "-Xptxas", "-v")
    finally:
        del TUNINGS["spilling"]
    assert not re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said)


@needs_nvcc
@pytest.mark.parametrize("unroll", [8, 16])
def test_all_loads_come_before_the_first_store(unroll: int, tmp_path: Path) -> None:
    """In the machine code, if a disassembler is there: `unroll` loads of 16 bytes in one run, then as many stores."""
    disassembler = shutil.which("nvdisasm") or next(iter(triton_tools("nvdisasm")), None)
    if disassembler is None:
        pytest.skip("no nvdisasm, neither on PATH nor with Triton")
    compile_by_nvcc(tmp_path, f"register{unroll}", 16, 90, "-cubin")
    code = subprocess.run(
        [disassembler, "-c", str(tmp_path / "out")], capture_output=True, text=True, check=True
    ).stdout
    # Behind the kernel's end there is what shuffles would take in a warp whose lanes have parted, which they never do.
    code = code[: code.rindex("EXIT")]
    wide = "".join("L" if match[1] == "LDG" else "S" for match in re.finditer(r"\b(LDG|STG)\.E\S*\.128\b", code))
    # One run for units of at least a tile, one for smaller units, one for tiny ones.
    assert [len(run) for run in re.findall(r"L+", wide)] == [unroll] * 3, wide
    assert [len(run) for run in re.findall(r"S+", wide)] == [unroll] * 3, wide


def triton_tools(name: str) -> list[str]:
    """Programs that come with Triton."""
    try:
        import triton
    except ImportError:
        return []
    return [str(path) for path in Path(triton.__file__).parent.glob(f"backends/nvidia/bin/{name}")]


@needs_nvrtc
@pytest.mark.parametrize(("name", "vector", "arch"), BUILDS)
def test_nvrtc_compiles(name: str, vector: int, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    image = nvrtc.build(source(FILE), FILE, TUNINGS[name].macros(vector), divmod(arch, 10))
    assert image.startswith(b"\x7fELF")
    assert b"page_copy" in image


@needs_nvcc
@pytest.mark.parametrize("vector", [1, 8, 16])
@pytest.mark.parametrize("file", ["page_fetch.cu", "page_sum.cu"])
def test_other_kernels_compile_without_spills(file: str, vector: int, tmp_path: Path) -> None:
    (tmp_path / file).write_text(source(file))
    macros = [f"-DVEC_BYTES={vector}", f"-DPIECE_BYTES={min(vector, 8)}"]
    options = ["-cubin", "-Xptxas", "-v", "-Werror", "all-warnings", "-o", "out"]
    for arch in ARCHITECTURES:
        command = ["nvcc", f"-arch=sm_{arch}", "-std=c++17", *macros, *options, file]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert frames, said
        assert set(frames) == {("0", "0", "0")}, said


def build(**changes: object) -> bytes:
    text = str(changes.get("text", 'extern "C" __global__ void nothing() {}'))
    return nvrtc.build(text, "nothing.cu", {}, (9, 0))


@needs_nvrtc
def test_cache_is_used_and_a_damaged_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "new" / "cache"))
    image = build()
    (file,) = (tmp_path / "new" / "cache").iterdir()
    content = file.read_bytes()

    def no_compiler(*_: object) -> bytes:
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "_compile", no_compiler)
        assert build() == image
        with pytest.raises(AssertionError, match="compiled again"):
            build(text='extern "C" __global__ void other() {}')
    for damaged in (b"", content[:-1], content[:30], content[:-5] + b"X" + content[-4:]):
        file.write_bytes(damaged)
        assert build() == image
        assert file.read_bytes() == content


@needs_nvrtc
def test_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(blocked / "below"))
    assert build().startswith(b"\x7fELF")


@needs_nvrtc
def test_refused_source_names_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(CopyError, match=r"nothing\.cu.*undefined") as caught:
        build(text='extern "C" __global__ void nothing() { undefined_name(); }')
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CopyError, match="sm_90 or newer"):
        nvrtc.build(source(FILE), FILE, BULK.macros(16), (8, 0))


def test_architecture_runs_on_the_gpu() -> None:
    supported = [75, 80, 86, 90, 100]
    assert nvrtc._architecture((9, 0), supported) == "sm_90"
    assert nvrtc._architecture((8, 9), supported) == "sm_86"
    assert nvrtc._architecture((10, 3), supported) == "sm_100"
    assert nvrtc._architecture((12, 0), supported) == "compute_100"
    with pytest.raises(CopyError, match=r"7\.0"):
        nvrtc._architecture((7, 0), supported)


def test_missing_nvrtc_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(CopyError, match="cuda-bindings"):
        build()


def test_triton_merges_words_to_16_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without a GPU, for one: loads and stores of a tile are of 16 bytes where all sizes are multiples."""
    triton = pytest.importorskip("triton")
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sglang_xmem.kernels import page_copy_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "LOAD": True,
        "WORD": tl.int64,
        "ALIGNMENT": 16,
        "TILE_WORDS": 8192,
        "NARROW_WORDS": 128,
        "VECTORS": 3,
        "RECORD": page_copy_triton.RECORD_WORDS,
        "MERGED": 2,
    }
    types = {"table": "*i64", "num_planes": "i32", "vectors": ("i64",) * 12, **dict.fromkeys(constants, "constexpr")}
    compiled = triton.compile(
        ASTSource(page_copy_triton.page_copy, types, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 16},
    )
    stores = re.findall(r"st\.global\S*", compiled.asm["ptx"])
    assert stores
    assert set(stores) == {"st.global.v2.b64"}


def test_triton_compiles_for_no_number_of_a_move() -> None:
    """Else it would compile again in the middle of serving."""
    pytest.importorskip("triton")
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    from sglang_xmem.kernels.page_copy_triton import disguised

    def compiled_for(number: int) -> object:
        return native_specialize_impl(BaseBackend, (number,), False, False, True)

    plain = [0, 1, 16, 17, 1280, 0x7F0000000000]
    assert len({repr(compiled_for(number)) for number in plain}) > 1, "else nothing is tested"
    assert {repr(compiled_for(disguised(number))) for number in plain} == {"(('i64',), ('',))"}
