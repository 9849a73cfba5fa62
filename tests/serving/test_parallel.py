"""Two tensor-parallel processes on a CPU, with heads that cannot be dealt out evenly."""

from served import answers, counter, engine, exported, prompts, reference

RETRIEVAL = [(0, 3), (), (4, 5, 6, 7)]
"""Single query heads: one process has two index units on two full KV heads in layer 0, the other four on two in layer 2."""


def test_two_processes(tmp_path):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    served = exported(tmp_path, RETRIEVAL, granularity="head", **shape)
    asked = prompts(17, 200, 41)
    want = reference(served, asked)
    with engine(served, tensor_parallel_size=2, enable_prefix_caching=True) as llm:
        assert answers(llm, asked) == want
        assert answers(llm, asked) == want
        assert counter(llm, "prefix_cache_hits") > 0
