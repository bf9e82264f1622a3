import itertools

import pytest
import torch

from converters.fitting import descent, feedback, least_squares
from converters.fitting.layer import dense_weight, fit_static, pack, relative_error
from converters.fitting.propagation import Moments, target
from converters.fitting.svid import rank_one
from tests.converters.fitting.problems import problem, signs_of

ODD = [(24, 40), (7, 33), (33, 71), (1, 8)]


def start(W):
    a, b = rank_one(W.abs())
    return signs_of(W), a, b


@pytest.mark.parametrize(("N", "K"), ODD)
def test_least_squares_leave_no_gradient(N, K):
    W, H = problem(N, K)
    B, _, b = start(W)
    a = least_squares.solve_a(W, B, b, H).requires_grad_()
    (grad,) = torch.autograd.grad(least_squares.loss(W, B, a, b, H), a)
    assert grad.abs().max() < 1e-9 * (W @ H * W).sum()
    a = a.detach()
    b = least_squares.solve_b(W, B, a, H).requires_grad_()
    (grad,) = torch.autograd.grad(least_squares.loss(W, B, a, b, H), b)
    # The ridge of 1e-9 is what is left.
    assert grad.abs().max() < 1e-6 * (W @ H * W).sum()


def test_alternating_least_squares_never_raise_the_loss():
    W, H = problem()
    B, _, b = start(W)
    losses = [
        float(least_squares.loss(W, B, *least_squares.solve(W, B, b, H, n), H)) for n in range(6)
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


def test_least_squares_recover_exact_scales():
    W, H = problem()
    B, a, b = signs_of(W), torch.rand(24).double() + 0.5, torch.rand(40).double() + 0.5
    exact = a[:, None] * B * b
    found = least_squares.solve(exact, B, torch.ones(40).double(), H, rounds=200)
    torch.testing.assert_close(found[0][:, None] * B * found[1], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("N", "K"), ODD)
def test_a_sweep_never_raises_the_loss_and_counts_its_flips(N, K):
    W, H = problem(N, K)
    W *= 0.02  # as small as real weights: thresholds other than 0 would show
    B, a, b = start(W)
    before = float(least_squares.loss(W, B, a, b, H))
    for _ in range(4):
        old = B.clone()
        flips = descent.sweep(W, B, a, b, H)
        after = float(least_squares.loss(W, B, a, b, H))
        assert flips == int((B != old).sum())
        assert after <= before * (1 + 1e-12)
        assert (after < before) == (flips > 0)
        before = after


def test_sweeps_end_where_no_single_flip_helps():
    W, H = problem(5, 40)
    B, a, b = start(W)
    while descent.sweep(W, B, a, b, H):
        pass
    best = least_squares.loss(W, B, a, b, H)
    for i in range(5):
        for j in range(40):
            flipped = B.clone()
            flipped[i, j] *= -1
            assert least_squares.loss(W, flipped, a, b, H) >= best * (1 - 1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_feedback_beats_plain_signs_on_correlated_inputs(power):
    W, H = problem(64, 96, power)
    B, a, b = start(W)
    plain = least_squares.loss(W, B, a, b, H)
    fed = least_squares.loss(W, feedback.signs(W, a, b, H), a, b, H)
    assert fed < {0.5: 0.95, 1.0: 0.7, 1.5: 0.4}[power] * plain


def test_feedback_on_uncorrelated_inputs_is_plain_signs():
    W, _ = problem()
    _, a, b = start(W)
    H = torch.diag(torch.rand(40).double() + 0.5)
    assert torch.equal(feedback.signs(W, a, b, H), signs_of(W))


def test_feedback_is_gptq_written_out():
    """Column by column, the columns that remain are re-solved exactly (Optimal Brain Surgeon)."""
    W, H = problem(3, 9)
    _, a, b = start(W)
    order = H.diagonal().argsort(descending=True)
    work, expected, left = W.clone(), torch.empty_like(W), order.tolist()
    while left:
        j, *rest = left
        expected[:, j] = signs_of(work[:, j])
        error = work[:, j] - a * b[j] * expected[:, j]
        if rest:
            # min over delta of (error, -delta) H (error, -delta)^T
            delta = torch.linalg.solve(H[rest][:, rest], H[rest, j])
            work[:, rest] += torch.outer(error, delta)
        left = rest
    assert torch.equal(feedback.signs(W, a, b, H), expected)


def test_inverse_factor_factors_the_inverse():
    _, H = problem()
    U = feedback.inverse_factor(H)
    torch.testing.assert_close(U.T @ U @ H, torch.eye(40).double())
    assert torch.equal(U, U.triu())


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_whole_fit_beats_each_of_its_parts(power):
    W, H = problem(64, 96, power, dtype=torch.float32)
    whole = relative_error(W, fit_static(W, H), H)
    a, b = rank_one(W.abs())
    plain = least_squares.loss(W, signs_of(W), *least_squares.solve(W, signs_of(W), b, H), H)
    fed = feedback.signs(W, a, b, H)
    fed_loss = least_squares.loss(W, fed, *least_squares.solve(W, fed, b, H), H)
    total = (W @ H * W).sum()
    assert whole < 0.99 * fed_loss / total
    assert fed_loss < plain


@pytest.mark.parametrize("E", [1, 4])
def test_packing_keeps_the_layer(E):
    W, H = problem(16, 33, dtype=torch.float32)
    layer = fit_static(W, H)
    found = dense_weight(pack(layer, E, torch.float16))
    expected = layer.a[:, None] * layer.B * layer.b
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def moments_of(X, X_hat, missing=None, weights=None, parts=3):
    N = None if missing is None else missing.shape[1]
    total = Moments.zeros(X.shape[1], N)
    for index in torch.arange(len(X)).chunk(parts):
        part = Moments.zeros(X.shape[1], N)
        part.add(
            X[index],
            X_hat[index],
            None if missing is None else missing[index],
            None if weights is None else weights[index],
        )
        total += part
    return total


@pytest.mark.parametrize("weighted", [False, True])
def test_the_target_is_the_least_squares_solution(weighted):
    torch.manual_seed(0)
    X, W = torch.randn(200, 12), torch.randn(5, 12)
    X_hat, missing = X + 0.3 * torch.randn(200, 12), torch.randn(200, 5)
    weights = torch.rand(200) if weighted else torch.ones(200)
    moments = moments_of(X, X_hat, missing, weights)
    assert moments.tokens == 200
    root = weights.sqrt()[:, None]
    exact = torch.linalg.lstsq(root * X_hat, root * (X @ W.T + missing)).solution.T
    torch.testing.assert_close(target(W, moments, 1.0, 0.0), exact, rtol=1e-3, atol=1e-4)


def test_without_error_or_alpha_the_target_is_the_weight():
    torch.manual_seed(0)
    X, W = torch.randn(50, 6), torch.randn(4, 6)
    torch.testing.assert_close(target(W, moments_of(X, X), 1.0, 0.01), W)
    torch.testing.assert_close(target(W, moments_of(X, X + 1), 0.0, 0.01), W)
