"""Settings of every test run: one thread, no network, the same random numbers each time."""

import os

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
