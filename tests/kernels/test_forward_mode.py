"""Derivatives in forward mode, which the ops do not have: an error instead of zeros."""
import pytest
import torch
from torch.autograd import forward_ad

from visionssm_kernels import causal_conv1d, dilated_conv2d, nc_ssd, selective_scan, ssd, wavefront_scan_2d

CALLS = {
    'selective_scan': (lambda x: selective_scan(x, x, -torch.ones(3, 2), torch.ones(1, 2, 4), torch.ones(1, 2, 4)),
                       (1, 3, 4)),
    'ssd': (lambda x: ssd(x, x[..., 0], -torch.ones(2), torch.ones(1, 4, 1, 2), torch.ones(1, 4, 1, 2)), (1, 4, 2, 3)),
    'nc_ssd': (lambda x: nc_ssd(x, x[..., 0], -torch.ones(2), torch.ones(1, 4, 1, 2), torch.ones(1, 4, 1, 2)),
               (1, 4, 2, 3)),
    'wavefront_scan_2d': (lambda x: wavefront_scan_2d(
        x, x, x, *[-torch.ones(3, 2)] * 2, *[torch.ones(1, 2, 4, 5)] * 3), (1, 3, 4, 5)),
    'causal_conv1d': (lambda x: causal_conv1d(x, torch.ones(3, 2)), (1, 3, 4)),
    'dilated_conv2d': (lambda x: dilated_conv2d(x, torch.ones(1, 3, 3, 3), [2]), (1, 3, 4, 5)),
}


@pytest.mark.parametrize('name', CALLS)
def test_forward_mode_is_refused(name: str):
    function, size = CALLS[name]
    x = torch.rand(size)
    with pytest.raises(NotImplementedError, match='has no derivative in forward mode.*torch.autograd.grad'):
        torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        function(forward_ad.make_dual(x, x))
    assert function(x).isfinite().all()  # and works again behind it
