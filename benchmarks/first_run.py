"""The shortest run of each front door, with the library alone: what ``make package`` tries."""

from __future__ import annotations

import subprocess
import sys

import torch
from scipy.optimize import rosen, rosen_der

import optex


def main() -> None:
    """A torch model, a SciPy function, and what the command line says without its extra."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = optex.OptEx(torch.optim.SGD(model.parameters(), lr=0.1), parallelism=4, deterministic=True)
    inputs = torch.randn(32, 3)
    reports = list(optimizer.rounds([None] * 40, lambda _: (model(inputs) - inputs[:, :1]).square().mean()))
    assert reports[-1].loss < 0.1 * reports[0].loss, reports[-1]
    result = optex.minimize(rosen, [1.3, 0.7], jac=rosen_der, lr=0.05, maxiter=20)
    assert result.fun < rosen([1.3, 0.7]), result
    version = subprocess.run(
        [sys.executable, "-m", "optex", "--version"], capture_output=True, text=True, check=False
    )
    # With the extra it answers, without it says what to install.
    assert optex.__version__ in version.stdout or 'pip install "optex[studies]"' in version.stderr, version
    print(f"optex {optex.__version__}: {len(reports)} rounds in torch, {result.nit} in SciPy")


if __name__ == "__main__":
    main()
