"""Top-p selection against the smallest set found by sorting."""

import math

import pytest
import torch

from oracle import exact_smallest_set, selected
from rtpurbo.ops import index_scores, top_p_threshold
from rtpurbo.ops.select import GRID_STEPS, STEP_NATS

SLACK = 1e-5  # float32 rounding of sums and of edges near the peak


def rounded(scores: torch.Tensor) -> torch.Tensor:
    """What counts: whole grid steps, and nothing that lies the whole grid below the best."""
    grid = torch.floor(scores / STEP_NATS) * STEP_NATS
    return grid.masked_fill(grid <= grid.amax(-1, keepdim=True) - GRID_STEPS * STEP_NATS, -torch.inf)


def check_rule(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """The promises of `top_p_threshold`; returns what is kept."""
    threshold = top_p_threshold(scores, top_p)
    assert threshold.shape == (*scores.shape[:-1], 1)
    assert threshold.dtype == scores.dtype == torch.float32
    assert torch.equal(threshold, torch.floor(threshold / STEP_NATS) * STEP_NATS)
    kept = (scores >= threshold) & scores.isfinite()
    grid = rounded(scores)
    mass = torch.where(kept, grid.double().softmax(-1), 0.0).sum(-1)
    assert (mass >= top_p - SLACK).all()
    true_mass = torch.where(kept, scores.double().softmax(-1), 0.0).sum(-1)
    assert (true_mass >= top_p - STEP_NATS * top_p * (1 - top_p) - SLACK).all()  # what rounding can cost
    # a member of the exact set may be missing only where rounding decides, that is when p is reached without it
    exact = exact_smallest_set(grid, top_p - SLACK)
    assert (kept | ~exact).all()
    last = grid.masked_fill(~exact_smallest_set(grid, min(top_p + SLACK, 1.0)), math.inf).amin(-1, keepdim=True)
    least = torch.minimum(last, grid.amax(-1, keepdim=True) - STEP_NATS)
    assert not (kept & (grid < least)).any()
    return kept


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 12.0])
def test_random_scores(top_p, spread):
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        length = int(torch.randint(1, 300, (), generator=generator))
        scores = spread * torch.randn(3, 4, length, generator=generator)
        hidden = torch.rand(3, 4, length, generator=generator) < 0.3
        hidden[..., 0] = False
        check_rule(scores.masked_fill(hidden, -torch.inf), top_p)


@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.9])
def test_same_set_as_the_sorted_definition(top_p):
    for seed in range(20):
        scores = 2.5 * torch.randn(5, 200, generator=torch.Generator().manual_seed(seed))
        kept = scores >= top_p_threshold(scores, top_p)
        assert torch.equal(kept, selected(scores, top_p))


@pytest.mark.parametrize("top_p", [0.6, 0.99, 1.0])
@pytest.mark.parametrize("least", [1e-4, 1e-2, 0.3])
def test_a_least_probability_cuts_the_set_short(top_p, least):
    for seed in range(20):
        scores = 2.5 * torch.randn(5, 200, generator=torch.Generator().manual_seed(seed))
        kept = scores >= top_p_threshold(scores, top_p, least)
        low, high = (selected(scores, top_p, least * x) for x in (1 + 1e-5, 1 - 1e-5))
        assert (kept | ~low).all()
        assert (high | ~kept).all()
        best = torch.floor(scores / STEP_NATS).amax(-1, keepdim=True)
        tied = (torch.floor(scores / STEP_NATS) >= best - 1).sum(-1)  # kept in any case
        assert (kept.sum(-1) <= torch.maximum(tied, torch.tensor(1 / least + 1e-3))).all()


def test_a_higher_p_keeps_more():
    scores = 3 * torch.randn(20, 150)
    previous = torch.zeros_like(scores, dtype=torch.bool)
    for top_p in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0):
        kept = scores >= top_p_threshold(scores, top_p)
        assert (kept | ~previous).all()
        previous = kept
    assert previous.all()


def test_grid_edges():
    """Scores within one step count alike and are kept together; the step below the best is always kept."""
    scores = STEP_NATS * torch.tensor([[0.5, -0.001, -1.0, -3.5, -4.0, -4.001, -99.0]])
    weights = (STEP_NATS * torch.tensor([0.0, -1.0, -1.0, -4.0, -4.0, -5.0, -99.0])).softmax(-1)
    for members, kept in ((1, 3), (2, 3), (3, 3), (4, 5), (5, 5), (6, 6), (7, 7)):
        top_p = float(weights[:members].sum()) - 1e-4
        assert (scores >= top_p_threshold(scores, top_p)).sum() == kept


def test_rounding_does_not_tell_equal_tokens_apart():
    scores = torch.tensor([[3.0, torch.nextafter(torch.tensor(3.0), torch.tensor(0.0)), 1.0]])
    assert (scores >= top_p_threshold(scores, 0.05)).tolist() == [[True, True, False]]


def test_equal_scores_are_kept_together():
    scores = torch.full((2, 64), 3.0)
    assert (scores >= top_p_threshold(scores, 0.1)).all()


def test_p_one_keeps_everything_visible():
    scores = torch.tensor([[5.0, -400.0, -torch.inf, 0.0]])
    threshold = top_p_threshold(scores, 1.0)
    assert threshold.tolist() == [[-math.inf]]
    assert ((scores >= threshold) & scores.isfinite()).tolist() == [[True, True, False, True]]


def test_invisible_tokens_do_not_count():
    scores = 2 * torch.randn(6, 50)
    padded = torch.cat([scores, torch.full((6, 30), -torch.inf)], -1)
    torch.testing.assert_close(top_p_threshold(padded, 0.8), top_p_threshold(scores, 0.8))
    assert not (padded >= top_p_threshold(padded, 0.8))[:, 50:].any()


def test_row_that_sees_nothing_keeps_nothing():
    scores = torch.randn(3, 20)
    scores[1] = -torch.inf
    threshold = top_p_threshold(scores, 0.9)
    assert not threshold.isnan().any()
    kept = scores >= threshold
    assert not kept[1].any()
    assert kept[0].any()
    assert kept[2].any()


def test_mass_beyond_the_grid_does_not_count():
    scores = torch.full((1, 1 + int(math.exp(15))), -16.0)
    scores[0, 0] = 0.0
    assert top_p_threshold(scores, 0.9999).item() == -STEP_NATS  # though a quarter of the softmax lies at -16
    scores[0, 1:] = STEP_NATS - 16.0
    assert top_p_threshold(scores, 0.9999).item() == STEP_NATS - 16.0


def test_scores_spread_over_more_than_the_grid():
    for seed in range(10):
        scores = torch.empty(4, 120).uniform_(-80, 80, generator=torch.Generator().manual_seed(seed))
        kept = check_rule(scores, 0.95)
        assert kept.sum(-1).max() < 120


def test_single_token_rows():
    scores = torch.tensor([[7.0], [-300.0], [0.0]])
    for top_p in (0.01, 0.5, 0.999, 1.0):
        assert (scores >= top_p_threshold(scores, top_p)).all()


def test_common_offset_changes_nothing():
    moved = torch.randn(8, 90) + 1024.0
    scores = moved - 1024.0  # exact: both are multiples of 2**-13
    assert torch.equal(moved >= top_p_threshold(moved, 0.7), scores >= top_p_threshold(scores, 0.7))


def test_no_gradient_and_no_change_of_input():
    scores = torch.randn(4, 30, requires_grad=True)
    before = scores.detach().clone()
    assert not top_p_threshold(scores, 0.8).requires_grad
    assert torch.equal(scores.detach(), before)


def test_index_scores_accumulate_in_float32():
    q, k = torch.randn(2, 3, 5, 16).bfloat16(), torch.randn(2, 3, 7, 16).bfloat16()
    got = index_scores(q, k)
    assert got.dtype == torch.float32
    assert torch.equal(got, q.float() @ k.float().transpose(-1, -2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(index_scores(q, k), got)
