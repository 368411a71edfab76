"""Does it pay here?
=================

``optex.advise`` measures a model where it stands: what a gradient takes, what a round of OptEx costs beyond
its gradients, how many steps a round keeps. Everything is put back as it was, to the bit.
"""

import torch

import optex

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
inputs = torch.randn(256, 20)
targets = torch.sin(inputs.sum(1, keepdim=True))
batches = [(inputs[i : i + 64], targets[i : i + 64]) for i in range(0, 256, 64)] * 50


def objective(batch):
    """The loss of a batch."""
    return (model(batch[0]) - batch[1]).square().mean()


base = torch.optim.Adam(model.parameters(), lr=0.01)
advice = optex.advise(base, batches, objective, model=model, seconds=5)
print(advice)

# %%
# A gradient of this network takes less than a millisecond, and a prediction is not cheaper than that. So
# the advice is, most likely, to leave it; and how slow a gradient would have to be.
#
# The same network with a gradient that is slow, as that of a simulator:

import time  # noqa: E402


def slow(batch):
    """The loss of a batch, from something that takes its time."""
    time.sleep(0.05)
    return objective(batch)


print(optex.advise(base, batches, slow, model=model, seconds=10))
