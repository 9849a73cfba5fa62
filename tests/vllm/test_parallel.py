"""Two tensor-parallel processes on a CPU, with heads that cannot be dealt out evenly."""

import pytest
from served import answers, counter, engine, exported, prompts, reference

HEADS = {
    "group": [(0, 1), (), (0, 1, 4, 5, 6, 7)],
    "head": [(0,), (3, 5), ()],
}


@pytest.mark.parametrize("granularity", HEADS)
def test_two_processes(tmp_path, granularity):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    served = exported(tmp_path, HEADS[granularity], granularity=granularity, **shape)
    asked = prompts(17, 200, 41)
    want = reference(served, asked)
    with engine(served, tensor_parallel_size=2, enable_prefix_caching=True) as llm:
        assert answers(llm, asked) == want
        assert answers(llm, asked) == want
        assert counter(llm, "prefix_cache_hits") > 0
