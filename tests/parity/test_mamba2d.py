"""Mamba2D's mixers against fixtures of the official modules; sizes of its registered models."""
import pytest
import torch

import visionssm
from visionssm.models._official import find_official, translate_key
from visionssm.models.mamba2d import M2DMixer, MapAttention

FAMILY = 'mamba2d'
PREFIXES = 'backbone.stages.0.0.token_mixer.', 'stages.0.blocks.0.mixer.'


def build(golden, dtype: torch.dtype) -> torch.nn.Module:
    config = golden.meta['config']
    if golden.meta['official_class'] == 'M2DBlock':
        model = M2DMixer(config['d_model'], local=config['local_path'], reverse=config['scan_start'] == 'BR')
    else:
        model = MapAttention(config['dim'])
    model.load_state_dict({our_name(key): value for key, value in golden.state_dict.items()})
    return model.eval().to(dtype)


def our_name(key: str) -> str:
    table = find_official('mamba2d').keys('Mamba2DClassifier')
    return translate_key(PREFIXES[0] + key, table).removeprefix(PREFIXES[1])


def test_mixers_match_the_official_modules(op_golden):
    if op_golden.meta['official_class'].startswith(('wf_cuda', 'wavefront')):
        pytest.skip('no module: tests/kernels/test_wavefront_scan.py runs the scans')
    model = build(op_golden, torch.float64)
    with torch.no_grad():
        out = model(op_golden.tensors['input'].double())
    torch.testing.assert_close(out, op_golden.tensors['output64'], rtol=1e-10, atol=1e-10)
    model = build(op_golden, torch.float32)
    x = op_golden.tensors['input'].clone().requires_grad_()
    out = model(x)
    meta = op_golden.meta
    torch.testing.assert_close(out, op_golden.tensors['output'], rtol=float(meta['rtol']), atol=float(meta['atol']))
    (out * op_golden.tensors['loss_weight']).sum().backward()
    gradients = {'input': x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    for key, expected in op_golden.part('grad.').items():
        gap = (gradients[key if key == 'input' else our_name(key)] - expected).abs().max() / expected.abs().max()
        assert gap <= float(meta['grad_rtol']), key


@pytest.mark.parametrize(('name', 'parameters'), [
    ('mamba2d_nano', 7_178_496), ('mamba2d_tiny', 26_523_136), ('mamba2d_small', 50_273_636),
    ('mamba2d_tiny_v1', 26_687_880)])
def test_registered_models_have_the_published_size_and_keys(name: str, parameters: int):
    model = visionssm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == parameters
    official = visionssm.to_official('mamba2d', model)
    with torch.device('meta'):
        rebuilt = visionssm.from_official('mamba2d', official)
    assert visionssm.to_official('mamba2d', rebuilt).keys() == official.keys()
