"""ScaleBiO the slow, obvious way: one function, differentiated as it is written, and two loops in turn."""

import copy

import torch


def penalty(problem_losses, logits, model, rival, alpha, batch):
    """Φ, by autograd through everything; an absent source (None in the list) is left out of both sums."""
    validation, training = problem_losses
    q = torch.softmax(logits, 0)
    at_w, at_u = training(model, batch), training(rival, batch)
    there = [k for k, loss in enumerate(at_w) if loss is not None]
    total = sum(q[k] for k in there)
    of_w = sum(q[k] * at_w[k] for k in there) / total
    of_u = sum(q[k] * at_u[k] for k in there) / total
    return validation(model, batch) + alpha * (of_w - of_u)


def field(problem_losses, logits, model, rival, alpha, batch=None):
    """(∇_p Φ, ∇_w Φ / α, -∇_u Φ / α)."""
    value = penalty(problem_losses, logits, model, rival, alpha, batch)
    own = [logits, *model.parameters(), *rival.parameters()]
    found = torch.autograd.grad(value, own, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]
    count = len(list(model.parameters()))
    in_w, in_u = found[1 : 1 + count], found[1 + count :]
    return value.detach(), [found[0], *(g / alpha for g in in_w), *(-g / alpha for g in in_u)]


def descent(problem_losses, sources, model, alpha, lr, lr_weights, steps):
    """Plain steps along the field, from equal weights: logits, w and u, one tensor each."""
    logits = torch.zeros(sources, dtype=torch.float64, requires_grad=True)
    model, rival = copy.deepcopy(model), copy.deepcopy(model)
    for _ in range(steps):
        _, along = field(problem_losses, logits, model, rival, alpha)
        with torch.no_grad():
            logits -= lr_weights * along[0]
            for p, g in zip([*model.parameters(), *rival.parameters()], along[1:], strict=True):
                p -= lr * g
    return logits.detach(), model, rival


class Regression:
    """Least squares on K sources of rows, two clean and one noise; a batch is row numbers, None is all rows."""

    def __init__(self, seed=0, rows=40, width=3):
        draws = torch.Generator().manual_seed(seed)
        slope = torch.randn(width, generator=draws, dtype=torch.float64)
        self.x = torch.randn(4, rows, width, generator=draws, dtype=torch.float64)
        self.y = self.x @ slope
        self.y[2] = torch.randn(rows, generator=draws, dtype=torch.float64)
        self.y += 0.1 * torch.randn(4, rows, generator=draws, dtype=torch.float64)

    def upper(self, network, batch):
        return self._squares(network, batch)[-1].mean()

    def lower(self, network, batch):
        return self._squares(network, batch)[:-1].mean(1)

    def samples(self, network, batch):
        """The same, as losses of rows with their sources."""
        losses = self._squares(network, batch)[:-1]
        return losses.flatten(), torch.arange(3).repeat_interleave(losses.shape[1])

    def losses(self):
        return self.upper, self.lower

    def batches(self, count, size=20, seed=0):
        draws = torch.Generator().manual_seed(seed)
        return [torch.randperm(self.x.shape[1], generator=draws)[:size] for _ in range(count)]

    def _squares(self, network, batch):
        rows = slice(None) if batch is None else batch
        return (network(self.x[:, rows])[..., 0] - self.y[:, rows]).square()


class Tower(torch.nn.Module):
    """A linear layer in, blocks with residual connections, a linear layer out."""

    def __init__(self, width=3, blocks=4, seed=0):
        super().__init__()
        self.enter = torch.nn.Linear(width, width, dtype=torch.float64)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Linear(width, width, dtype=torch.float64) for _ in range(blocks)
        )
        self.leave = torch.nn.Linear(width, 1, dtype=torch.float64)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=draws, dtype=torch.float64))

    def forward(self, x):
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return self.leave(hidden)


def line(width=3, seed=1):
    """A linear model with a start of its own."""
    network = torch.nn.Linear(width, 1, bias=False, dtype=torch.float64)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.weight.copy_(torch.randn(1, width, generator=draws, dtype=torch.float64))
    return network
