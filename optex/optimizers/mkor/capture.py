"""What the factors need of an evaluation: the means of a layer's inputs and of its outputs' gradients."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

__all__ = ["Capture", "Vectors", "layers_of"]

# By layer: its mean input [in (+ 1)], its mean output gradient [out].
Vectors = dict[str, tuple[Tensor, Tensor]]


def layers_of(model: nn.Module, trained: Iterable[Tensor]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that have factors, by name: linear ones and convolutions without groups.

    Only layers whose weights are trained, real, and shared with no other module.

    Raises:
        ValueError: a layer has no weights yet.
    """
    ids = {id(p) for p in trained}
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) != 1:
            continue
        own = [p for key in ("weight", "bias") if (p := module._parameters.get(key)) is not None]
        if any(isinstance(p, UninitializedParameter) for p in own):
            raise ValueError(
                f"MKOR: layer {name!r} ({type(module).__name__}) has no weights yet; run a batch through the "
                "model first"
            )
        weight = module._parameters.get("weight")
        if weight is None or id(weight) not in ids or not weight.is_floating_point():
            continue
        if all(uses[id(p)] == 1 for p in own):
            found[name] = module
    return found


class Capture:
    """Sums inputs and output gradients of the layers, while it is armed. The layers' hooks call it.

    A vector of zeros, the probe, is added to a layer's output: its gradient is the sum over all rows of the
    output's gradient. So no hook is needed in the backward pass, which ``torch.compile`` or activation
    checkpointing could run at another time, or twice. Sums of inputs are kept with the number of their rows: a
    forward pass that runs twice leaves their mean as it is.

    Attributes:
        armed: whether evaluations are recorded.
        observed: whether evaluations are read one by one, before it is known in which steps they are used.
        loss: the last loss seen; None where there was none.
    """

    def __init__(self) -> None:
        self.armed: bool = True
        self.observed: bool = False
        self.loss: Tensor | None = None
        self._sums: dict[str, Tensor] = {}  # [in + 2]: the inputs', the number of rows, and of samples
        self._probes: dict[str, Tensor] = {}  # [out]
        self._has_bias: dict[str, bool] = {}
        self._handles: dict[str | None, RemovableHandle] = {}  # None: the whole model's

    def attach(self, name: str, module: nn.Linear | nn.Conv2d) -> None:
        """Record a layer from now on; without effect for one that is recorded already."""
        if name in self._handles:
            return
        self._probes[name] = _probe(module.weight)
        self._has_bias[name] = module.bias is not None
        self._handles[name] = module.register_forward_hook(_Hook(self, name), with_kwargs=True)

    def listen(self, model: nn.Module) -> None:
        """Record the losses of a model that returns them: scalar outputs that require a gradient."""
        self._handles[None] = model.register_forward_hook(_Hook(self, None), with_kwargs=True)

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.clear()
        self.armed = False

    def __call__(self, name: str | None, module: Any, inputs: Any, output: Any) -> Tensor | None:
        """Record a layer's inputs; its output with the probe, None where nothing is recorded."""
        if name is None:
            if isinstance(output, Tensor) and output.ndim == 0 and output.requires_grad:
                self.loss = output.detach()
            return None
        if not (self.armed and torch.is_grad_enabled() and module.weight.requires_grad) or _is_foreign(
            module, output
        ):
            return None
        with torch.no_grad():
            total = _summed(module, inputs.detach(), output)
            before = self._sums.get(name)
            self._sums[name] = total if before is None else before + total
        probe = self._probes[name]
        if probe.device != output.device:
            probe = self._probes[name] = _probe(module.weight)
        probe = probe.to(output.dtype)
        return output + (probe[:, None, None] if isinstance(module, nn.Conv2d) else probe)

    def take(self) -> Vectors:
        """Return the vectors recorded since the last call, and forget them."""
        vectors: Vectors = {}
        for name, total in self._sums.items():
            gradient = self._probes[name].grad
            if gradient is None:
                continue  # no backward pass came through
            rows, samples = total[-2], total[-1]
            mean = total[:-2] / rows
            if self._has_bias[name]:
                mean = torch.cat([mean, torch.ones_like(mean[:1])])
            vectors[name] = mean, gradient.to(mean.dtype) * (samples / rows)
        self.clear()
        return vectors

    def __getstate__(self) -> dict[str, Any]:
        # Pickling drops a tensor's gradient.
        gradients = {name: probe.grad for name, probe in self._probes.items()}
        return {**vars(self), "_gradients": gradients}

    def __setstate__(self, state: dict[str, Any]) -> None:
        gradients = state.pop("_gradients")
        vars(self).update(state)
        for name, probe in self._probes.items():
            probe.grad = gradients[name]

    def clear(self) -> None:
        """Forget what was recorded."""
        self.loss = None
        self._sums.clear()
        for probe in self._probes.values():
            probe.grad = None


class _Hook:
    """A layer's forward hook. It holds its capture weakly: in a copy of the model alone it records nothing.

    Copied or pickled together with the optimizer, which holds the capture, it finds the optimizer's copy.
    """

    def __init__(self, capture: Capture, name: str | None) -> None:
        self._capture = weakref.ref(capture)
        self._name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        capture = self._capture()
        if capture is None:
            return None
        return capture(self._name, module, args[0] if args else kwargs.get("input"), output)

    def __getstate__(self) -> tuple[Capture | None, str | None]:
        return self._capture(), self._name

    def __setstate__(self, state: tuple[Capture | None, str | None]) -> None:
        capture, self._name = state
        self._capture = _nothing if capture is None else weakref.ref(capture)


def _nothing() -> None:
    return None


def _is_foreign(module: nn.Module, output: Any) -> bool:
    """Whether a pass belongs to no step: with other weights (``functional_call``), or under vmap."""
    if not (isinstance(output, Tensor) and isinstance(module.weight, nn.Parameter)):
        return True
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(output)


def _probe(weight: Tensor) -> Tensor:  # [out]
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(weight.shape[0], dtype=wide, device=weight.device, requires_grad=True)


def _summed(
    module: nn.Linear | nn.Conv2d,
    inputs: Tensor,  # [..., in], or [(n,) channels, height, width]
    output: Tensor,  # [..., out], or [(n,) out, height', width']
) -> Tensor:  # [in + 2], or [channels * kernel height * kernel width + 2]
    """The sum of the rows that the weight multiplies, their number, and the number of samples."""
    wide = torch.promote_types(module.weight.dtype, torch.float32)
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        total, count, samples = rows.sum(0, dtype=wide), rows.shape[0], rows.shape[0]
    else:
        images = inputs.reshape(-1, *inputs.shape[-3:])
        samples, positions = images.shape[0], output.shape[-2] * output.shape[-1]
        # The patches of the sum are the sum of the patches, without the memory for a batch of them.
        padded = _padded(module, images.sum(0, keepdim=True, dtype=wide))
        patches = functional.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
        total, count = patches[0].sum(1), samples * positions
    return torch.cat([total, total.new_full((1,), count), total.new_full((1,), samples)])


def _padded(module: nn.Conv2d, images: Tensor) -> Tensor:
    """Images with the padding of the convolution."""
    sides: list[int] = []
    for i in (1, 0):  # the last dimension comes first
        if isinstance(module.padding, str):
            whole = module.dilation[i] * (module.kernel_size[i] - 1) if module.padding == "same" else 0
            sides += [whole // 2, whole - whole // 2]
        else:
            sides += [int(module.padding[i])] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(images, sides, mode)
