"""SmolLM2 converted, exported and served: a short chat through vLLM's OpenAI-compatible server, by OpenAI's client."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest

import rtpurbo
from rtpurbo.data import documents
from rtpurbo.export import export

ARTEFACT = Path(__file__).parents[2] / "artefacts" / "smollm2-135m-8k"
NEW = 24


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The shipped artefact, exported in float32, in which a CPU's tokens do not depend on the batch."""
    return export(ARTEFACT, tmp_path_factory.mktemp("smollm2") / "served", dtype="float32")


@pytest.fixture(scope="module")
def client(served):
    """OpenAI's client of a server in processes of its own; without torch.compile, which takes minutes for 30 layers here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = open(served.parent / "server.log", "w+")  # noqa: SIM115
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", served, "--served-model-name", "sparse",
         "--port", str(port), "--max-model-len", "4096", "--max-num-seqs", "4", "--dtype", "float32", "--enforce-eager"],
        env=env, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    try:
        for _ in range(400):
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                if server.poll() is not None:
                    break
                time.sleep(1)
        else:
            pytest.fail("The server did not come up.")
        if server.poll() is not None:
            log.seek(0)
            pytest.fail(f"The server ended: {log.read()[-3000:]}")
        yield client
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def test_a_chat_gives_what_transformers_gives(served, client):
    """A question, one about a text longer than the window, the same again from the cache, and a second turn."""
    model, tokenizer = rtpurbo.load(served, dtype="float32")
    assert model.config.rtpurbo["sparse"]["window_tokens"] < 1300
    text = tokenizer.decode(documents(("installed-docs",), tokenizer, length_tokens=1300, count=1, seed=0)[0])
    longer = f"{text}\n\nThe password of the gate is heron.\n\n{text[:400]}\n\nWhat is the password of the gate?"
    talks = [[{"role": "user", "content": content}] for content in ("Name three colours.", longer, longer)]
    talks.append([*talks[0], {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Two more, please."}])
    for talk in talks:
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
        got = client.chat.completions.create(model="sparse", messages=talk, temperature=0, max_tokens=NEW)
        assert got.usage.prompt_tokens == ids["input_ids"].shape[1]
        assert got.choices[0].message.content == tokenizer.decode(out, skip_special_tokens=True)


def test_streaming(client):
    question = [{"role": "user", "content": "Name three colours."}]
    whole = client.chat.completions.create(model="sparse", messages=question, temperature=0, max_tokens=NEW)
    pieces = client.chat.completions.create(model="sparse", messages=question, temperature=0, max_tokens=NEW, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content


def test_metrics_count_hits_of_the_prefix_cache(client):
    """Of the longer question that was asked twice."""
    text = urllib.request.urlopen(f"{client.base_url}".removesuffix("v1/") + "metrics").read().decode()
    lines = [line for line in text.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    assert sum(float(line.split()[-1]) for line in lines) > 1024
