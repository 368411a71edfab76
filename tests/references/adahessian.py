"""AdaHessian entry by entry, with the whole Hessian; what optex/optimizers/adahessian.py is held to."""

import math


def blocks_of(shape, block):
    """Lists of flat indices (row-major) that are averaged over."""
    size = math.prod(shape)
    if isinstance(block, int) and len(shape) > 1:
        run = block
    elif block in ("kernels", "rows") and len(shape) > 2:
        run = math.prod(shape[2:])
    elif block == "rows" and len(shape) == 2:
        run = shape[1]
    else:
        run = 1
    return [list(range(start, min(start + run, size))) for start in range(0, size, run)]


class ReferenceAdaHessian:
    """One parameter group, as lists of numbers.

    Args:
        shapes: of the parameters.
        average, block, and the others: as in AdaHessian.
    """

    def __init__(
        self, shapes, lr, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0, hessian_power=1.0, average="absolute",
        block="kernels",
    ):  # fmt: skip
        self.shapes, self.lr, self.betas, self.eps = shapes, lr, betas, eps
        self.weight_decay, self.power, self.average, self.block = weight_decay, hessian_power, average, block
        self.sizes = [math.prod(shape) for shape in shapes]
        self.m, self.v = [0.0] * sum(self.sizes), [0.0] * sum(self.sizes)
        self.steps = 0

    def diagonal(self, hessian, signs):
        """D: z_i (H z)_i, as they are or in magnitude, averaged over each block."""
        n = len(signs)
        entries = [signs[i] * sum(hessian[i][j] * signs[j] for j in range(n)) for i in range(n)]
        if self.average == "absolute":
            entries = [abs(entry) for entry in entries]
        result, offset = [0.0] * n, 0
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            for block in blocks_of(shape, self.block):
                mean = sum(entries[offset + i] for i in block) / len(block)
                for i in block:
                    result[offset + i] = mean
            offset += size
        return result

    def step(self, theta, gradient, hessian, signs):
        """The parameters after a step; all flat lists."""
        beta1, beta2 = self.betas
        self.steps += 1
        result = []
        for i, d in enumerate(self.diagonal(hessian, signs)):
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * gradient[i]
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * d * d
            m = self.m[i] / (1 - beta1**self.steps)
            v = self.v[i] / (1 - beta2**self.steps)
            moved = m / (math.sqrt(v) ** self.power + self.eps) + self.weight_decay * theta[i]
            result.append(theta[i] - self.lr * moved)
        return result
