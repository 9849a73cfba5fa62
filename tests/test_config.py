"""Settings: limits with their messages, unknown keys, and the frozen public surface."""

import ast
import dataclasses
import inspect
import itertools

import pytest

import rtpurbo
from rtpurbo import checkpoint, config
from rtpurbo.config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig, SparseConfig, TrainConfig, from_dict
from rtpurbo.pipeline import PAPER, ConvertConfig

ALL = [SparseConfig, CalibrateConfig, TrainConfig, IndexerConfig, DistillConfig, EvalConfig]


def test_public_names():
    assert rtpurbo.__all__ == [
        "Artifact",
        "HeadMap",
        "SparseConfig",
        "calibrate",
        "convert",
        "distill",
        "evaluate",
        "load",
        "sparsify",
        "train_indexer",
    ]
    for name in ("Artifact", "HeadMap", "SparseConfig", "calibrate", "distill", "evaluate", "load", "sparsify"):
        assert getattr(rtpurbo, name).__name__ == name
    assert rtpurbo.SparseConfig is SparseConfig
    with pytest.raises(AttributeError, match=r"module 'rtpurbo' has no attribute 'sparsifi'"):
        rtpurbo.sparsifi  # noqa: B018


def test_artefact_keys():
    assert checkpoint._KEYS == ("format_version", "base_model", "sparse", "heads", "stages", "indexer", "weights")
    assert checkpoint.FORMAT_VERSION == 1
    assert checkpoint.CONFIG_FILE == "rtpurbo_config.json"
    fields = [f.name for f in dataclasses.fields(rtpurbo.Artifact)]
    assert fields == ["base_model", "config", "heads", "stages", "indexer", "weights_kind", "weights_path"]


def test_sparse_config_fields_and_defaults():
    assert dataclasses.asdict(SparseConfig()) == {
        "window_tokens": 8192, "sink_tokens": 4, "index_dim": 16, "top_p": 1.0, "min_probability": 1e-4,
        "tile_probability": 0.0, "index_dtype": "auto", "dense_below_tokens": 0,
        "dense_end_tokens": 0,
    }  # fmt: skip


def test_tiles_need_a_selection():
    with pytest.raises(ValueError, match=r"tile_probability must be 0 where everything is selected .*, got 0\.1\."):
        SparseConfig(top_p=1.0, min_probability=0.0, tile_probability=0.1)
    by_tile = SparseConfig(tile_probability=0.1)
    assert by_tile.by_p(1.0).tile_probability == by_tile.by_p(0.9).tile_probability == 0.0
    assert by_tile.rule == "index probability at least 0.0001; in prefill by tile at 0.1"
    assert SparseConfig(top_p=0.9, min_probability=0.0, dense_end_tokens=1280).rule == (
        "p = 0.9; a prompt's last 1,280 tokens read densely"
    )


def test_newer_settings_are_named_only_where_they_are_not_the_default():
    """So that artefacts, checksums and records of stages from before them stay what they are."""
    plain, small = SparseConfig(), SparseConfig(index_dtype="float8")
    newer = {"tile_probability", "index_dtype", "dense_below_tokens", "dense_end_tokens"}
    assert plain.to_dict() == {key: value for key, value in dataclasses.asdict(plain).items() if key not in newer}
    assert small.to_dict() == {**plain.to_dict(), "index_dtype": "float8"}
    assert SparseConfig(dense_below_tokens=9).to_dict() == {**plain.to_dict(), "dense_below_tokens": 9}
    for sparse in (plain, small):
        assert from_dict(SparseConfig, sparse.to_dict(), where="here") == sparse
        assert sparse.with_options(index_dtype=None) == sparse
        assert sparse.with_options(index_dtype="float8") == small
    assert (plain.index_bytes(2), small.index_bytes(2)) == (32, 16)


@pytest.mark.parametrize("cls", ALL)
def test_frozen_and_keyword_only(cls):
    instance = cls()
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, field, getattr(instance, field))
    with pytest.raises(TypeError):
        cls(1)


@pytest.mark.parametrize("cls", ALL)
def test_every_field_is_documented(cls):
    """A field's docstring is its help text, so that each one must have it, in the class or in one it inherits from."""
    documented = set()
    for base in cls.__mro__[:-1]:
        body = ast.parse(inspect.getsource(base)).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert text.value.value.strip()
                documented.add(field.target.id)
    assert {f.name for f in dataclasses.fields(cls)} <= documented


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (SparseConfig, {"window_tokens": 0}, r"window_tokens must be at least 1 token, got 0\."),
        (SparseConfig, {"sink_tokens": -1}, r"sink_tokens must be 0 or more tokens, got -1\."),
        (SparseConfig, {"index_dim": 0}, r"index_dim must be at least 1, got 0\."),
        (SparseConfig, {"dense_end_tokens": -1}, r"dense_end_tokens must be 0 or more tokens, got -1\."),
        (EvalConfig, {"dense_end_tokens": -1}, r"dense_end_tokens must be 0 or more tokens, got -1\."),
        (SparseConfig, {"index_dtype": "float16"}, r"index_dtype must be 'auto' or 'float8', got 'float16'\."),
        (SparseConfig, {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0\."),
        (SparseConfig, {"top_p": 1.01}, r"top_p must be in \(0, 1\], got 1\.01\."),
        (SparseConfig, {"top_p": float("nan")}, r"top_p must be in \(0, 1\], got nan\."),
        (CalibrateConfig, {"granularity": "layer"}, r"granularity must be 'auto', 'head' or 'group', got 'layer'\."),
        (CalibrateConfig, {"retrieval_ratio": 0}, r"retrieval_ratio must be in \(0, 1\], got 0\."),
        (CalibrateConfig, {"threshold": 2.0}, r"threshold must be in \[0, 1\], got 2\.0\."),
        (CalibrateConfig, {"text_weight": -1.0}, r"text_weight must be 0 or more, got -1\.0\."),
        (CalibrateConfig, {"window_mass": 0.0}, r"window_mass must be in \(0, 1\], got 0\.0\."),
        (CalibrateConfig, {"target_recovery": 0.0}, r"target_recovery must be in \(0, 1\], got 0\.0\."),
        (
            CalibrateConfig,
            {"target_recovery": 0.99, "threshold": 0.5},
            r"threshold \(0\.5\) and target_recovery \(0\.99\) both say how many heads retrieve; leave one of them out\.",
        ),
        (CalibrateConfig, {"needle_tokens": 7}, r"needle_tokens must be at least 8 tokens, got 7\."),
        (TrainConfig, {"steps": -1}, r"steps must be 0 or more, got -1\."),
        (TrainConfig, {"learning_rate": 0.0}, r"learning_rate must be above 0, got 0\.0\."),
        (IndexerConfig, {"steps": -1}, r"steps must be 0 or more, got -1\."),
        (IndexerConfig, {"start": "svd"}, r"start must be 'closed_form' or 'random', got 'svd'\."),
        (DistillConfig, {"batch_size": 0}, r"batch_size must be at least 1, got 0\."),
        (DistillConfig, {"lora_layers": 0.0}, r"lora_layers must be in \(0, 1\], got 0\.0\."),
        (DistillConfig, {"weights": "qlora"}, r"weights must be 'lora' or 'full', got 'qlora'\."),
        (EvalConfig, {"lengths_tokens": (0,)}, r"lengths_tokens must be 1 or more, got \(0,\)\."),
        (EvalConfig, {"samples": (-1,)}, r"samples must be 0 or more, got \(-1,\)\."),
        (EvalConfig, {"samples": ()}, r"samples must be one number, or one per length, got \(\)\."),
        (
            EvalConfig,
            {"samples": (1, 2, 3), "lengths_tokens": (512, 1024)},
            r"samples must be one number, or one per length, got \(1, 2, 3\)\.",
        ),
        (EvalConfig, {"loss_documents": -1}, r"loss_documents must be 0 or more, got -1\."),
        (EvalConfig, {"decode_tokens": -1}, r"decode_tokens must be 0 or more, got -1\."),
        (EvalConfig, {"short_documents": -1}, r"short_documents must be 0 or more, got -1\."),
        (EvalConfig, {"squad_samples": 0}, r"squad_samples must be 1 or more, got 0\."),
        (EvalConfig, {"long_tokens": 7}, r"long_tokens must be 0 or at least 8, got 7\."),
        (EvalConfig, {"long_prompts": 0}, r"long_prompts must be 1 or more, got 0\."),
        (EvalConfig, {"task_limit": 0}, r"task_limit must be 1 or more, got 0\."),
        (TrainConfig, {"shortest_tokens": -1}, r"shortest_tokens must be 0 or more tokens, got -1\."),
        (EvalConfig, {"kinds": ("single", "double")}, r"kinds must be among single, multi_key, .*, got 'double'\."),
    ],
)
def test_limits(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


@pytest.mark.parametrize(
    "values", [{"window_tokens": 1}, {"sink_tokens": 0}, {"index_dim": 1}, {"top_p": 1.0}, {"top_p": 1e-6}]
)
def test_limits_themselves_are_allowed(values):
    assert dataclasses.replace(SparseConfig(), **values) == SparseConfig(**values)


@pytest.mark.parametrize("cls", ALL)
def test_dict_round_trip(cls):
    assert from_dict(cls, dataclasses.asdict(cls()), where="here") == cls()


@pytest.mark.parametrize(
    ("key", "nearest"), [("window", "window_tokens"), ("sinks", "sink_tokens"), ("topp", "top_p"), ("dim", "index_dim")]
)
def test_unknown_key_names_the_nearest(key, nearest):
    message = rf"Unknown key '{key}' in the file; did you mean '{nearest}'\? Valid keys: window_tokens, sink_tokens, "
    with pytest.raises(ValueError, match=message):
        from_dict(SparseConfig, {key: 1}, where="the file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_tokens": "8"}, r"window_tokens in the file must be a whole number, got '8'\."),
        ({"window_tokens": 8.5}, r"window_tokens in the file must be a whole number, got 8\.5\."),
        ({"window_tokens": True}, r"window_tokens in the file must be a whole number, got True\."),
        ({"sink_tokens": None}, r"sink_tokens in the file must be a whole number, got None\."),
        ({"top_p": "0.9"}, r"top_p in the file must be a number, got '0\.9'\."),
        ({"top_p": 5}, r"top_p must be in \(0, 1\], got 5\."),
    ],
)
def test_wrong_types_in_a_file(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(SparseConfig, values, where="the file")


def test_a_whole_number_is_a_number():
    assert from_dict(SparseConfig, {"top_p": 1}, where="the file").top_p == 1


@pytest.mark.parametrize(
    ("context", "window"), [(128, 256), (2048, 256), (4096, 512), (32768, 4096), (65536, 8192), (1 << 20, 8192)]
)
def test_default_window(context, window):
    assert config.default_window_tokens(context) == window


def test_the_papers_recipe_is_what_the_paper_says():
    """Its numbers (arXiv 2605.16928), field by field, and what is left to this project's defaults."""
    got, default = dataclasses.asdict(PAPER), dataclasses.asdict(ConvertConfig())
    said = {
        "calibrate": {"granularity": "head", "retrieval_ratio": 0.15, "scoring": "needle", "documents": 3},
        "indexer": {"steps": 600, "start": "random", "far_weighting": False, "near_as_one": False, "retrieval_ratio": 0.0},
        "distill": {
            "steps": 600, "batch_size": 1, "labels": 2048, "weights": "full", "top_logits": 10, "answer_weight": 0.0,
            "retrieval_ratio": 0.0, "learning_rate": 2e-5,
        },
        "evaluate": {},
    }  # fmt: skip
    for part, values in said.items():
        assert got.pop(part) == default.pop(part) | values
    assert got == default | {"top_p": 0.9, "min_probability": 0.0, "dense_end_tokens": 0}
    sparse = PAPER.sparse(context=131072)
    assert (sparse.window_tokens, sparse.sink_tokens, sparse.index_dim) == (8192, 4, 16)
    assert (sparse.top_p, sparse.min_probability, sparse.tile_probability) == (0.9, 0.0, 0.0)
    assert PAPER.sparse(context=8192).window_tokens == 1024
    assert PAPER.distill.steps * PAPER.distill.labels == pytest.approx(1.2e6, rel=0.05)


def test_groups_are_chosen_whole_where_they_are_small():
    assert [CalibrateConfig().chosen_unit(size) for size in (1, 4, 5, 8)] == ["group", "group", "head", "head"]
    for asked in ("head", "group"):
        assert {CalibrateConfig(granularity=asked).chosen_unit(size) for size in (1, 3, 8)} == {asked}
