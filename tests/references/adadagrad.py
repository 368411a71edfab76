"""AdaGrad-Norm and AdAdaGrad's tests, sample by sample and coordinate by coordinate, in float64."""

import math

import torch


def adagrad_norm(gradient_of, start, lr, accumulator, steps):
    """Ward, Wu, Bottou, Algorithm 1, on one flat vector; all points and sums."""
    point, points, sums = start.clone(), [], []
    for step in range(steps):
        gradient = gradient_of(point, step)
        for value in gradient.tolist():
            accumulator += value**2
        point = point - lr / math.sqrt(accumulator) * gradient
        points.append(point)
        sums.append(accumulator)
    return points, sums


def sample_gradients(objective, model, batch):
    """Each sample's gradient by a backward pass of its own, flattened over all parameters: b rows."""
    rows = []
    for i in range(len(batch[0])):
        model.zero_grad()
        objective(tuple(part[i : i + 1] for part in batch)).backward()
        parts = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad
        ]
        rows.append(torch.cat([part.reshape(-1) for part in parts]).tolist())
    model.zero_grad()
    return rows


def statistics(rows, each=1):
    """All statistics of rows that are each the mean over so many samples."""
    count, width = len(rows), len(rows[0])
    mean = [sum(row[j] for row in rows) / count for j in range(width)]
    square = sum(value**2 for value in mean)
    variances = [each * sum((row[j] - mean[j]) ** 2 for row in rows) / (count - 1) for j in range(width)]
    products = [sum(a * b for a, b in zip(row, mean, strict=True)) for row in rows]
    middle = sum(products) / count
    along = each * sum((product - middle) ** 2 for product in products) / (count - 1)
    across = 0.0
    for row, product in zip(rows, products, strict=True):
        across += sum((row[j] - product / square * mean[j]) ** 2 for j in range(width))
    ratios = [
        (0.0 if v == 0 else math.inf) if m == 0 else v / m**2 for v, m in zip(variances, mean, strict=True)
    ]
    return {
        "squared_norm": square,
        "variance": sum(variances),
        "inner_product_variance": along,
        "orthogonal_variance": each * across / (count - 1),
        "coordinate_ratio": max(ratios),
    }
