"""Running an artifact over several processes, started by torchrun. Only here does the runtime import torch."""
