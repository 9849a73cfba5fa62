"""Settings of every test run: one thread, no network, the same random numbers each time."""

import contextlib
import os
import resource
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import tiny_text

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer():
    """A token per word."""
    return tiny_text.word_tokenizer()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Prose for that tokenizer, as `rtpurbo.data` names it."""
    with tiny_text.text_source(tmp_path_factory.mktemp("text")) as name:
        yield name


@pytest.fixture(params=["tmpfs", "file size limit"])
def small_disk(request, tmp_path):
    """(directory, context manager) in which no more than 256 KiB can be written."""
    if request.param == "tmpfs":
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode:
            pytest.skip("no right to mount a file system")
        yield disk, contextlib.nullcontext
        subprocess.run(["umount", str(disk)], check=True)
        return

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, hard))  # Python ignores SIGXFSZ: writing fails instead
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield tmp_path, limited
