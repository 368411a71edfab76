"""A parameter's gradient, there for certain: a test that reads one says in passing that it came."""

from torch import Tensor


def grad_of(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "the parameter has no gradient"
    return gradient
