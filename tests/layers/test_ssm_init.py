"""Initial values of state-space parameters."""
import math

import pytest
import torch
import torch.nn.functional as F

from visionssm.layers import SelectiveSSM, init_A_log_, init_dt_bias_, init_dt_proj_, negative_exp


def test_decay_starts_as_one_to_n():
    A_log = init_A_log_(torch.empty(3, 5))
    torch.testing.assert_close(negative_exp(A_log), -torch.arange(1., 6.).expand(3, 5))


def test_steps_are_log_uniform_between_their_bounds():
    steps = F.softplus(init_dt_bias_(torch.empty(20000, dtype=torch.float64)))
    assert 0.999e-3 <= steps.min() and steps.max() <= 0.1001
    # The mean of a log-uniform variable is the middle of the logarithms; 20,000 draws leave 0.01 of noise.
    assert steps.log().mean().item() == pytest.approx(0.5 * math.log(1e-3 * 0.1), abs=0.05)


def test_steps_do_not_fall_below_the_floor():
    steps = F.softplus(init_dt_bias_(torch.empty(1000), dt_min=1e-6, dt_max=1e-2, dt_floor=1e-4))
    assert steps.min() >= 0.99e-4


def test_step_projection_is_bounded_by_its_rank():
    weight = init_dt_proj_(torch.empty(500, 9))
    assert weight.abs().max() <= 1 / 3
    assert weight.abs().max() > 0.3


@pytest.mark.parametrize(('dtype', 'expected'), [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_decay_is_computed_in_float32_or_better(dtype: torch.dtype, expected: torch.dtype):
    assert negative_exp(torch.zeros(2, 3, dtype=dtype)).dtype == expected


def test_module_has_the_last_word_on_its_projections():
    ssm = SelectiveSSM(64, dt_rank=4)
    torch.nn.init.constant_(ssm.dt_proj.weight, 9.)
    ssm.reset_parameters()
    assert ssm.dt_proj.weight.abs().max() <= 0.5
    assert (ssm.D == 1).all()
