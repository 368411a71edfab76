import warnings

import pytest
import torch

from optex import linalg
from optex.errors import ConvergenceWarning, JitterWarning, NotPositiveDefiniteError
from optex.linalg import (
    accumulate_rows,
    combine_rows,
    inner_products,
    product_rounding,
    rows_at,
    squared_norms,
    threads_for,
)
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


def test_sums_of_blocks_are_taken_in_float64():
    # 2²⁴ + 1 - 2²⁴, a block each: float32 would lose the 1.
    left, right = torch.zeros(1, 5 * 1024), torch.ones(1, 5 * 1024)
    left[0, :1024], left[0, 1024], left[0, 2048:3072] = 2.0**14, 1.0, -(2.0**14)
    assert inner_products(left, right).tolist() == [[1.0]]


@pytest.mark.parametrize(("dtype", "dimension"), [(torch.float32, 4096), (torch.float64, 10_001)])
def test_short_rows_and_those_of_float64_are_multiplied_in_float64(dtype, dimension):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, dimension, generator=generator).to(dtype) for n in (3, 2))
    assert torch.equal(inner_products(left, right), left.double() @ right.double().mT)


@pytest.mark.parametrize("right_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dimension", [4097, 8192, 8193, 20_000])
def test_rows_longer_than_a_slab_are_summed_over_slabs(dimension, right_dtype, monkeypatch):
    monkeypatch.setattr(linalg, "_SLAB", 8192)
    generator = torch.Generator().manual_seed(dimension)
    left = torch.randn(3, dimension, generator=generator)
    right = torch.randn(2, dimension, generator=generator).to(right_dtype)
    ours = inner_products(left, right)
    assert ours.dtype == torch.float64
    exact = left.double() @ right.double().mT
    assert (ours - exact).abs().max() < 1e-6 * left.norm() * right.double().norm()


def weighted(count, dtype, *, dimension=9000):
    """Weights [count, 6], rows [6, d] and their product in float64."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(6, dimension, generator=generator).to(dtype)
    weights = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return weights, rows, weights @ rows.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2])
def test_combined_rows_are_the_product(count, dtype, monkeypatch):
    monkeypatch.setattr(linalg, "_SLAB", 4096)  # of half precision, a piece at a time
    weights, rows, expected = weighted(count, dtype)
    result = combine_rows(weights, rows)
    assert result.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    rounding = 1e-14 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_are_accumulated_on_what_is_there(count, dtype):
    weights, rows, product = weighted(count, dtype)
    result = torch.ones(count, 9000, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    accumulate_rows(result, weights, rows)
    rounding = 1e-14 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(result.double(), 1 + product, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("indices", "is_view"),
    [
        ([0], True),
        ([2, 3, 4], True),
        ([0, 1, 2, 3, 4, 5], True),
        ([], True),
        ([1, 3], False),
        ([3, 2], False),
        ([4, 5, 0], False),
        ([2, 2], False),
    ],
)
def test_rows_that_follow_on_each_other_are_a_view(indices, is_view):
    matrix = torch.arange(12.0).view(6, 2)
    rows = rows_at(matrix, indices)
    assert torch.equal(rows, matrix[indices] if indices else matrix[:0])
    assert (rows.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()) == is_view


@pytest.mark.parametrize(
    ("dtype", "dimension", "expected"),
    [
        (torch.float64, 1_000_000, 16 * 2.0**-52),
        (torch.float32, 4096, 16 * 2.0**-52),  # these are multiplied in float64
        (torch.float32, 4097, 2.0**-23 / 4097**0.5),
        (torch.bfloat16, 10_000, 2.0**-23 / 100),  # sums of half precision are taken in float32
    ],
)
def test_rounding_of_products_is_that_of_the_precision_they_are_taken_in(dtype, dimension, expected):
    rows = torch.zeros(1, 1, dtype=dtype).expand(1, dimension)
    assert product_rounding(rows) == pytest.approx(expected, rel=1e-12)


def test_squared_norms_are_summed_in_float64():
    rows = torch.tensor([[3.0, 4.0, 0.0], [1e30, 0.0, 2e30]])  # their squares overflow float32
    squared = squared_norms(rows)
    assert squared.dtype == torch.float64
    assert squared.tolist() == pytest.approx([25.0, 5e60], rel=1e-6)


@pytest.mark.parametrize(("width", "inside"), [(32_767, 1), (32_768, 2), (100_000, 2)])
def test_short_rows_are_computed_on_one_thread(width, inside, two_threads):
    with threads_for(width):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 2


def test_threads_come_back_from_what_fails(two_threads):
    with pytest.raises(KeyError), threads_for(10):
        raise KeyError
    assert torch.get_num_threads() == 2


def test_one_thread_stays_one():
    assert torch.get_num_threads() == 1
    with threads_for(10):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1


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
