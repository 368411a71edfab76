import warnings

import pytest
import torch

from optex.errors import ConvergenceWarning, JitterWarning, NotPositiveDefiniteError
from optex.linalg import combine_rows, inner_products
from optex.small import conjugate_gradients, jittered_cholesky


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dimension", [1, 255, 256, 10_001])
def test_inner_products_are_those_of_float64(dtype, dimension):
    generator = torch.Generator().manual_seed(dimension)
    left = torch.randn(3, dimension, generator=generator).to(dtype)
    right = torch.randn(5, dimension, generator=generator).to(dtype)
    exact = left.double() @ right.double().T
    scale = left.double().norm(dim=1)[:, None] * right.double().norm(dim=1)
    tolerance = 1e-14 if dtype is torch.float64 else 1e-6
    assert ((inner_products(left, right) - exact).abs() <= tolerance * scale).all()


def test_blocks_lose_less_than_one_long_sum():
    # All-positive terms of one size are the worst case for a running float32 sum.
    row = torch.full((1, 1_000_003), 0.1)
    exact = (row.double() ** 2).sum()
    ours = abs(inner_products(row, row).item() / exact - 1)
    assert ours < 1e-6
    assert ours < 0.01 * abs((row @ row.T).item() / exact - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_combine_rows(dtype):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 9000, generator=generator).to(dtype)
    weights = torch.randn(6, generator=generator, dtype=torch.float64)
    result = combine_rows(weights[None], rows)[0]
    assert result.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), weights @ rows.double(), rtol=1e-5, atol=1e-5)


def test_cholesky_is_plain_where_it_can_be():
    matrix = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    assert torch.equal(jittered_cholesky(matrix), torch.linalg.cholesky(matrix))


def test_jitter_is_announced_with_its_amount():
    singular = torch.ones(3, 3, dtype=torch.float64)
    singular[2, 2] -= 1e-9
    with pytest.warns(
        JitterWarning, match=r"size 3 is not positive definite; added 1e-08 of its mean diagonal"
    ):
        factor = jittered_cholesky(singular)
    assert (factor @ factor.T - singular).abs().max() < 1e-7


def test_hopeless_matrix_is_a_named_error():
    with pytest.raises(NotPositiveDefiniteError, match=r"even with jitter 0\.01; raise noise_variance"):
        jittered_cholesky(-torch.eye(2, dtype=torch.float64))


def one_iteration(gap):
    """Conjugate gradients stopped after one step on diag(1, 1 + gap), where the residual is gap / 2."""
    diagonal = torch.tensor([1.0, 1.0 + gap], dtype=torch.float64)
    return conjugate_gradients(
        lambda row: diagonal * row, torch.ones_like(diagonal), lambda row: row, iterations=1
    )


@pytest.mark.parametrize(("gap", "residual"), [(1.0, "3.3e-01"), (4e-2, "2.0e-02"), (6e-6, "3.0e-06")])
def test_a_poor_residual_is_announced_with_its_size(gap, residual):
    with pytest.warns(ConvergenceWarning, match=f"after 1 iterations at a relative residual of {residual};"):
        one_iteration(gap)


@pytest.mark.parametrize("gap", [1e-6, 1e-8])
def test_a_good_residual_is_no_cause_for_a_warning(gap):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = one_iteration(gap)
    torch.testing.assert_close(solution, torch.ones_like(solution), rtol=gap, atol=0)
