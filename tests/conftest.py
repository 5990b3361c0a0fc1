import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads

import torch

import realsr_r1  # noqa: F401  lets torchvision import beside a CPU-only torch

torch.manual_seed(0)
