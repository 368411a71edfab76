"""Parameters as one flat vector, and the buffers beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from optex.vector_space import VectorSpace

__all__ = ["Buffers", "GradientMask", "ParameterVector"]

GradientMask = tuple[bool, ...]  # which parameters got a gradient, one flag a parameter


class ParameterVector:
    """The trainable parameters of an optimizer, read and written as one vector of length ``dimension``.

    The vector's dtype is the widest among the parameters, float32 at least, so that reading loses nothing;
    its device is the first parameter's.

    Args:
        parameters: the tensors, in the order of their parts in the vector.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.sizes: list[int] = [p.numel() for p in self.parameters]
        self.dimension: int = sum(self.sizes)
        self.dtype: torch.dtype = torch.float32
        for p in self.parameters:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.device: torch.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._kinds = [(p.dtype, p.device) for p in self.parameters]
        self._space = VectorSpace(self.dimension)

    def check(self) -> None:
        """Refuse parameters whose dtype, device or size has changed since this vector was laid out.

        Raises:
            TypeError: a dtype or device has changed; the message names the parameter.
            ValueError: a size has.
        """
        kinds = zip(self.parameters, self._kinds, self.sizes, strict=False)
        for i, (p, (dtype, device), size) in enumerate(kinds):
            if (p.dtype, p.device) != (dtype, device):
                raise TypeError(
                    f"OptEx: parameter {i} was of {dtype} on {device} when OptEx was built and is of {p.dtype} "
                    f"on {p.device} now; convert or move the model first, then build base and OptEx"
                )
            if p.numel() != size:
                raise ValueError(
                    f"OptEx: parameter {i} held {size} numbers when OptEx was built and holds {p.numel()} now; "
                    "build base and OptEx anew over the parameters as they are"
                )

    @property
    def whole(self) -> ParameterVector:
        """The vector of the parameters themselves, which is this one unless it is a slice of them."""
        return self

    @property
    def space(self) -> VectorSpace:
        """The vector's space, which sums over its coordinates."""
        return self._space

    def parts(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector [d], each in its parameter's shape."""
        return [v.view(p.shape) for v, p in zip(vector.split(self.sizes), self.parameters, strict=True)]

    def read(self) -> Tensor:  # [d]
        """The parameters' values, copied."""
        return self.flatten([p.detach() for p in self.parameters])

    @torch.no_grad()
    def write(
        self,
        vector: Tensor,  # [d]
    ) -> None:
        """Copy a vector into the parameters, each in its own dtype."""
        torch._foreach_copy_(self.parameters, self.parts(vector))

    def read_gradients(self) -> tuple[Tensor, GradientMask]:  # [d], one flag a parameter
        """The parameters' ``.grad`` as a vector, zero where there is none, and which ones there are."""
        mask = tuple(p.grad is not None for p in self.parameters)
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters]
        return self.flatten(pieces), mask

    def write_gradients(
        self,
        vector: Tensor,  # [d]
        mask: GradientMask,
    ) -> None:
        """Set every ``.grad`` from a copy of the vector; None outside the mask."""
        for p, piece, there in zip(self.parameters, self.parts(vector.clone()), mask, strict=True):
            piece = piece.to(p.device, p.dtype)
            # Fused optimizers step through memory: a gradient has to lie in it as its parameter does.
            laid_out = piece if p.is_contiguous() else torch.empty_like(p).copy_(piece)
            p.grad = laid_out if there else None

    def clear_gradients(self) -> None:
        """Set every ``.grad`` to None."""
        for p in self.parameters:
            p.grad = None

    def flatten(self, pieces: Sequence[Tensor]) -> Tensor:  # [d]
        """Tensors of the parameters' sizes as one vector."""
        return torch.cat([piece.reshape(-1).to(self.device, self.dtype) for piece in pieces])


class Buffers:
    """Tensors beside the parameters that an evaluation may change, as BatchNorm's running statistics."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.tensors: list[Tensor] = list(tensors)

    @classmethod
    def of(cls, model: nn.Module) -> Buffers:
        """The buffers in the model's state dict; those that are not saved hold data, nothing learned."""
        # Looked up every round, so not through state_dict(), whose hooks (gathering, converting) are for
        # saving.
        found = {
            id(buffer): buffer
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }
        return cls(found.values())

    def read(self) -> list[Tensor]:
        """The values, copied."""
        return [buffer.detach().clone() for buffer in self.tensors]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Copy values into the buffers."""
        for buffer, value in zip(self.tensors, values, strict=True):
            buffer.copy_(value)
