"""What MHS-VM alone must equal: its operators, the maps inside the U-Net, files of the official training."""
import pytest
import torch

import visionssm
from visionssm.checkpoints import load_state_dict
from visionssm.layers import scan_route_attention
from visionssm.models._official import find_official, translate_key

FAMILY = 'mhs_vm'


def build(golden, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = visionssm.from_official(
        FAMILY, golden.state_dict, golden.meta['config'], official_class=golden.meta['official_class'])
    return model.eval().to(dtype)


def test_operators_match(op_golden):
    for dtype, name, bound in ((torch.float32, 'output', float(op_golden.meta['atol'])),
                               (torch.float64, 'output64', 1e-10)):
        out = build(op_golden, dtype)(op_golden.tensors['input'].to(dtype))
        assert (out - op_golden.tensors[name]).abs().max() <= bound


def test_gradients_of_operators_match(op_golden):
    model = build(op_golden)
    x = op_golden.tensors['input'].clone().requires_grad_()
    (model(x) * op_golden.tensors['loss_weight']).sum().backward()
    table = find_official(FAMILY).keys(op_golden.meta['official_class'])
    ours = {'input': x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    expected = op_golden.part('grad.')
    assert len(expected) > 5
    for key, grad in expected.items():
        gap = (ours[translate_key(key, table)] - grad).abs().max() / grad.abs().max()
        assert gap <= float(op_golden.meta['grad_rtol']), key


def test_fusion_of_routes_matches(op_golden):
    threshold = op_golden.meta['config']['para_dict']['gfu_t']
    heads = [key.split('.')[1] for key in op_golden.tensors if key.endswith('.fused')]
    assert len(heads) >= 3
    for head in heads:
        y = op_golden.tensors[f'inter.{head}.rearranged']  # (B, 4, D, L)
        fused = scan_route_attention(y[:, None, ..., None], threshold)[:, 0, ..., 0]
        torch.testing.assert_close(fused, op_golden.tensors[f'inter.{head}.fused'], atol=1e-5, rtol=1e-5)


def test_operators_come_back_in_their_official_names_and_are_told_by_them(op_golden):
    official_class = op_golden.meta['official_class']
    back = visionssm.to_official(FAMILY, build(op_golden), official_class=official_class)
    assert back.keys() == op_golden.state_dict.keys()
    assert all(torch.equal(back[key], value) for key, value in op_golden.state_dict.items())
    told, config = find_official(FAMILY).infer(op_golden.state_dict)
    given = op_golden.meta['config']
    assert told == official_class
    assert config == {'d_model': given['d_model'], 'd_state': given['d_state'],
                      'para_dict': {**given['para_dict'], 'gfu_t': 0.4}}


def test_maps_inside_the_unet_match(golden):
    model, tensors = build(golden, torch.float64), golden.tensors
    maps: list[torch.Tensor] = []
    for stage in model.up_stages:
        stage.register_forward_hook(lambda module, args, out: maps.append(out))
    model(tensors['input'].double())
    x = tensors['input'].double().expand(-1, 3, -1, -1)
    deep, skips = model.encode(x)
    found = {'encoder_out': deep, **{f'feature.{i}': skip for i, skip in enumerate(skips)},
             **{f'decoder.{i}': out for i, out in enumerate(maps)}}
    assert found.keys() == {key for key in tensors if key.startswith(('feature.', 'decoder.', 'encoder_out'))}
    bound = float(golden.meta['atol']) + float(golden.meta['tolerance']['measured_fp32_vs_fp64'])
    for key, value in found.items():
        scale = max(1., tensors[key].abs().max().item())
        assert (value.permute(0, 3, 1, 2) - tensors[key]).abs().max() <= 10 * bound * scale, key


def test_files_of_the_official_training_load(table):
    """Tensors under two names, buffers of a profiler, no word of the threshold."""
    path = table.path.with_name(table.path.name.replace('_expected.safetensors', '.pth'))
    if not path.name.startswith('ckpt'):
        pytest.skip('losses, metrics and preparation of images')
    weights = load_state_dict(path)
    assert any(key.endswith('total_ops') for key in weights)
    model = visionssm.from_official(FAMILY, weights).eval()
    with torch.no_grad():
        out = model(table.tensors['input'])
    torch.testing.assert_close(out, table.tensors['output'], rtol=0, atol=float(table.meta['atol']))


def test_profiled_files_of_released_sizes_load(key_list):
    _, content = key_list
    keys = {**content['keys'], **content['thop_extra_keys']}
    weights = {key: torch.empty(entry['shape'], device='meta') for key, entry in keys.items()}
    with torch.device('meta'):
        model = visionssm.from_official(FAMILY, weights, content['official_config'])
    back = visionssm.to_official(FAMILY, model)
    assert back.keys() == content['keys'].keys()
    assert all(back[alias] is back[key] for key, alias in content['aliases'].items())
