"""One thread per test process: the machine has few cores, and several test processes run at once."""

import torch

torch.set_num_threads(1)
