"""A small model with adapters whose every value is its own, for the tests of checkpoints."""

import torch
from torch import nn

import afa_kernels as afa

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"up": nn.Linear(6, 12), "down": nn.Linear(12, 6)})
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body["down"](torch.relu(self.body["up"](x))))


def net():
    torch.manual_seed(0)
    return Net()


def wake(model, alpha_t=0.0):
    """Give every branch and every trainable module values of its own, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    afa.set_alpha_t(model, alpha_t)
    return model


X = torch.linspace(-2, 2, 24).view(4, 6)


def outputs(model):
    with torch.no_grad():
        if isinstance(model, Net):
            return model(X)
        return model(torch.arange(10).view(2, 5)).logits
