"""MKOR in float64, slow and obvious: factors by inverting their targets, vectors row by row."""

import torch
from torch.nn import functional

from tests.gradients import grad_of


def released_target(factor, vector, decay):
    """The inverse that the released update is one of, by inversion."""
    mixed = decay * factor + (1 - decay) * torch.eye(len(vector), dtype=factor.dtype)
    return torch.linalg.inv(torch.linalg.inv(mixed) + torch.outer(vector, vector))


def exact_target(factor, vector, decay):
    """The inverse of the running mean of v v', by inversion."""
    return torch.linalg.inv(decay * torch.linalg.inv(factor) + (1 - decay) * torch.outer(vector, vector))


def published_update(factor, vector, decay):
    """The equation in the paper's text."""
    product = factor @ vector
    share = (1 - decay) / (decay**2 * (1 + decay * (1 - decay) * vector @ product))
    return decay * factor + share * torch.outer(product, product)


TARGETS = {"released": released_target, "exact": exact_target}
RESETS = {"released": 1.0, "exact": 0.1}


class SlowMKOR:
    """Around SGD with momentum written out; layers are named, their inputs and outputs kept whole."""

    def __init__(self, model, lr, momentum, variant, interval, decay=0.95, threshold=2.0):
        self.model, self.lr, self.momentum, self.variant = model, lr, momentum, variant
        self.interval, self.decay, self.threshold = interval, decay, threshold
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        }
        self.seen, self.factors, self.buffers, self.steps = {}, {}, {}, 0
        for name, module in self.layers.items():
            module.register_forward_hook(self.keeper(name))

    def keeper(self, name):
        def keep(module, args, output):
            output.retain_grad()
            self.seen[name] = (args[0].detach(), output)

        return keep

    def vectors(self, name):
        module, (inputs, output) = self.layers[name], self.seen[name]
        if isinstance(module, torch.nn.Linear):
            rows, gradients = list(inputs), [len(inputs) * g for g in output.grad]
        else:
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            images = functional.pad(inputs, module._reversed_padding_repeated_twice, mode)
            patches = functional.unfold(images, module.kernel_size, module.dilation, 0, module.stride)
            rows = [patches[n, :, i] for n in range(patches.shape[0]) for i in range(patches.shape[2])]
            gradients = [len(inputs) * g.flatten(1).sum(1) / patches.shape[2] for g in output.grad]
        mean = torch.stack(rows).mean(0)
        if module.bias is not None:
            mean = torch.cat([mean, torch.ones(1, dtype=mean.dtype)])
        return mean, torch.stack(gradients).mean(0)

    def refreshed(self, factor, vector):
        factor = TARGETS[self.variant](factor, vector, self.decay)
        if factor.abs().max() > self.threshold:
            share = RESETS[self.variant]
            factor = (1 - share) * factor + share * torch.eye(len(vector), dtype=factor.dtype)
        return factor

    def step(self):
        gradients = {p: p.grad.clone() for p in self.model.parameters()}
        for name, module in self.layers.items():
            mean, gradient = self.vectors(name)
            eyes = [torch.eye(len(v), dtype=v.dtype) for v in (gradient, mean)]
            left, right = self.factors.get(name, eyes)
            if self.steps % self.interval == 0:
                left, right = self.refreshed(left, gradient), self.refreshed(right, mean)
            self.factors[name] = left, right
            matrix = grad_of(module.weight).flatten(1)
            lengths = matrix.norm()
            if module.bias is not None:
                matrix = torch.cat([matrix, grad_of(module.bias)[:, None]], 1)
                lengths = lengths + grad_of(module.bias).norm()
            update = left @ matrix @ right
            weight = update if module.bias is None else update[:, :-1]
            new = weight.norm() + (0 if module.bias is None else update[:, -1].norm())
            gradients[module.weight] = (lengths / new * weight).view_as(module.weight)
            if module.bias is not None:
                gradients[module.bias] = lengths / new * update[:, -1]
        with torch.no_grad():
            for p, gradient in gradients.items():
                buffer = self.buffers.get(p)
                self.buffers[p] = gradient if buffer is None else self.momentum * buffer + gradient
                p -= self.lr * self.buffers[p]
        self.steps += 1
