"""The head map: derived roles, choice by scores, text and dict forms, refusals."""

import json

import pytest

from rtpurbo.heads import HeadMap


def make(**changes) -> HeadMap:
    values = {"query_heads": 6, "kv_heads": 3, "granularity": "head", "retrieval": ((0, 1, 2), None, (), (5,)), **changes}
    return HeadMap(**values)


def test_derived_roles():
    heads = make()
    assert heads.group_size == 2
    assert heads.heads_per_unit == 1
    assert heads.layers == (0, 2, 3)
    assert [list(heads.group(g)) for g in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [heads.retrieval_heads(i) for i in range(4)] == [(0, 1, 2), (), (), (5,)]
    assert [heads.full_kv_heads(i) for i in range(4)] == [(0, 1), (), (), (2,)]
    assert [heads.units(i) for i in range(4)] == [(0, 0, 1), (), (), (2,)]
    assert heads.ratio == 4 / 18
    assert heads.full_kv_ratio == 3 / 9


def test_derived_roles_of_groups():
    heads = make(granularity="group", retrieval=((0, 1, 4, 5), None, (2, 3)))
    assert heads.heads_per_unit == 2
    assert [heads.units(i) for i in range(3)] == [(0, 2), (), (1,)]
    assert heads.units(0) == heads.full_kv_heads(0)
    assert heads.ratio == heads.full_kv_ratio == 0.5


def test_one_kv_head_per_query_head():
    heads = make(kv_heads=6, retrieval=((1, 4),))
    assert heads.full_kv_heads(0) == heads.units(0) == (1, 4)
    assert make(kv_heads=6, granularity="group", retrieval=((1, 4),)).units(0) == (1, 4)


def test_nothing_converted():
    heads = make(retrieval=(None, None))
    assert heads.layers == ()
    assert heads.ratio == heads.full_kv_ratio == 0.0


def test_uniform():
    dense = HeadMap.uniform(layers=[1, 2], num_layers=3, query_heads=4, kv_heads=2, dense=True)
    assert dense.retrieval == (None, (0, 1, 2, 3), (0, 1, 2, 3))
    assert dense.ratio == 1.0
    local = HeadMap.uniform(layers=[1, 2], num_layers=3, query_heads=4, kv_heads=2, dense=False)
    assert local.retrieval == (None, (), ())
    assert local.ratio == 0.0


SCORES = [[0.1, 0.9, 0.2, 0.3], None, [0.8, 0.05, 0.7, 0.6]]


@pytest.mark.parametrize(
    ("ratio", "retrieval"),
    [
        (0.125, ((1,), None, ())),
        (0.25, ((1,), None, (0,))),
        (0.5, ((1,), None, (0, 2, 3))),
        (1.0, ((0, 1, 2, 3), None, (0, 1, 2, 3))),
        (0.01, ((1,), None, ())),  # at least one
    ],
)
def test_highest_scores_of_the_whole_model(ratio, retrieval):
    heads = HeadMap.from_scores(SCORES, kv_heads=2, granularity="head", ratio=ratio)
    assert heads.retrieval == retrieval
    assert (heads.query_heads, heads.kv_heads, heads.granularity) == (4, 2, "head")


@pytest.mark.parametrize(
    ("ratio", "retrieval"),
    [(0.25, ((0, 1), None, ())), (0.5, ((0, 1), None, (0, 1))), (0.75, ((0, 1), None, (0, 1, 2, 3)))],
)
def test_a_group_scores_as_its_best_head(ratio, retrieval):
    assert HeadMap.from_scores(SCORES, kv_heads=2, granularity="group", ratio=ratio).retrieval == retrieval


def test_threshold_replaces_the_ratio():
    choose = {"kv_heads": 2, "granularity": "head", "ratio": 0.01}
    assert HeadMap.from_scores(SCORES, threshold=0.6, **choose).retrieval == ((1,), None, (0, 2, 3))
    assert HeadMap.from_scores(SCORES, threshold=0.0, **choose).ratio == 1.0
    with pytest.raises(ValueError, match=r"No head reaches threshold=0\.95; the highest score is 0\.900\."):
        HeadMap.from_scores(SCORES, threshold=0.95, **choose)


def test_ties_go_to_the_lower_layer_then_the_lower_head():
    even = [[0.5] * 4, [0.5] * 4]
    for ratio, retrieval in ((0.25, ((0, 1), ())), (0.5, ((0, 1, 2, 3), ())), (0.75, ((0, 1, 2, 3), (0, 1)))):
        assert HeadMap.from_scores(even, kv_heads=2, granularity="head", ratio=ratio).retrieval == retrieval
    assert HeadMap.from_scores(even, kv_heads=2, granularity="group", ratio=0.25).retrieval == ((0, 1), ())
    mixed = [[0.1, 0.5, 0.5, 0.5], [0.5, 0.9, 0.5, 0.1]]
    assert HeadMap.from_scores(mixed, kv_heads=2, granularity="head", ratio=0.375).retrieval == ((1, 2), (1,))


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match=r"scores of layer 1 must be finite numbers"):
        HeadMap.from_scores([[0.1, 0.2], [0.3, float("nan")]], kv_heads=1, granularity="head", ratio=0.5)


def test_no_scores_at_all_are_refused():
    with pytest.raises(ValueError, match=r"no layer has scores"):
        HeadMap.from_scores([None, None], kv_heads=1, granularity="head", ratio=0.5)


def test_overlap():
    mine = make(retrieval=((0, 1, 2), None, (), (5,)))
    other = make(retrieval=((0, 4), None, (5,), (5,)))
    assert mine.overlap(mine) == 1.0
    assert mine.overlap(other) == 0.5
    assert make(retrieval=((), ())).overlap(other) == 0.0


@pytest.mark.parametrize(
    "heads",
    [make(), make(granularity="group", retrieval=((0, 1), None, (2, 3, 4, 5))), make(kv_heads=6), make(retrieval=(None,))],
)
def test_dict_round_trip(heads):
    text = json.dumps(heads.to_dict())
    assert HeadMap.from_dict(json.loads(text)) == heads
    assert list(heads.to_dict()) == ["query_heads", "kv_heads", "granularity", "retrieval"]


WINDOWS = ((8, 8, 2), None, (4, 2, 2), (2, 3, 8))


def test_window_ladder():
    heads = make(windows=WINDOWS)
    assert heads.kv_windows(2, 8) == (4, 2, 2)
    assert make().kv_windows(2, 8) == (8, 8, 8)
    assert [heads.local_windows(i, 8) for i in heads.layers] == [(2,), (4, 2, 2), (2, 3)]
    assert heads.window_counts(8) == {2: 4, 3: 1, 4: 1}
    assert make().window_counts(8) == {8: 6}
    assert heads.held_windows(8) == [2, 4, 4, 4, 3, 3]
    assert make().held_windows(8) == [8] * 6
    heads.check_windows(8)
    make().check_windows(8)
    assert HeadMap.from_dict(json.loads(json.dumps(heads.to_dict()))) == heads
    assert heads.to_dict() == make().to_dict() | {"windows": [[8, 8, 2], None, [4, 2, 2], [2, 3, 8]]}
    assert str(heads) == f"{make()}\nwindows of local KV heads: 4 of 2 tokens, 1 of 3 tokens, 1 of 4 tokens"
    assert str(make(retrieval=(None,), windows=(None,))).endswith("windows of local KV heads: none")


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (
            ((8, 8, 2), None, (4, 2, 9), (2, 3, 8)),
            r"windows\[2\] of local KV head 2 must be at most window_tokens \(8\), got 9",
        ),
        (((8, 4, 2), None, (4, 2, 2), (2, 3, 8)), r"windows\[0\] of full KV head 1 must be window_tokens \(8\), got 4"),
    ],
)
def test_windows_that_do_not_fit_the_settings_are_refused(windows, message):
    with pytest.raises(ValueError, match=message):
        make(windows=windows).check_windows(8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "layer"}, r"granularity must be 'head' or 'group', got 'layer'\."),
        ({"kv_heads": 4}, r"query_heads must be a multiple of kv_heads \(4\), got 6\."),
        ({"kv_heads": 0}, r"query_heads must be a multiple of kv_heads \(0\), got 6\."),
        ({"retrieval": ((6,),)}, r"retrieval\[0\] must be ascending heads below 6, got \(6,\)\."),
        ({"retrieval": ((), (-1,))}, r"retrieval\[1\] must be ascending heads below 6, got \(-1,\)\."),
        ({"retrieval": ((1, 0),)}, r"retrieval\[0\] must be ascending heads below 6, got \(1, 0\)\."),
        ({"retrieval": ((1, 1),)}, r"retrieval\[0\] must be ascending heads below 6, got \(1, 1\)\."),
        ({"granularity": "group", "retrieval": ((0, 1, 2),)}, r"retrieval\[0\] must be made of whole KV groups, got"),
        ({"windows": WINDOWS[:3]}, r"windows must be one entry for each of 4 layers, got \(\(8, 8, 2\), None"),
        (
            {"windows": ((8, 8, 2), (8, 8, 2), *WINDOWS[2:])},
            r"windows\[1\] must be null, as the layer is left as it is, got",
        ),
        (
            {"windows": (None, *WINDOWS[1:])},
            r"windows\[0\] must be 3 windows \(one per KV head\) of at least 1 token, got None",
        ),
        ({"windows": ((8, 2), *WINDOWS[1:])}, r"windows\[0\] must be 3 windows .*, got \(8, 2\)"),
        ({"windows": ((8, 8, 0), *WINDOWS[1:])}, r"windows\[0\] must be 3 windows .*, got \(8, 8, 0\)"),
    ],
)
def test_impossible_maps_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"retrival": []},
            r"Unknown key 'retrival' in the head map; did you mean 'retrieval'\? Valid keys: query_heads, kv",
        ),
        ({"kv_head": 3}, r"Unknown key 'kv_head' in the head map; did you mean 'kv_heads'\?"),
        ({"retrieval": None}, r"heads\.retrieval must be a list with one entry per layer, got None\."),
        ({"retrieval": [3]}, r"heads\.retrieval\[0\] must be a list of head numbers or null, got 3\."),
        ({"retrieval": [["1"]]}, r"heads\.retrieval\[0\] must be a list of head numbers or null, got \['1'\]\."),
        ({"retrieval": [[1.5]]}, r"heads\.retrieval\[0\] must be a list of head numbers or null, got \[1\.5\]\."),
        ({"retrieval": [[True]]}, r"heads\.retrieval\[0\] must be a list of head numbers or null, got \[True\]\."),
        ({"query_heads": "6"}, r"query_heads in the head map must be a whole number, got '6'\."),
        ({"windows": 5}, r"heads\.windows must be a list with one entry per layer, got 5\."),
        ({"windows": ["8"]}, r"heads\.windows\[0\] must be a list of tokens or null, got '8'\."),
        ({"windows": [[8, 8, 2.5]]}, r"heads\.windows\[0\] must be a list of tokens or null, got \[8, 8, 2\.5\]\."),
        ({"retrieval": [[9]]}, r"retrieval\[0\] must be ascending heads below 6, got \(9,\)"),
    ],
)
def test_impossible_dicts_are_refused(changes, message):
    values = {"query_heads": 6, "kv_heads": 3, "granularity": "head", "retrieval": [[0]]}
    with pytest.raises(ValueError, match=message):
        HeadMap.from_dict({**values, **changes})


def test_missing_key_is_named():
    with pytest.raises(ValueError, match=r"the head map is incomplete.*kv_heads"):
        HeadMap.from_dict({"query_heads": 6, "granularity": "head", "retrieval": []})


def test_as_text():
    assert str(make()).splitlines() == [
        "  0  RR Rl ..",
        "  1  (left as it is)",
        "  2  .. .. ..",
        "  3  .. .. lR",
        "retrieval heads 22.2%, KV heads kept in full 33.3%",
    ]


def test_frozen():
    with pytest.raises(AttributeError):
        make().kv_heads = 2  # type: ignore[misc]
