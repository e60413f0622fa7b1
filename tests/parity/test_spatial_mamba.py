"""The parts of Spatial-Mamba against fixtures of the official code: state fusion, state scan, mixer, stem."""
import torch
from torch import nn

from visionssm.layers import ResidualStem, StateFusion
from visionssm.layers.state_fusion import merge_kernels
from visionssm.models._official import find_official, translate_key
from visionssm.models.spatial_mamba import StructureAwareMixer

FAMILY = 'spatial_mamba'
# official class -> (our module, prefix of its official keys in a model, of ours)
BLOCK, OURS = 'layers.0.blocks.0.self_attention.', 'stages.0.blocks.0.mixer.'
PREFIXES = {
    'StateFusion': (f'{BLOCK}state_fusion.', f'{OURS}ssm.fusion.'),
    'StructureAwareSSM': (BLOCK, OURS),
    'StructureAwareSSM.ssm': (BLOCK, OURS),
    'Stem': ('patch_embed.', 'stem.'),
}


def our_key(key: str, official_class: str) -> str:
    theirs, ours = PREFIXES[official_class]
    return translate_key(theirs + key, find_official(FAMILY).keys('SpatialMamba')).removeprefix(ours)


def build(golden) -> nn.Module:
    config, official_class = golden.meta['config'], golden.meta['official_class']
    if official_class == 'StateFusion':
        module = StateFusion(config['dim'])
    elif official_class == 'Stem':
        module = ResidualStem(config['in_chans'], config['embed_dim'])
    else:
        module = StructureAwareMixer(config['d_model'])
    module.load_state_dict({our_key(key, official_class): value for key, value in golden.state_dict.items()})
    return module.double().eval()


def run_part(golden) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of a module, and by official name what its gradients belong to."""
    official_class, module = golden.meta['official_class'], build(golden)
    parameters = dict(module.named_parameters())
    x = golden.tensors['input'].double().requires_grad_()
    out = module.ssm(x).permute(0, 3, 1, 2).flatten(2) if official_class == 'StructureAwareSSM.ssm' else module(x)
    names = golden.part('grad.').keys() - {'input'}
    return out, {'input': x, **{name: parameters[our_key(name, official_class)] for name in names}}


def run_scan(golden) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The states of a scan, which it returns where it is read out by ones, and its inputs."""
    inputs = {name: x.double().requires_grad_() for name, x in golden.part('input.').items()}
    u, delta, A, B, bias = (inputs[name] for name in ('u', 'delta', 'A', 'B', 'delta_bias'))
    h = torch.ops.visionssm.selective_scan(u, delta, A, B, torch.ones_like(A), None, None, bias, True)
    return h.unsqueeze(2), inputs


def test_parts_match_with_all_gradients(op_golden):
    out, leaves = (run_scan if op_golden.meta['official_class'] == 'selective_scan_fn' else run_part)(op_golden)
    torch.testing.assert_close(out, op_golden.tensors['output64'], rtol=1e-10, atol=1e-10)
    if 'output_merged' in op_golden.tensors:  # what the official kernel of the evaluation gives
        atol, rtol = float(op_golden.meta['atol']), float(op_golden.meta['rtol'])
        torch.testing.assert_close(out, op_golden.tensors['output_merged'].double(), rtol=rtol, atol=atol)
        fusion = build(op_golden)
        kernel = merge_kernels(list(fusion.kernels), fusion.alpha, fusion.dilations)
        expected = op_golden.tensors['merged_kernel'].double().view_as(kernel)
        torch.testing.assert_close(kernel, expected, rtol=1e-6, atol=1e-6)
    (out * op_golden.tensors['loss_weight']).sum().backward()
    for name, grad in op_golden.part('grad.').items():
        gap = (leaves[name].grad.view_as(grad) - grad).abs().max() / grad.abs().max()
        assert gap <= float(op_golden.meta['grad_rtol']), (name, gap.item())
