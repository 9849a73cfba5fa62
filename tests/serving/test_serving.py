"""An exported model in vLLM gives, token by token, what Transformers gives for it."""

import dataclasses

import pytest
from served import (
    CONFIG,
    CONTEXT,
    HEADS,
    NEW,
    PAGE,
    UNEVEN,
    answers,
    counter,
    engine,
    exported,
    managers,
    prompts,
    reference,
)

from rtpurbo.config import SparseConfig
from rtpurbo.vllm_plugin.cache import SinkWindowManager

LENGTHS = (17, 200, 333, 41)
CASES = {
    "uneven groups": ("llama", "group", UNEVEN, {}),
    "single heads": ("llama", "head", HEADS, {}),
    "no retrieval": ("llama", "group", [(), (), ()], {}),
    "all retrieve": ("llama", "group", [range(6)] * 3, {}),
    "no index": ("llama", "group", UNEVEN, {"indexed": False}),
    "float8 index": ("llama", "head", HEADS, {"config": dataclasses.replace(CONFIG, index_dtype="float8")}),
    "least probability": (
        "llama", "group", UNEVEN, {"config": dataclasses.replace(CONFIG, top_p=1.0, min_probability=0.01)},
    ),
    "by tile": (
        "llama", "group", UNEVEN,
        {"config": dataclasses.replace(CONFIG, top_p=1.0, min_probability=0.01, tile_probability=0.02)},
    ),
    "window ladder": ("llama", "group", UNEVEN, {"windows": ((40, 20, 12), (24, 40, 16), (40, 8, 40))}),
    "dense end": ("llama", "head", HEADS, {"config": dataclasses.replace(CONFIG, dense_end_tokens=30)}),
    "no sinks": ("llama", "group", UNEVEN, {"config": dataclasses.replace(CONFIG, sink_tokens=0)}),
    "mistral": ("mistral", "group", UNEVEN, {}),
    "qwen2": ("qwen2", "group", UNEVEN, {"hidden_size": 192}),
    "qwen3": ("qwen3", "head", HEADS, {}),
    "qwen3_moe": ("qwen3_moe", "group", UNEVEN, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_batches_equal_transformers(tmp_path, case):
    family, granularity, retrieval, options = CASES[case]
    rows = [tuple(row) for row in retrieval]
    served = exported(tmp_path, rows, family=family, granularity=granularity, **options)
    asked = prompts(*LENGTHS)
    want = reference(tmp_path / "out", asked)
    assert reference(served, asked) == want
    if case != "all retrieve":
        assert want[1:] != reference(tmp_path / "dense", asked)[1:]
    with engine(served) as llm:
        assert answers(llm, asked) == want


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(directory of an exported model, prompts, their continuations)."""
    path = tmp_path_factory.mktemp("model")
    asked = prompts(*LENGTHS)
    served = exported(path, UNEVEN)
    return served, asked, reference(path / "out", asked)


def test_a_window_that_holds_everything_equals_stock_vllm(tmp_path):
    served = exported(
        tmp_path, UNEVEN, config=SparseConfig(window_tokens=CONTEXT, index_dim=16, top_p=0.6, min_probability=0.0)
    )
    asked = prompts(*LENGTHS)
    with engine(tmp_path / "dense", block_size=32) as llm:  # vLLM's own backend on CPUs takes multiples of 32
        want = answers(llm, asked)
    with engine(served, block_size=32) as llm:
        assert answers(llm, asked) == want


def test_under_torch_compile(tmp_path):
    """As a server runs it by default: the layers are traced and compiled, attention is called between the pieces."""
    served = exported(tmp_path, HEADS, family="qwen3", granularity="head")
    asked = prompts(*LENGTHS)
    with engine(served, enforce_eager=False) as llm:
        assert answers(llm, asked) == reference(served, asked)


@pytest.mark.parametrize("tokens", [48, 33])
def test_chunked_prefill(model, tokens):
    served, asked, want = model
    with engine(served, max_num_batched_tokens=tokens, max_num_seqs=4) as llm:
        assert answers(llm, asked) == want


@pytest.mark.parametrize("tokens", [48, 37])
def test_prompts_read_densely_in_chunks(tmp_path, tokens):
    """However a prompt is cut: local heads keep all of it until it is read, then its sinks and window."""
    config = dataclasses.replace(CONFIG, dense_end_tokens=CONTEXT)
    served = exported(tmp_path, HEADS, granularity="head", config=config)
    asked = prompts(*LENGTHS)
    want = reference(served, asked)
    assert want != reference(served, asked, dense_end_tokens=0)
    with engine(served, max_num_batched_tokens=tokens, max_num_seqs=4) as llm:
        assert answers(llm, asked) == want
        local = [manager for manager in managers(llm) if isinstance(manager, SinkWindowManager)]
        core = llm.llm_engine
        from vllm import SamplingParams

        core.add_request("one", {"prompt_token_ids": asked[2]}, SamplingParams(temperature=0.0, max_tokens=NEW))
        (request,) = core.engine_core.engine_core.scheduler.requests.values()
        steps = -(-len(asked[2]) // tokens)
        for step in range(steps + 4):
            core.step()
            blocks = [manager.req_to_blocks[request.request_id] for manager in local]
            empty = [sum(block.is_null for block in some) for some in blocks]
            if step < steps:
                assert empty == [0] * len(local)
        assert min(empty) > 10


def test_preempted_requests_resume(model):
    served, _, _ = model
    asked = prompts(150, 140, 130, 120)
    want = reference(served, asked, new=80)
    with engine(served, num_gpu_blocks_override=80, max_model_len=256) as llm:
        assert answers(llm, asked, new=80) == want
        assert counter(llm, "num_preemptions") > 0


def continued(prompt: list[int], answer: list[int]) -> list[int]:
    """The next turn of a talk."""
    return [*prompt, *answer, *prompts(20)[0]]


@pytest.mark.parametrize("retention", [None, 0])
def test_prefix_caching(model, retention):
    """The same prompts twice, and longer ones that begin with them: read from the cache, and the same tokens."""
    served, asked, want = model
    later = [continued(*pair) for pair in zip(asked, want, strict=True)]
    want_later = reference(served, later)
    with engine(served, enable_prefix_caching=True, prefix_cache_retention_interval=retention) as llm:
        assert answers(llm, asked) == want
        assert counter(llm, "prefix_cache_hits") == 0
        assert answers(llm, asked) == want
        again = counter(llm, "prefix_cache_hits")
        whole = sum((len(prompt) - 1) // PAGE * PAGE for prompt in asked)
        assert again == whole
        assert answers(llm, later) == want_later
        assert counter(llm, "prefix_cache_hits") >= again + whole


def test_prefix_caching_when_blocks_are_short(model):
    """Cached blocks are evicted and used again all the time."""
    served, _, _ = model
    asked = prompts(150, 140, 130, 120)
    want = reference(served, asked, new=40)
    with engine(served, enable_prefix_caching=True, num_gpu_blocks_override=80, max_model_len=256) as llm:
        for _ in range(3):
            assert answers(llm, asked, new=40) == want
        for prompt, tokens in zip(asked, want, strict=True):
            for _ in range(2):
                assert answers(llm, [prompt], new=40) == [tokens]
        assert counter(llm, "prefix_cache_hits") > 0


@pytest.mark.parametrize("method", ["add_local_computed_blocks", "find_longest_cache_hit"])
def test_the_test_of_prefix_caching_itself(model, monkeypatch, method):
    """With vLLM's own method in place of ours a hit reads an empty block and gives other tokens."""
    served, asked, want = model
    monkeypatch.delattr(SinkWindowManager, method)
    with engine(served, enable_prefix_caching=True) as llm:
        assert answers(llm, asked) == want
        assert answers(llm, asked) != want
        assert counter(llm, "prefix_cache_hits") > 0


def test_live_blocks_of_local_heads(model):
    """After every step each local pool holds the blocks of sinks and window, no others, and the full pool all of them."""
    served, asked, _ = model
    with engine(served) as llm:
        full, *local = sorted(managers(llm), key=lambda manager: isinstance(manager, SinkWindowManager))
        core = llm.llm_engine
        from vllm import SamplingParams

        core.add_request("one", {"prompt_token_ids": asked[2]}, SamplingParams(temperature=0.0, max_tokens=NEW))
        (request,) = core.engine_core.engine_core.scheduler.requests.values()
        name, free = request.request_id, full.block_pool.get_num_free_blocks()
        for step in range(NEW):
            core.step()
            if step == NEW - 1:
                break
            computed = len(asked[2]) + step  # tokens in the cache
            written = -(-computed // PAGE)
            if step < 2:
                continue  # blocks of the prompt are freed when the next steps begin
            first = max(0, computed - 1 - CONFIG.window_tokens + 1) // PAGE
            expected = {0, *range(first, written)}
            for manager in local:
                blocks = manager.req_to_blocks[name]
                assert {i for i, block in enumerate(blocks[:written]) if not block.is_null} == expected
            assert not any(block.is_null for block in full.req_to_blocks[name])
            used = free - full.block_pool.get_num_free_blocks()
            assert used == written + len(local) * len(expected)
