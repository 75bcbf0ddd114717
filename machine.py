"""Prepare the machine: threads, memory, device and precision.

Scripts import this file before torch, since libgomp, which runs torch's threads, reads its
environment variables only once, when torch is imported.
"""

import contextlib
import ctypes
import gc
import os
import platform
import sys
from pathlib import Path

from common import UserError

# The processor cores that this process may use, before any thread is pinned to one of them.
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

# Threads that wait should spin only briefly: by default two trainings on the same cores spend most
# of their time waiting for each other.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# The threads of a training should stay on their cores. Other scripts must not ask for that, since a
# pool of processes would stay on the first core; neither should the processes that drive GPUs.
script = Path(sys.argv[0]).name
on_gpu = Path("/dev/nvidia0").exists()
if script in ("train.py", "evaluate.py") and "OMP_NUM_THREADS" not in os.environ and not on_gpu:
    os.environ.setdefault("OMP_PROC_BIND", "true")

# Importing torch makes hundreds of thousands of objects, and nearly all of them are needed. Python
# would look for garbage among them again and again, now and later. It does not look at frozen ones.
was_collecting = gc.isenabled()
gc.disable()
import torch  # noqa: E402 (after the variables, see above)

gc.freeze()
if was_collecting:
    gc.enable()


def unpin_thread() -> None:
    """Let the calling thread run on every core; a new thread inherits the core of its parent."""
    if CORES:
        os.sched_setaffinity(0, CORES)


def keep_memory(keep: bool = True) -> None:
    """Keep the memory that one step frees for the next step (True), or give it back (False).

    By default the C library glibc returns every large block to the system, which fills it with
    zeros before it hands it out again. That takes a tenth of a training step or more. Elsewhere
    than on Linux with glibc this function does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # the numbers that glibc gives to these options
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        if keep:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
        else:
            mallopt(M_MMAP_MAX, 65536)
            mallopt(M_TRIM_THRESHOLD, 131072)


def pick_device(name: str) -> torch.device:
    """Pick the device "cpu", "cuda", "mps" …; "auto" takes an accelerator if PyTorch finds one.

    UserError if PyTorch finds no such device.
    """
    known = ["cpu"]
    if torch.accelerator.is_available():
        known.append(torch.accelerator.current_accelerator().type)
    if name == "auto":
        return torch.device(known[-1])
    if name not in known:
        raise UserError(f"device {name}: PyTorch finds only {', '.join(known)}; give one of these")
    return torch.device(name)


def pick_precision(device: torch.device, name: str) -> torch.dtype:
    """Pick the dtype of autocast: torch.float32 or torch.bfloat16.

    "auto" takes bfloat16 where the hardware computes with it. Elsewhere it would be emulated, a
    thousand times slower than float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        native = cpu_has_bfloat16()
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Make the context in which a model computes in `dtype`, as `pick_precision` gives it."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def fits(device: torch.device, needed: int) -> bool:
    """Tell whether `needed` bytes take at most half of the free memory of a GPU.

    Prints a note if they do not. Other devices share their memory with the host: True.
    """
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free / 2:
        print(f"note: {needed / 2**30:.1f} GiB of training data stay in the memory of the host")
        return False
    return True


def read_cpuinfo(key: str) -> str:
    """Read the first value of a key of /proc/cpuinfo; "" if there is none (as on macOS)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def cpu_has_bfloat16() -> bool:
    """Tell whether the processor computes with bfloat16; not every release of PyTorch can say."""
    flags = f"{read_cpuinfo('flags')} {read_cpuinfo('Features')}".split()  # of x86, of Arm
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16", "svebf16"))


def name_device(device: torch.device) -> str:
    """Name the processor or accelerator, as in "AMD EPYC" or "NVIDIA H100"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return read_cpuinfo("model name") or platform.machine()
    return device.type
