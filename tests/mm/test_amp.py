"""Mixed precision: bfloat16 autocast on the CPU, a clear refusal of float16 there, the scaler's arguments."""
import numpy as np
import pytest
import torch
from torch import nn

from visionssm.openmmlab.amp import AmpOptimWrapper, OptimWrapper


@pytest.fixture
def wrapped():
    model = nn.Linear(4, 4)
    return model, AmpOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_bfloat16_is_the_default_and_autocasts_on_this_device(wrapped):
    model, wrapper = wrapped
    device = wrapper.device_type
    with wrapper.optim_context(model):
        assert model.to(device)(torch.ones(2, 4, device=device)).dtype is torch.bfloat16


def test_parameters_stay_in_float32(wrapped):
    model, wrapper = wrapped
    with wrapper.optim_context(model):
        loss = model(torch.ones(2, 4)).float().sum()
    wrapper.update_params(loss)
    assert model.weight.dtype is torch.float32


def test_float16_on_a_cpu_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr('visionssm.openmmlab.amp.get_device', lambda: 'cpu')
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'needs a GPU.*--amp bf16'):
        AmpOptimWrapper(optimizer=optimizer, dtype='float16')


def test_an_unknown_dtype_names_the_known_ones():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"bf16, bfloat16, fp16, float16, got 'int8'"):
        AmpOptimWrapper(optimizer=optimizer, dtype='int8')


def test_state_moves_between_precisions(wrapped):
    model, wrapper = wrapped
    plain = OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    wrapper.load_state_dict({**plain.state_dict(), 'loss_scaler': {'scale': 2.0}})
    assert wrapper.get_lr()['lr'] == [0.5]


def test_accumulated_steps_equal_one_large_step():
    torch.manual_seed(0)
    data = torch.randn(8, 4)
    results = []
    for parts in (1, 4):
        torch.manual_seed(1)
        model = nn.Linear(4, 1)
        wrapper = OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=parts,
                               clip_grad=dict(max_norm=0.5))
        wrapper.initialize_count_status(model, 0, parts)
        for part in data.chunk(parts):
            wrapper.update_params(model(part).pow(2).mean())
        results.append(model.weight.detach().clone())
    torch.testing.assert_close(results[0], results[1])


def test_training_with_amp_follows_float32(train_toy, toy_config):
    curves = []
    for name, wrapper in (('full', {}), ('half', dict(type='AmpOptimWrapper', dtype='bfloat16'))):
        cfg = toy_config(name)
        cfg.optim_wrapper.update(wrapper)
        curves.append(train_toy(cfg).message_hub.get_scalar('train/loss').data[0])
    # observed: 9e-4 relative; equal curves would mean that autocast was off
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.01)
    assert (curves[0] != curves[1]).any()
