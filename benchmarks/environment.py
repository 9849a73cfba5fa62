"""What a benchmark's result belongs to."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

import rtpurbo


def environment(commit: str | None = None) -> dict[str, str | None]:
    """Device, versions and commit of a result; `commit`: where the checkout cannot say it."""
    found: dict[str, str | None] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("transformers", "triton", "flash-attn-4"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return found | {"rtpurbo": rtpurbo.__version__, "commit": commit or head or None}
