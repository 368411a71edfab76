"""Forward-pass fine-tuning the obvious way: every direction kept, every point a copy of its own."""

import torch

from optex.optimizers.mezo.directions import direction


def estimate(loss, parameters, epsilon, seed, queries):
    """Mean of the two-point estimates, its variance a component, the mean loss; one row a query."""
    kept = [p.detach().clone() for p in parameters]
    rows, losses = [], []
    for query in range(queries):
        z = [direction(seed, query, place, p) for place, p in enumerate(kept)]
        pair = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, value, along in zip(parameters, kept, z, strict=True):
                    p.copy_(value + sign * epsilon * along)
                pair.append(float(loss()))
        slope = (pair[0] - pair[1]) / (2 * epsilon)
        rows.append(torch.cat([slope * along.flatten() for along in z]))
        losses += pair
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    rows = torch.stack(rows)
    variance = float(rows.var(0).mean() / queries) if queries > 1 else None
    return rows.mean(0), variance, sum(losses) / len(losses)


def mezo_step(loss, parameters, *, lr, epsilon, weight_decay, seed, queries):
    """θ - lr (ĝ + weight_decay θ)."""
    gradient, _, mean = estimate(loss, parameters, epsilon, seed, queries)
    with torch.no_grad():
        for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            p.copy_(p - lr * (part.view_as(p) + weight_decay * p))
    return mean


class Bowl:
    """½ θᵀAθ + noise of the batch along 1, at two parameters; can be pickled."""

    def __init__(self, hessian, parameters):
        self.hessian, self.parameters = hessian, parameters

    def __call__(self, batch):
        x = torch.cat([p.reshape(-1) for p in self.parameters])
        return 0.5 * x @ self.hessian @ x + (0 if batch is None else batch * x.sum())
