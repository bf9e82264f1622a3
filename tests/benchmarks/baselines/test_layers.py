"""Each layer-wise baseline has the property that its paper claims for it."""

import pytest
import torch
from baselines import billm, gptq, pb_llm
from baselines.feedback import damped
from baselines.uniform import Grid

from tests.converters.fitting.problems import problem


def cost(W, W_hat, H):
    R = W - W_hat
    return float(((R @ H) * R).sum())


@pytest.fixture(autouse=True)
def one_thread():
    """As in a run: small ops on several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def layer():
    return problem(N=48, K=300)


def test_a_grid_holds_zero_and_both_ends():
    W = torch.tensor([[-1.0, 0.0, 0.4, 2.0], [1.0, 1.5, 2.0, 3.0]])
    grid = Grid.of(W, bits=2)
    rounded = grid.round(W.T).T
    assert rounded[0].tolist() == [-1.0, 0.0, 0.0, 2.0]
    assert rounded[1].tolist() == [1.0, 2.0, 2.0, 3.0]


def test_a_row_of_zeros_stays():
    assert Grid.of(torch.zeros(1, 4), 2).round(torch.zeros(4, 1)).abs().max() == 0


def test_gptq_beats_rounding_to_nearest_under_correlated_inputs(layer):
    W, H = layer
    ours = cost(W, gptq.quantize(W, H).weight, H)
    assert ours < 0.6 * cost(W, gptq.round_to_nearest(W).weight, H)


def test_gptq_is_rounding_to_nearest_where_inputs_are_not_correlated():
    W, _ = problem(N=16, K=150)
    H = torch.diag(torch.rand(150, dtype=W.dtype) + 0.1)
    assert torch.equal(gptq.quantize(W, H).weight, gptq.round_to_nearest(W).weight)


def test_gptq_has_four_levels_in_each_row_of_a_group(layer):
    W, H = layer
    done = gptq.quantize(W, H)
    for group in done.weight.split(gptq.GROUP, dim=1):
        assert max(len(row.unique()) for row in group) == 4
    assert done.bits == pytest.approx(2 + 3 * 18 / 300)
    assert gptq.quantize(W[:, :256], H[:256, :256]).bits == pytest.approx(2.140625)


def test_a_block_that_is_in_no_group_alone_is_rounded_whatever_the_size():
    W, H = problem(N=8, K=5)
    assert torch.isfinite(gptq.quantize(W, H).weight).all()


def test_pb_llm_keeps_the_salient_tenth_nearly_exact(layer):
    W, H = layer
    W, H = W[:, :128], H[:128, :128]
    salient = pb_llm.salient_mask(W, torch.ones(128, dtype=W.dtype), 0.1)
    assert int(salient.sum()) == round(0.1 * W.numel())
    assert W[salient].abs().min() >= W[~salient].abs().max()
    diagonal = torch.diag(torch.ones(128, dtype=W.dtype))  # no feedback: weights stay in place
    error = (pb_llm.quantize(W, diagonal).weight - W).abs()
    step = (W.amax(dim=1) - W.amin(dim=1)) / 255
    assert (error <= step[:, None])[salient].all()
    assert error[~salient].mean() > 10 * error[salient].mean()


def test_pb_llm_is_binary_elsewhere(layer):
    W, H = layer
    W, H = W[:, :128], H[:128, :128]
    weight = pb_llm.quantize(W, H, share=0.0).weight
    assert max(len(row.unique()) for row in weight) == 2


def test_pb_llm_bits():
    assert pb_llm.published_bits(0.1) == pytest.approx(1.7)  # section 3.3 of the paper
    assert pb_llm.stored_bits(4096, 0.1) == pytest.approx(2.7 + 32 / 128 + 24 / 4096)


def test_pb_llm_improves_with_the_salient_share(layer):
    W, H = layer
    costs = [cost(W, pb_llm.quantize(W, H, share).weight, H) for share in (0.0, 0.1, 0.3)]
    assert costs[0] > costs[1] > costs[2]


def test_each_residual_matrix_lowers_the_error():
    W, _ = problem(N=16, K=64)
    mask = torch.rand(W.shape) < 0.7
    errors = [
        float((W - billm.residual(W, mask, order))[mask].square().sum()) for order in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert billm.residual(W, mask, 2)[~mask].abs().max() == 0


def test_binary_levels_are_the_least_squares_scale_around_the_mean():
    W, _ = problem(N=4, K=32)
    whole = torch.ones(W.shape, dtype=torch.bool)
    error = (W - billm.binarize(W, whole)).square().sum()
    signs, mean = torch.where(W >= W.mean(1, keepdim=True), 1.0, -1.0), W.mean(1, keepdim=True)
    best = ((W - mean) * signs).mean(dim=1, keepdim=True)
    for factor in (0.9, 1.1):
        assert (W - mean - factor * best * signs).square().sum() > error
    assert float(billm._error(W, whole)) == pytest.approx(float(error))
    some = torch.rand(W.shape) < 0.6
    left = (W - billm.binarize(W, some))[some].square().sum()
    assert float(billm._error(W, some)) == pytest.approx(float(left))


def test_the_split_search_beats_no_split_and_a_split_in_half():
    W, _ = problem(N=16, K=128)
    whole = torch.ones(W.shape, dtype=torch.bool)

    def error(threshold):
        tail = W.abs() > threshold
        return float((W - billm.binarize(W, tail) - billm.binarize(W, ~tail)).square().sum())

    found = error(billm.best_split(W, whole))
    assert found < 0.5 * error(torch.inf)  # one binary matrix leaves 1 - 2/pi of Gaussian weights
    assert found <= error(float(W.abs().median()))


def test_columns_of_large_cost_are_salient():
    W, _ = problem(N=32, K=128)
    W[:, [7, 70]] *= 12
    chosen = billm.salient_columns(W, torch.ones(128, dtype=W.dtype)).tolist()
    assert sorted(chosen) == [7, 70]
    U_diagonal = torch.ones(128, dtype=W.dtype)
    U_diagonal[3] = 1e-3  # a column whose inputs nothing else makes up for
    assert billm.salient_columns(W, U_diagonal)[0] == 3


def test_billm_parts_cover_every_weight_once(layer):
    W, _ = layer
    parts = billm.split_block(W[:, :128], torch.ones(128, dtype=W.dtype))
    assert (sum(part.int() for part in parts) == 1).all()
    assert (parts.salient.all(dim=0) == parts.salient.any(dim=0)).all()


def test_billm_beats_plain_binarization_and_feeds_errors_back(layer):
    W, H = layer
    whole = torch.ones(W.shape, dtype=torch.bool)
    done = billm.quantize(W, H)
    assert cost(W, done.weight, H) < 0.5 * cost(W, billm.binarize(W, whole), H)
    alone = billm.quantize(W, torch.diag(H.diagonal()))  # the same without correlations
    assert cost(W, done.weight, H) < cost(W, alone.weight, H)


def test_billm_bits():
    # Table 1 of the paper: 1.1 bits and less, at a tenth of salient columns and less.
    assert billm.published_bits(0.08) == pytest.approx(1.0878125)
    assert billm.stored_bits(4096, 0.08) == pytest.approx(1.0878125 + 0.92 + 1.0)


def test_inputs_that_are_always_zero_are_no_obstacle(layer):
    W, H = layer
    H = H.clone()
    H[5], H[:, 5] = 0, 0
    for method in (gptq, pb_llm, billm):
        assert torch.isfinite(method.quantize(W, H).weight).all()
    assert torch.isfinite(torch.linalg.cholesky(damped(torch.zeros(4, 4)))).all()
