"""Where this runs: versions, hardware, backend, terminal or notebook."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Versions and hardware that a result depends on; no host name, user or path.

    Returns:
        Dict with "versions" (python, keras, backend packages, numpy, scipy, keras_norm),
        "hardware" (platform, cpu, cores this process may use, memory in GiB, gpus, and device: the
        one that Keras computes on, if Keras is loaded), and "summary", one line to print.

    Example:
        >>> from keras_norm.experiments import describe_machine
        >>> sorted(describe_machine())
        ['hardware', 'summary', 'versions']
    """
    versions, hardware = installed_versions(), _hardware()
    parts = [hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]]
    software = [
        f"{k} {v}" for k, v in versions.items() if k in ("keras", keras_backend(), "python")
    ]
    return {
        "versions": versions,
        "hardware": hardware,
        "summary": f"{', '.join(parts)}; {', '.join(software)}",
    }


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("keras", "tensorflow", "jax", "torch", "numpy", "scipy", "keras_norm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": _cores(),
        "memory_gib": _memory(),
        "gpus": gpu_names(),
    }
    if "keras" in sys.modules:
        place = str(sys.modules["keras"].ops.zeros(()).device)
        hardware["device"] = place.rpartition("device:")[2]
    return hardware


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # "max": no quota
    return cores


def _memory() -> float | None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def gpu_names() -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def freed_memory(of: str | None = None) -> str:
    """What becomes of large arrays that are freed: "kept" in the process, or "returned".

    Kept by TensorFlow where it has oneDNN's kernels, whose allocator holds a pool, and wherever the
    C library is told to (see benchmarks/layers.py); else returned to the operating system.

    Args:
        of: Whose arrays: a backend, or "numpy". Default: Keras's backend.
    """
    if os.environ.get("MALLOC_MMAP_MAX_") == "0":
        return "kept"
    if (of or keras_backend()) != "tensorflow":
        return "returned"
    from keras_norm._kernels_choice import fused_by

    return "returned" if fused_by() == "Eigen" else "kept"


def pages_taken() -> int | None:
    """Pages of memory that the operating system has handed out to this process, or None."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keras_backend() -> str:
    """The backend that Keras has, or would take when it is imported."""
    if "keras" in sys.modules:
        return str(sys.modules["keras"].backend.backend())
    if backend := os.environ.get("KERAS_BACKEND"):
        return backend
    folder = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((folder / "keras.json").read_text())["backend"])
    return "tensorflow"


def in_notebook() -> bool:
    """True in the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def terminal_width() -> int:
    """Columns of the terminal that stderr is, 80 if it does not say."""
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return shutil.get_terminal_size().columns
