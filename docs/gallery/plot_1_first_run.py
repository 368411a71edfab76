"""A first run
===========

A network on the digits of scikit-learn, with Adam as it is and with OptEx around it: the same optimizer,
the same rate, the same batches. What is counted is gradients in turn, since they are what takes the time
where a gradient is slow.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import optex

torch.set_num_threads(1)
digits = load_digits()
inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
classes = torch.tensor(digits.target)
GRADIENTS = 60


def network():
    """The same start every time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))


def batches(count):
    """The same batches every time."""
    generator = torch.Generator().manual_seed(1)
    picked = torch.randint(len(inputs), (count, 32), generator=generator)
    return [(inputs[rows], classes[rows]) for rows in picked]


def whole_loss(model):
    """The loss over all digits."""
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(inputs), classes))


# %%
# The plain loop.

model = network()
base = torch.optim.Adam(model.parameters(), lr=3e-3)
plain = [whole_loss(model)]
for x, y in batches(GRADIENTS):
    base.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    base.step()
    plain.append(whole_loss(model))

# %%
# The same with OptEx: no ``zero_grad``, no ``backward``, no ``step``; the objective is the loss of a batch.
# With ``parallelism=1`` a round evaluates one gradient; it takes one step with that, and more on
# predictions where they hold.

curves = {"Adam": (range(len(plain)), plain)}
for parallelism in (1, 4):
    model = network()
    optimizer = optex.OptEx(torch.optim.Adam(model.parameters(), lr=3e-3), parallelism=parallelism)
    losses = [whole_loss(model)]

    def objective(batch, model=model):
        """The loss of a batch."""
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    for _ in optimizer.rounds(batches(GRADIENTS * parallelism), objective):
        losses.append(whole_loss(model))
        if len(losses) > GRADIENTS:
            break
    print(optimizer)
    curves[f"OptEx, N = {parallelism}"] = (range(len(losses)), losses)

# %%
# A round of N = 4 evaluates four gradients at once; on hardware that stands idle that takes the time of
# one.

figure, axes = plt.subplots(figsize=(7, 4))
for (name, (rounds, losses)), style in zip(curves.items(), ("--", "-", "-."), strict=True):
    axes.semilogy(rounds, losses, style, label=name)
axes.set(xlabel="rounds: gradients in turn", ylabel="loss over all digits")
axes.legend()
plt.show()
