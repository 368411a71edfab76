"""Coordinate-wise estimates the obvious way: a copy of everything for every coordinate; scores by autograd."""

import copy

import torch
from torch import nn

import optex

__all__ = ["blocks", "coordinate_gradient", "grasp_scores", "squared"]


def squared(out, batch):
    return (out - batch[1]).square().mean()


def blocks(dropout=0.0, dtype=torch.float64, seed=0):
    """Three blocks, the second with dropout; [n, 6] to [n, 3]."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh()),
        nn.Sequential(nn.Dropout(dropout), nn.Linear(5, 4), nn.Tanh()),
        nn.Linear(4, 3),
    ).to(dtype)


def block_loss(dropout=0.0, dtype=torch.float64):
    return optex.BlockLoss(blocks(dropout, dtype), squared)


@torch.no_grad()
def coordinate_gradient(model, batch, mu, *, central=False, active=None):
    """Every coordinate of every parameter of a copy; all draws from where torch's generator stands now."""
    draws, answers = torch.get_rng_state(), []

    def loss(place=0, index=None, shift=0.0):
        other = copy.deepcopy(model)
        if index is not None:
            p = list(other.parameters())[place]
            p.view(-1)[index] += shift
        torch.set_rng_state(draws)
        return float(other(batch))

    base = loss()
    for place, p in enumerate(model.parameters()):
        row = torch.zeros(p.numel(), dtype=torch.float64)
        for index in range(p.numel()) if active is None else active[place].tolist():
            ahead = loss(place, index, mu)
            row[index] = (ahead - loss(place, index, -mu)) / (2 * mu) if central else (ahead - base) / mu
        answers.append(row.view(p.shape))
    return base, answers


def grasp_scores(model, batch):
    """-θ ⊙ (H g), by differentiating twice."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(batch), parameters, create_graph=True)
    products = torch.autograd.grad(gradients, parameters, [g.detach() for g in gradients])
    return [-p.detach() * h for p, h in zip(parameters, products, strict=True)]
