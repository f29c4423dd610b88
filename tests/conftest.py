"""Pytest settings for all tests: one PyTorch thread per process, because several test processes run at once."""

import torch

torch.set_num_threads(1)
