"""Where to compute and in which precision, decided at run time, and a record of it."""

import functools
import platform
import subprocess
from pathlib import Path

import torch

from errors import UserError


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; UserError if "cuda" is asked for and not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda asked for, but PyTorch sees no CUDA GPU; use DEVICE=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


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
