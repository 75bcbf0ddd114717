"""Where to compute and in which precision, decided at run time, and a record of it."""

import ctypes
import functools
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from errors import UserError


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; UserError if "cuda" is asked for and not there.

    For the CPU it also tells the C library to keep memory that a step frees for the next one.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda asked for, but PyTorch sees no CUDA GPU; use DEVICE=cpu")
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    _keep_memory()
    return torch.device("cpu")


def _keep_memory() -> None:
    """Keep freed memory in this process; only glibc can be told so, elsewhere nothing happens.

    By default glibc gives every large block back to the system, which zeroes it before it hands
    it out again: a tenth of a step of the wide models, more in float32.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


@functools.cache  # so that it is said once
def pick_precision(device: torch.device, name: str) -> torch.dtype:
    """The autocast dtype for "auto", "float32" or "bfloat16".

    "auto" takes bfloat16 only where the processor multiplies it natively: emulated, it is several
    times slower than float32. If it falls back, one printed line says so.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = _cpu_capabilities()
        native = any(capabilities.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    if not native:
        print(f"precision: float32, since no native bfloat16 was found on this {device.type}")
    return torch.bfloat16 if native else torch.float32


def _cpu_capabilities() -> dict:
    """What the processor can do; empty in older releases, where precision=bfloat16 forces it."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def peak_memory_mib() -> float:
    """The most memory that this process has had resident, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else KiB


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which convolutions compute in `dtype`; none if it is float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def environment(device: torch.device, dtype: torch.dtype) -> dict:
    """Where a run was made: commit, versions, device, precision."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown: not a git checkout"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _cpu_capabilities().get("cpu_name", platform.machine())
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
    }
