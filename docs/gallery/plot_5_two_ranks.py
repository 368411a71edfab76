"""Two ranks
=========

``torchrun`` starts a program once for each rank, and ``DistributedEvaluator`` spreads the points of a round
over the ranks. Here two ranks on one machine train the network of :doc:`/docs/examples/train_distributed`,
and write checkpoints.
"""

import os
import subprocess
import sys
import tempfile

# On a command line: torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --steps 80
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

with tempfile.TemporaryDirectory() as folder:
    run = subprocess.run(
        [*torchrun, "../../examples/train_distributed.py", "--steps", "80", "--checkpoints", folder],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

# %%
# What rank 0 printed:

print(run.stdout)
