"""Parameters as one vector, and the buffers beside them."""

import re

import pytest
import torch
from torch import nn

from optex.stepping import Buffers, ParameterVector


def mixed():
    """Parameters of three shapes and two precisions."""
    return [
        nn.Parameter(torch.arange(6.0).view(2, 3)),
        nn.Parameter(torch.tensor(7.0, dtype=torch.float64)),
        nn.Parameter(torch.arange(8.0, 12.0).view(4, 1).to(torch.bfloat16)),
    ]


def test_the_vector_has_the_parameters_one_after_the_other():
    vector = ParameterVector(iter(mixed()))
    assert vector.dimension == vector.space.dimension == 11
    assert vector.sizes == [6, 1, 4]
    assert vector.dtype == torch.float64
    assert vector.device == torch.device("cpu")
    assert vector.whole is vector
    assert vector.read().tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert vector.read().dtype == torch.float64


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32], torch.float32),
        ([torch.float64, torch.float32], torch.float64),
        ([], torch.float32),
    ],
)
def test_the_vector_is_of_the_widest_precision_and_float32_at_least(dtypes, expected):
    vector = ParameterVector([torch.ones(2, dtype=dtype) for dtype in dtypes])
    assert vector.dtype == expected
    assert vector.device == torch.device("cpu")


def test_the_vector_lies_where_the_first_parameter_does():
    assert ParameterVector([torch.ones(2, device="meta"), torch.ones(1)]).device.type == "meta"


def test_what_is_read_is_a_copy():
    parameters = mixed()[:1]
    read = ParameterVector(parameters).read()
    assert not read.requires_grad
    read.zero_()
    assert parameters[0].any()


def test_what_is_written_is_read_again_in_each_parameters_shape_and_precision():
    parameters = mixed()
    vector, values = ParameterVector(parameters), torch.arange(11.0, dtype=torch.float64) - 5
    before = list(parameters)
    vector.write(values)
    assert torch.equal(vector.read(), values)
    assert all(p is q for p, q in zip(parameters, before, strict=True))
    assert [p.dtype for p in parameters] == [torch.float32, torch.float64, torch.bfloat16]
    assert parameters[0].tolist() == [[-5, -4, -3], [-2, -1, 0]]
    parts = vector.parts(values)
    assert [part.shape for part in parts] == [p.shape for p in parameters]
    assert torch.equal(vector.flatten(parts), values)


def test_gradients_are_read_with_zeros_where_there_are_none():
    parameters = mixed()
    parameters[0].grad = torch.ones(2, 3)
    parameters[2].grad = torch.full((4, 1), 2.0, dtype=torch.bfloat16)
    read, mask = ParameterVector(parameters).read_gradients()
    assert read.tolist() == [1] * 6 + [0] + [2] * 4
    assert read.dtype == torch.float64
    assert mask == (True, False, True)
    assert not read.requires_grad


def test_gradients_are_written_as_copies_and_none_outside_the_mask():
    parameters = mixed()
    parameters[1].grad = torch.ones((), dtype=torch.float64)
    vector, values = ParameterVector(parameters), torch.arange(11.0, dtype=torch.float64)
    vector.write_gradients(values, (True, False, True))
    first, nothing, last = (p.grad for p in parameters)
    assert nothing is None
    assert first is not None
    assert last is not None
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert last.flatten().tolist() == [7, 8, 9, 10]
    assert (first.dtype, last.dtype) == (torch.float32, torch.bfloat16)
    values.zero_()
    first.add_(1)
    assert first.tolist() == [[1, 2, 3], [4, 5, 6]]
    vector.clear_gradients()
    assert [p.grad for p in parameters] == [None] * 3


def test_gradients_of_one_precision_are_copies_too():
    parameter, values = nn.Parameter(torch.zeros(3)), torch.arange(3.0)
    ParameterVector([parameter]).write_gradients(values, (True,))
    assert parameter.grad is not None
    parameter.grad.add_(1)
    assert values.tolist() == [0, 1, 2]


def test_a_mask_is_one_flag_a_parameter():
    with pytest.raises(ValueError, match="argument 3 is shorter"):
        ParameterVector(mixed()).write_gradients(torch.zeros(11), (True, True))


def test_what_is_flattened_is_of_the_vectors_precision():
    pieces = [torch.ones(2, 3), torch.ones(()), torch.ones(4, 1)]
    assert ParameterVector(mixed()).flatten(pieces).dtype == torch.float64


def test_gradients_lie_in_memory_as_their_parameters_do():
    parameter = nn.Parameter(torch.zeros(3, 2).t())
    ParameterVector([parameter]).write_gradients(torch.arange(6.0), (True,))
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parameter.grad.stride() == parameter.stride()


# ---------------------------------------------------------------------- what changed since


def test_parameters_as_they_were_pass():
    ParameterVector(mixed()).check()


def test_a_parameter_of_another_precision_is_refused():
    model = nn.Linear(2, 1)
    vector = ParameterVector(model.parameters())
    model.bias.data = model.bias.data.double()
    message = (
        "OptEx: parameter 1 was of torch.float32 on cpu when OptEx was built and is of torch.float64 on cpu "
        "now; convert or move the model first, then build base and OptEx"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        vector.check()


def test_a_parameter_on_another_device_is_refused():
    model = nn.Linear(2, 1)
    vector = ParameterVector(model.parameters())
    vector.parameters[0] = model.weight.detach().to("meta")
    with pytest.raises(
        TypeError, match=r"parameter 0 was of torch\.float32 on cpu .* torch\.float32 on meta now"
    ):
        vector.check()


def test_a_parameter_of_another_size_is_refused():
    model = nn.Linear(2, 1)
    vector = ParameterVector(model.parameters())
    model.weight.data = torch.ones(1, 5)
    message = (
        "OptEx: parameter 0 held 2 numbers when OptEx was built and holds 5 now; build base and OptEx anew "
        "over the parameters as they are"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vector.check()


# ---------------------------------------------------------------------- buffers


class Buffered(nn.Module):
    """Two normalisations that share one buffer, a buffer that is not saved, and one that is not there."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.second.running_mean = self.first.running_mean
        self.register_buffer("data", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)
        self.register_buffer("count", torch.zeros(()))


def test_buffers_are_those_that_are_saved_each_once():
    model = Buffered()
    found = Buffers.of(model).tensors
    kept = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if "weight" not in name}
    expected = {id(tensor) for name, tensor in kept.items() if "bias" not in name}
    assert {id(tensor) for tensor in found} == expected
    assert len(found) == len(expected) == 6


def test_buffers_are_read_as_copies_and_written_back():
    tensors = [torch.ones(2), torch.zeros((), dtype=torch.int64)]
    buffers = Buffers(iter(tensors))
    values = buffers.read()
    for tensor in tensors:
        tensor += 5
    assert [value.tolist() for value in values] == [[1, 1], 0]
    buffers.write(values)
    assert [tensor.tolist() for tensor in tensors] == [[1, 1], 0]
    with pytest.raises(ValueError, match="shorter"):
        buffers.write(values[:1])
    assert Buffers().read() == []
