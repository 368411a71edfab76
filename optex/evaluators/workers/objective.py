"""The objective on the program's side: pickled once for all workers, and watched for changes."""

from __future__ import annotations

import io
import os
import pickle
import uuid
from functools import cached_property
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optex.sources import ClosureSource, GradientSource, ObjectiveSource
from optex.stepping import ParameterVector

try:
    import cloudpickle as pickling  # takes lambdas, and what a script or a notebook defines
except ImportError:
    pickling = pickle

__all__ = ["SharedObjective", "tensor_version"]

_Base: Final[Any] = pickling.Pickler
_NAMES: Final[dict[type, str]] = {ObjectiveSource: "objective", ClosureSource: "closure"}


class SharedObjective:
    """A source of gradients with its parameters, under a token by which workers know it.

    Workers in this process (threads) use the source itself, with parameters of their own, if it can be used so;
    all others get it pickled, once.

    Attributes:
        source: of the gradients.
        vector: its parameters.
        token: no other objective has it.
    """

    def __init__(self, source: GradientSource, vector: ParameterVector) -> None:
        self.source: GradientSource = source
        self.vector: ParameterVector = vector
        self.token: str = uuid.uuid4().hex
        self._process = os.getpid()
        self._dtype = torch.get_default_dtype()
        self._watched: list[Tensor] = []
        self._modules: list[nn.Module] = []
        self._state: list[Any] = []
        _OBJECTIVES[self.token] = self

    @staticmethod
    def of_this_process(token: str) -> SharedObjective | None:
        """The objective with this token, if this very process made it and not the one it was forked from."""
        found = _OBJECTIVES.get(token)
        return found if found is not None and found._process == os.getpid() else None

    @cached_property
    def pickled(self) -> bytes:
        """The source and its parameters, pickled together: what are the same tensors here are so there.

        Raises:
            TypeError: something in it cannot be pickled.
        """
        file = io.BytesIO()
        pickler = _Pickler(file)
        try:
            pickler.dump((self.source, self.vector.parameters, self._dtype))
            modules = list(pickler.modules)
            pickler.dump(modules)
        except Exception as error:
            raise TypeError(
                f"WorkersEvaluator: {_NAMES.get(type(self.source), 'fun')} cannot be sent to other processes "
                f"({error}); define it at the top level of a module, install cloudpickle for lambdas and "
                "functions within functions, leave out what cannot be copied (locks, open files), or evaluate "
                "in threads: concurrent.futures.ThreadPoolExecutor"
            ) from error
        own = {id(p) for p in self.vector.parameters}
        self._watched = [tensor for tensor in pickler.tensors if id(tensor) not in own]
        self._modules = modules
        self._state = self._state_now()
        return file.getvalue()

    def serves(self, source: GradientSource, vector: ParameterVector) -> bool:
        """Whether what was sent is still what would be sent for this source."""
        alike = self.source is source or (type(source) in _NAMES and self.source == source)
        return (
            alike
            and self.vector is vector
            and self._dtype is torch.get_default_dtype()
            and self._state == self._state_now()
        )

    def _state_now(self) -> list[Any]:
        """Differs once a tensor has been changed in place, or a module has another mode or other tensors."""
        state: list[Any] = [tensor_version(tensor) for tensor in self._watched]
        for module in self._modules:
            state.append(module.training)
            state += [id(tensor) for tensor in (*module._buffers.values(), *module._parameters.values())]
        return state


_OBJECTIVES: WeakValueDictionary[str, SharedObjective] = WeakValueDictionary()


def tensor_version(tensor: Tensor) -> int:
    """A number that changes when the tensor is changed in place; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


class _OptimizerStandIn:
    """What a closure sees of its optimizer in a worker, where the optimizer's state is not needed."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._parameters:
            p.grad = None


class _Pickler(_Base):
    """Records the tensors and modules that it pickles, and replaces optimizers by a stand-in."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []

    def persistent_id(self, obj: Any) -> None:  # called with every object; None: pickle it as usual
        if isinstance(obj, Tensor):
            self.tensors.append(obj)
        elif isinstance(obj, nn.Module):
            self.modules.append(obj)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Optimizer):
            parameters = [p for group in obj.param_groups for p in group["params"]]
            return _OptimizerStandIn, (parameters,)
        inherited = getattr(super(), "reducer_override", None)
        return NotImplemented if inherited is None else inherited(obj)
