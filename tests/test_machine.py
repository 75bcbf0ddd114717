"""Tests of machine.py: device, precision, kept memory, and the variables it sets before torch."""

from pathlib import Path
from types import SimpleNamespace

import machine

import pytest
import torch

from common import UserError

CPU = torch.device("cpu")
X86 = "processor : 0\nmodel name\t: Some: CPU\nflags : fpu avx512f{}\nflags : of another core\n"
ARM = "processor : 0\nFeatures\t: fp asimd{}\n"

RUN_WITHOUT_OMP = """
import os, runpy, sys, unittest.mock
sys.modules["torch"] = unittest.mock.MagicMock()  # loading it would take seconds
os.environ.pop("OMP_NUM_THREADS", None)
os.environ.pop("OMP_PROC_BIND", None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
"""


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for /proc/cpuinfo; there is no such file before a test writes it."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "Path", lambda _name: path)
    return path


def test_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"device tpu: PyTorch finds .*cpu"):
        machine.pick_device("tpu")
    assert machine.pick_device("cpu") == CPU


def test_auto_takes_an_accelerator_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert machine.pick_device("auto") == CPU
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("mps"))
    assert machine.pick_device("auto") == torch.device("mps")
    with pytest.raises(UserError, match="device cuda: PyTorch finds only cpu, mps"):
        machine.pick_device("cuda")


@pytest.mark.parametrize(
    ("text", "native"),
    [
        (X86.format(" avx512_bf16"), True),
        (X86.format(" amx_bf16"), True),
        (ARM.format(" bf16"), True),
        (X86.format(""), False),
        (ARM.format(""), False),
        (X86.format(" not_bf16_alone"), False),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_has_it(
    cpuinfo: Path, text: str, native: bool
) -> None:
    cpuinfo.write_text(text)
    assert machine.pick_precision(CPU, "auto") == (torch.bfloat16 if native else torch.float32)


def test_precision_that_is_asked_for_is_taken(cpuinfo: Path) -> None:
    assert machine.pick_precision(CPU, "bfloat16") == torch.bfloat16
    assert machine.pick_precision(CPU, "float32") == torch.float32
    assert machine.pick_precision(CPU, "auto") == torch.float32  # no /proc/cpuinfo, as on macOS
    assert machine.pick_precision(torch.device("mps"), "auto") == torch.float32


def test_data_that_a_gpu_has_no_room_for_stay_on_the_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gib = 2**30
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (8 * gib, 80 * gib))
    assert machine.fits(torch.device("cuda"), 4 * gib)
    assert machine.fits(CPU, 100 * gib)
    assert capsys.readouterr().out == ""
    assert not machine.fits(torch.device("cuda"), 5 * gib)
    assert (
        capsys.readouterr().out == "note: 5.0 GiB of training data stay in the memory of the host\n"
    )


def test_processor_is_named(cpuinfo: Path) -> None:
    assert machine.name_device(CPU) != ""  # no /proc/cpuinfo
    cpuinfo.write_text(X86)
    assert machine.name_device(CPU) == "Some: CPU"
    assert machine.name_device(torch.device("mps")) == "mps"


def test_memory_is_kept_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """M_MMAP_MAX is option -4 and M_TRIM_THRESHOLD option -1 in glibc's malloc.h."""
    options = {}
    library = SimpleNamespace(mallopt=options.__setitem__)
    monkeypatch.setattr("ctypes.CDLL", lambda _name: library)
    machine.keep_memory()
    assert options == {-4: 0, -1: -1}  # no block is mapped, nothing is trimmed
    machine.keep_memory(False)
    assert options == {-4: 65536, -1: 131072}  # glibc's defaults


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(_name: str) -> None:
        raise OSError("libc.so.6: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", no_library)
    machine.keep_memory()
    monkeypatch.setattr("ctypes.CDLL", lambda _name: SimpleNamespace())  # without mallopt
    machine.keep_memory()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="trainings on a GPU are not pinned")
def test_only_trainings_are_pinned_to_their_cores(tmp_path: Path, script) -> None:
    for name, pinned in (("train.py", "true"), ("evaluate.py", "true"), ("other.py", "None")):
        path = tmp_path / name
        path.write_text("import os, machine\nprint(os.environ.get('OMP_PROC_BIND'))\n")
        done = script("-c", RUN_WITHOUT_OMP, path)
        assert done.stdout == f"{pinned}\n", done.stderr
