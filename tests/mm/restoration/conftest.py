"""Fixtures of the tests that measure LPIPS."""
from types import SimpleNamespace

import pytest
import torch
import torchvision


@pytest.fixture
def bare_alexnet(monkeypatch):
    """AlexNet without its classifier, 58 million parameters that LPIPS does not read; its weights cannot be fetched."""
    whole = torchvision.models.alexnet

    def features(weights=None):
        if weights is not None:
            raise OSError('no route to host')
        with torch.device('meta'):
            net = whole(weights=None).features
        net.to_empty(device='cpu')
        for module in net:
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        return SimpleNamespace(features=net)

    monkeypatch.setattr(torchvision.models, 'alexnet', features)
