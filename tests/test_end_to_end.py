"""The whole-model benchmark replays the selections asked for, checks before it times, and keeps finished rows."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import rtpurbo
from rtpurbo.heads import HeadMap
from rtpurbo.indexer import make_indexer
from tiny_text import artifact_for, random_model, text_source, word_tokenizer

pytest.importorskip("triton")
FILE = Path(__file__).parent.parent / "benchmarks" / "end_to_end.py"
spec = importlib.util.spec_from_file_location("end_to_end", FILE)
end_to_end = importlib.util.module_from_spec(spec)
spec.loader.exec_module(end_to_end)

SHAPE = (
    "--layers 6 --hidden 32 --shape 8/4/16 --mlp 48 --vocabulary 97 --window 64 --mlp-tokens 200 --ratio 0.25 "
    "--prefill-far 0.2 --decode-far 0.4 --steps 2 --repeats 1 --device cpu --dtype float32"
).split()


def run(*args: object):
    """The benchmark of the tiny shape with more arguments."""
    return end_to_end.main([*SHAPE, *map(str, args)])


@pytest.mark.parametrize("granularity", ["group", "head"])
def test_a_random_model_replays_the_shares_asked_for(granularity, tmp_path, capsys):
    found = run("--lengths", 640, 1024, "--granularity", granularity, "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert [(row["length_tokens"], row["variant"]) for row in found["rows"]] == [
        (640, "sparse"), (640, "sdpa"), (1024, "sparse"), (1024, "sdpa"),
    ]  # fmt: skip
    for sparse, dense in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        assert sparse["selected_shares"]["prefill_tile"] == pytest.approx(0.2, abs=0.06)
        assert sparse["selected_shares"]["decode"] == pytest.approx(0.4, abs=0.08)
        assert min(sparse["ttft_seconds"], sparse["tpot_seconds"], dense["ttft_seconds"], dense["tpot_seconds"]) > 0
        assert dense["cache_bytes"] == 2 * 6 * 4 * dense["length_tokens"] * 16 * 4
        assert sparse["tpot_gpu_seconds"] is None
    assert sum(found["heads"]["units_by_layer"]) == (6 if granularity == "group" else 12)
    assert found["gate"]["largest_logit_difference"] < 1e-4
    assert "flash_attention_4" in found["skipped"]
    assert "sparse against the best dense: first token" in capsys.readouterr().out


def test_a_converted_model_selects_by_its_own_index(tmp_path):
    model = random_model(context=600)
    model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    artifact = artifact_for(model)
    indexer = make_indexer(artifact.heads, head_dim=16, index_dim=8).state_dict()
    dataclasses.replace(artifact, indexer=indexer).save(tmp_path / "out")
    with text_source(tmp_path) as source:
        found = run("--artifact", tmp_path / "out", "--model", tmp_path / "base", "--text", source, "--lengths", 4096)
    sparse, dense = found["rows"]
    assert sparse["length_tokens"] == 512  # whole tiles of what the context holds
    shares = sparse["selected_shares"]
    assert 0 < shares["prefill_position"] <= shares["prefill_tile"] <= 1
    assert 0 < shares["decode"] <= 1
    assert sparse["cache_bytes"] < dense["cache_bytes"]
    assert found["settings"]["artifact"] == "out"
    assert found["settings"]["model"] == "base"


def test_pieces_and_sliced_mlps_change_no_logits():
    args = end_to_end.parse([*SHAPE, "--lengths", "640"])
    model = end_to_end.random_model(args, "cpu")
    ids = torch.randint(97, (1, 640))
    _, whole = end_to_end.prefill(model, ids, 0)
    end_to_end.slice_mlps(model, 100)
    cache, pieces = end_to_end.prefill(model, ids, 256)
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == 640
    with end_to_end.running(model, "sdpa"):
        _, dense = end_to_end.prefill(model, ids, 0)
    assert (dense - whole).abs().max() > 1e-3  # the sparse model leaves something out
    shares = end_to_end.selected_shares(model, ids, chunk_tokens=256, tile_positions=32)
    end_to_end.check_shares(shares, far_tokens=250, prefill_far=0.2, decode_far=0.4)


def test_nothing_is_timed_when_the_replay_is_wrong(monkeypatch):
    monkeypatch.setattr(end_to_end.ReplayIndexer, "project_queries", end_to_end.LayerIndexer.project_queries)
    with pytest.raises(ValueError, match=r"Expected 0\.2000 of the far tokens selected in prefill_tile"):
        run("--lengths", 640)


def test_nothing_is_timed_when_a_short_prompt_is_wrong(monkeypatch):
    true = end_to_end.prefill
    monkeypatch.setattr(end_to_end, "prefill", lambda *args: (None, true(*args)[1] * float("nan")))
    with pytest.raises(ValueError, match="Expected the dense model's next token"):
        run("--lengths", 640)


def test_rows_survive_a_lack_of_memory(monkeypatch, tmp_path):
    true = end_to_end.decode

    def decode(model, cache, logits):
        if model.config._attn_implementation == "sdpa":
            raise torch.OutOfMemoryError("too little\nmore")
        return true(model, cache, logits)

    monkeypatch.setattr(end_to_end, "decode", decode)
    found = run("--lengths", 640, "--variants", "sdpa", "sparse", "--json", tmp_path / "out.json")
    dense, sparse = found["rows"]
    assert dense["out_of_memory"] == "too little"
    assert dense["ttft_seconds"] > 0
    assert "tpot_seconds" not in dense
    assert sparse["tpot_seconds"] > 0
    assert json.loads((tmp_path / "out.json").read_text()) == found


def test_a_kernel_that_cannot_be_called_is_skipped(monkeypatch):
    true = end_to_end.prefill

    def prefill(model, *args):
        if model.config._attn_implementation == "flash_attention_4":
            raise TypeError("an unexpected argument")
        return true(model, *args)

    monkeypatch.setattr(end_to_end, "prefill", prefill)
    monkeypatch.setattr(end_to_end, "is_flash_attn_4_available", lambda: True)
    found = run("--lengths", 640)
    assert found["skipped"] == {"flash_attention_4": "TypeError: an unexpected argument"}
    assert [row["variant"] for row in found["rows"]] == ["sparse", "sdpa"]


def test_a_stretched_map_keeps_the_depths():
    source = rtpurbo.Artifact.load(FILE.parent.parent / "artefacts" / "smollm2-135m-8k").heads
    units = [len(source.units(layer)) for layer in range(30)]

    def counts(layers: int, kv_heads: int, granularity: str, ratio: float = sum(units) / 90):
        found: HeadMap = end_to_end.stretched(
            source, layers=layers, query_heads=4 * kv_heads, kv_heads=kv_heads, granularity=granularity, ratio=ratio
        )
        return [len(found.units(layer)) for layer in range(layers)]

    assert counts(30, 3, "group") == units
    assert counts(60, 3, "group")[12:14] == [1, 1]  # layer 6 with one of its three groups
    large = counts(36, 8, "group", 0.15)
    assert sum(large) == 43
    assert sum(large[:7]) == sum(large[30:]) == 0
    assert sum(counts(36, 8, "head", 0.15)) == 173
    with pytest.raises(ValueError, match="ratio must leave every layer at most its 3 groups"):
        counts(30, 3, "group", 0.9)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"lengths must be at least 392 tokens, .* got 300"):
        run("--lengths", 300)
    with pytest.raises(ValueError, match="chunk_tokens must be 0 or a multiple of 128, got 100"):
        run("--lengths", 640, "--chunk-tokens", 100)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        run("--lengths", 640, "--steps", 0)
    with pytest.raises(ValueError, match="index_dim must be even, for the scores of prefill and of decode, got 5"):
        run("--lengths", 640, "--index-dim", 5)
