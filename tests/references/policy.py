"""Policy gradients the obvious way: loops over trajectories and steps, one number at a time."""

import math

import torch


def gradients(policy, found, discount, estimator="gpomdp", *, baseline=False):
    """The estimate of ∇J of each trajectory, one flat row a trajectory."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    steps, count = found.rewards.shape
    worth = torch.zeros(steps, count, dtype=found.rewards.dtype)
    for i in range(count):
        for t in range(steps):
            first = t if estimator == "gpomdp" else 0
            worth[t, i] = sum(discount**h * found.rewards[h, i] for h in range(first, steps))
    rows = []
    for i in range(count):
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=worth.dtype)
        for t in range(steps):
            if not found.running[t, i]:
                continue
            others = [worth[t, j] for j in range(count) if j != i]
            weight = worth[t, i] - (sum(others) / len(others) if baseline else 0.0)
            log = policy(found.observations[t, i]).log_prob(found.actions[t, i])
            total += weight * torch.cat([g.flatten() for g in torch.autograd.grad(log, parameters)])
        rows.append(total)
    return torch.stack(rows)


def hessian(policy, found, discount):
    """The estimate of ∇²J as a matrix: the Jacobian of g with τ held, and the outer products g (∇ log p)ᵀ."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    steps, count = found.rewards.shape
    size = sum(p.numel() for p in parameters)
    total = torch.zeros(size, size, dtype=found.rewards.dtype)
    for i in range(count):
        surrogate = log = torch.zeros((), dtype=found.rewards.dtype)
        for t in range(steps):
            if found.running[t, i]:
                worth = sum(discount**h * found.rewards[h, i] for h in range(t, steps))
                here = policy(found.observations[t, i]).log_prob(found.actions[t, i])
                surrogate, log = surrogate + worth * here, log + here
        g = _flat(torch.autograd.grad(surrogate, parameters, create_graph=True))
        score = _flat(torch.autograd.grad(log, parameters, create_graph=True)).detach()
        rows = [
            _flat(torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True))
            for entry in g
        ]
        total += torch.stack(rows) + g.detach()[:, None] * score
    return total / count


def _flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def nigt(gradient, start, steps, gamma0, eta0):
    """Minimise: the iterates of N-PG-IGT with this gradient function."""
    before = here = start.clone()
    d, path = None, []
    for t in range(steps):
        f = 2 / (t + 2)
        gamma, eta = gamma0 * f, eta0 * f ** (4 / 5)
        g = gradient(here + (1 - eta) / eta * (here - before))
        d = g if d is None else (1 - eta) * d + eta * g
        before, here = here, here - gamma * d / d.norm()
        path.append(here)
    return path


def harpg(gradient, product, start, steps, gamma0, eta0, shares, *, normalized):
    """Minimise: the iterates of (N-)HARPG; ``product(point, vector)``, and b of every step in ``shares``."""
    before = here = start.clone()
    d, path = None, []
    for t in range(steps):
        f = 2 / (t + 2)
        gamma, eta = gamma0 * (f if normalized else math.sqrt(f)), eta0 * f
        between = shares[t] * here + (1 - shares[t]) * before
        c = product(between, here - before)
        g = gradient(here)
        d = g if d is None else (1 - eta) * (d + c) + eta * g
        before, here = here, here - gamma * (d / d.norm() if normalized else d)
        path.append(here)
    return path
