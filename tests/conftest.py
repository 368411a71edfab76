import torch

# Small tensors everywhere: a second thread only waits, and workers of pytest-xdist would fight for cores.
torch.set_num_threads(1)
