"""Counting of parameters and multiply-adds: by hand, against published numbers, without side effects."""
import pytest
import torch
from torch import nn

import visionssm
from visionssm.analysis import count_flops
from visionssm.layers import BiMamba


class Tokens(nn.Module):
    """A stem and a mixer over its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.BatchNorm2d(8))
        self.mixer = BiMamba(8, d_state=4, d_conv=3, expand=2, dt_rank=1, bimamba_type='none')
        self.shared = nn.ModuleList([nn.Linear(8, 5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mixer(self.stem(x).flatten(2).transpose(1, 2))
        return self.shared[0](self.shared[0](x).repeat(1, 1, 2)[..., :8])


def test_a_small_model_counted_by_hand():
    counts = count_flops(Tokens(), (3, 16, 8))
    length, dim, inner, state, rank = 8, 8, 16, 4, 1
    linear = length * (2 * dim * inner + inner * dim + 2 * dim * 5)
    projections = length * inner * (rank + 2 * state + rank)
    conv = length * inner * 3
    scan = length * inner * (3 * state + 1.5)  # softplus's bias is an addition, half a MAC; the skip a whole one
    assert counts['by_module'].pop('Conv2d') == length * dim * 3 * 16
    assert counts['by_module'].pop('Linear') == linear + projections
    ssm = counts['by_module'].pop('SelectiveSSM')
    assert ssm == counts['by_op']['visionssm.routed_scan'] + counts['by_op']['visionssm.causal_conv1d']
    assert counts['by_op']['visionssm.routed_scan'] == scan
    assert conv <= counts['by_op']['visionssm.causal_conv1d'] <= 2 * conv  # bias and activation belong to it
    assert counts['by_module'] == {}
    assert counts['params'] == sum(p.numel() for p in Tokens().parameters())


def test_counts_scale_with_the_batch_and_add_up():
    model = visionssm.create_model('vim2_pico', device='meta')
    one, four = (count_flops(model, (3, 32, 32), batch) for batch in (1, 4))
    for counts in (one, four):
        assert sum(counts['by_op'].values()) == pytest.approx(counts['macs'], abs=len(counts['by_op']))
        assert sum(counts['by_module'].values()) == pytest.approx(counts['macs'], abs=99)
    assert four['macs'] == pytest.approx(4 * one['macs'], abs=4)
    assert four['params'] == one['params']


def test_the_model_stays_as_it_was():
    model = Tokens()
    model.mixer.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert count_flops(model, (3, 16, 8)) == count_flops(model.half(), (3, 16, 8))
    model.float()
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()
               if 'num_batches' in name or 'running' in name)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(('name', 'published'), [('vim_tiny', 1.5e9), ('vmamba_tiny', 4.9e9)])
def test_counts_are_near_published_ones(name: str, published: float):
    counts = count_flops(visionssm.create_model(name, device='meta'))
    assert counts['macs'] == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize('name', [n for n in visionssm.list_models('classification') if n.endswith('_pico')])
def test_no_family_has_an_operator_without_a_formula(name: str):
    model = visionssm.create_model(name, device='meta')
    called = set()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    with Recorder(), torch.no_grad():
        model.eval()(torch.empty(1, *model.default_cfg['input_size'], device='meta'))
    ours = {op for op in called if op.startswith('visionssm')}
    assert ours == {op for op in count_flops(model, model.default_cfg['input_size'])['by_op'] if op in called} & ours


@pytest.mark.parametrize('size', [(32, 32), (3, 0, 32)])
def test_sizes_that_make_no_image_are_refused(size: tuple[int, ...]):
    with pytest.raises(ValueError, match='input_size is'):
        count_flops(Tokens(), size)
