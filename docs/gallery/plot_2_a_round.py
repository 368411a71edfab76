"""A round, drawn
==============

What a round does in two dimensions: the base optimizer walks ahead on predicted gradients (the draft), true
gradients are evaluated at N of those points, and the steps are taken again with what was measured, as far
as it holds up (the replay).

The base optimizer's own step hooks tell where it goes, drafted steps among them, and the objective is told
where it is asked.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import optex

torch.set_num_threads(1)


def valley(x, y):
    """Rosenbrock's, less steep."""
    return (1 - x) ** 2 + 5 * (y - x**2) ** 2


theta = torch.nn.Parameter(torch.tensor([-1.2, 1.6], dtype=torch.float64))
base = torch.optim.Adam([theta], lr=0.08)
optimizer = optex.OptEx(base, parallelism=3, deterministic=True)
walked, asked = [], []
base.register_step_post_hook(lambda *_: walked.append(theta.detach().clone().numpy()))


def objective(_):
    """The value at theta, which is written down."""
    asked.append(theta.detach().clone().numpy())
    return valley(*theta)


# %%
# Some rounds to fill the history, then one that is watched.

loop = optimizer.rounds([None] * 200, objective)
for report in loop:
    if report.number == 7:
        break
walked.clear()
asked.clear()
start = theta.detach().clone().numpy()
report = next(loop)
drafted = walked[: len(walked) - report.accepted]
kept = walked[len(walked) - report.accepted :]
print(f"{len(drafted)} steps drafted, {len(asked)} gradients evaluated, {report.accepted} steps kept")

# %%
# The line is where the optimizer went, the crosses are where true gradients were evaluated.

figure, axes = plt.subplots(figsize=(7, 5))
points = np.array([start, *drafted, *kept, *asked])
low, high = points.min(0), points.max(0)
pad = 0.5 * (high - low).max() * np.array([1.0, 0.6])
x, y = np.meshgrid(*(np.linspace(a - p, b + p, 200) for a, b, p in zip(low, high, pad, strict=True)))
axes.contour(x, y, valley(x, y), levels=30, colors="0.85", linewidths=0.8)
axes.plot(
    *np.array([start, *drafted]).T, "o--", color="#56B4E9", label="draft, on predictions", ms=9, mfc="none"
)
axes.plot(*np.array([start, *kept]).T, "o-", color="#D55E00", label="replay, kept", ms=4)
axes.plot(*np.array(asked).T, "x", color="black", label="true gradients", ms=10, mew=2)
axes.plot(*start, "s", color="#009E73", label="the round's start", ms=8)
axes.set(xlabel="x", ylabel="y", title="One round")
axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
figure.tight_layout()
plt.show()
