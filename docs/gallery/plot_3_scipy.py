"""Beside SciPy
============

``optex.minimize`` has SciPy's shape, and ``scipy_method`` makes it one of SciPy's methods. On a smooth
function without noise SciPy's own L-BFGS is the better choice; on one that is sampled it has nothing to
hold on to.
"""

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize, rosen, rosen_der

import optex

start = np.full(10, 1.5)
ours = optex.minimize(rosen, start, jac=rosen_der, optimizer="adam", lr=0.02, parallelism=4, maxiter=400)
theirs = minimize(rosen, start, jac=rosen_der, method="L-BFGS-B")
print("optex   ", ours.fun, "after", ours.nit, "rounds of 4 gradients")
print("L-BFGS-B", theirs.fun, "after", theirs.njev, "gradients")

# %%
# Now every gradient is one of many: noise of a tenth of the gradient's length at the start.

generator = np.random.default_rng(0)
SCALE = 0.1 * np.linalg.norm(rosen_der(start)) / np.sqrt(len(start))


def sampled(x):
    """The gradient, and noise."""
    return rosen_der(x) + SCALE * generator.normal(size=len(x))


def followed(run):
    """The values at the points that a run came through."""
    values = []
    run(lambda intermediate_result: values.append(rosen(intermediate_result.x)))
    return values


curves = {
    "optex, Adam": followed(
        lambda told: optex.minimize(
            rosen, start, jac=sampled, lr=0.02, parallelism=4, maxiter=200, callback=told
        )
    ),
    "L-BFGS-B": followed(lambda told: minimize(rosen, start, jac=sampled, method="L-BFGS-B", callback=told)),
}
figure, axes = plt.subplots(figsize=(7, 4))
for (name, values), style in zip(curves.items(), ("-", "--"), strict=True):
    axes.semilogy(values, style, label=name)
axes.set(xlabel="rounds, iterations", ylabel="Rosenbrock's function, without noise")
axes.legend()
plt.show()
