"""Vim against fixtures of the official code: outputs, maps, gradients, keys and sizes of the released models."""
import pytest
import torch

import visionssm
from visionssm.layers import resize_pos_embed_leading
from visionssm.models._official import find_official, translate_key

FAMILY = 'vim'


def build(golden, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = visionssm.from_official(
        FAMILY, golden.state_dict, golden.meta['config'], official_class=golden.meta['official_class'])
    return model.eval().to(dtype)


def run(golden, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Model, input with gradient, output; the maps of a dense model are flattened and concatenated."""
    model = build(golden, dtype)
    x = golden.tensors['input'].to(dtype).requires_grad_()
    out = model(x)
    return model, x, torch.cat([m.flatten(1) for m in out], dim=1) if golden.dense else out


def worst(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float) -> float:
    """Largest difference in units of what is allowed."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs() / (atol + rtol * expected.abs())).max().item()


def test_output_matches_in_float32(golden):
    with torch.no_grad():
        _, _, out = run(golden)
    assert worst(out, golden.tensors['output'], float(golden.meta['atol']), float(golden.meta['rtol'])) <= 1


def test_output_matches_in_float64(golden):
    with torch.no_grad():
        _, _, out = run(golden, torch.float64)
    assert worst(out, golden.tensors['output64'], 1e-12, 1e-12) <= 1  # observed 9e-15


def test_maps_match(dense_golden):
    with torch.no_grad():
        maps = build(dense_golden)(dense_golden.tensors['input'])
    expected = dense_golden.part('feature.')
    assert len(maps) == len(expected)
    for i, actual in enumerate(maps):
        assert worst(actual, expected[str(i)], float(dense_golden.meta['atol']), float(dense_golden.meta['rtol'])) <= 1


def test_gradients_match(golden):
    model, x, out = run(golden)
    (out * golden.tensors['loss_weight']).sum().backward()
    table = find_official(FAMILY).keys(golden.meta['official_class'])
    ours = {'input': x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    expected = golden.part('grad.')
    assert len(expected) > 5
    gaps = {
        key: ((ours[translate_key(key, table)] - grad).abs().max() / grad.abs().max()).item()
        for key, grad in expected.items()}
    assert max(gaps.values()) <= float(golden.meta['grad_rtol']), gaps


def test_official_keys_come_back(golden):
    model = build(golden)
    back = visionssm.to_official(FAMILY, model, official_class=golden.meta['official_class'])
    assert back.keys() == golden.state_dict.keys()
    for key, value in golden.state_dict.items():
        torch.testing.assert_close(back[key], value, rtol=0, atol=1e-6 if 'rope' in key else 0)


def test_state_dict_alone_tells_the_model(golden):
    """Without a configuration the released models' one is inferred; what it cannot tell is fixed in these cases."""
    if isinstance(golden.meta['config'].get('img_size'), list):
        with pytest.raises(ValueError, match='form no square'):
            visionssm.from_official(FAMILY, golden.state_dict)
        return
    model = visionssm.from_official(FAMILY, golden.state_dict).eval()
    with torch.no_grad():
        out = model(golden.tensors['input'])
    assert (len(out) == len(golden.part('feature.'))) if golden.dense else out.shape == golden.tensors['output'].shape


def test_official_resize_matches(table):
    for i, config in enumerate(table.meta['config']):
        out = resize_pos_embed_leading(
            table.tensors[f'case{i}.in'], config['new_grid'], config['num_extra_tokens'])
        torch.testing.assert_close(out, table.tensors[f'case{i}.out'], rtol=0, atol=float(table.meta['atol']))


def meta_state_dict(key_list: dict, prefix: str = '') -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(prefix): torch.empty(entry['shape'], dtype=getattr(torch, entry['dtype']), device='meta')
        for key, entry in key_list['keys'].items() if key.startswith(prefix)}


def backbone(key_list: dict) -> tuple[str, str, dict, int]:
    """Official class, prefix of its keys, configuration and number of parameters of a listed model."""
    config, size = key_list['official_config'], key_list['num_params']
    if 'net' in config:
        # The neck's width is in the keys alone: 192 in the light models.
        width = key_list['keys']['backbone.simfp_4.0.weight']['shape'][0]
        return ('SimpleFeaturePyramid(VisionMambaDet)', 'backbone.', {'net': config['net'], 'out_channels': width},
                key_list['num_params_backbone_with_sfp'])
    if 'backbone' in config:
        return 'VisionMambaSeg', 'backbone.', config['backbone'], key_list['num_params_backbone']
    return 'VisionMamba', '', config, size


def test_released_sizes_load_strictly(key_list):
    official_class, prefix, config, size = backbone(key_list)
    with torch.device('meta'):
        model = visionssm.from_official(
            FAMILY, meta_state_dict(key_list, prefix), config, official_class=official_class)
    assert sum(p.numel() for p in model.parameters()) == size


@pytest.mark.parametrize(('name', 'parameters'), [
    ('vim_tiny', 7_148_008), ('vim_small', 25_796_584), ('vim_base', 97_598_440), ('vim_tiny_stride8', 7_250_344),
    ('vim_small_stride8', 26_001_256), ('vim_tiny_rope', 7_148_008)])
def test_registered_models_have_the_published_size(name: str, parameters: int):
    model = visionssm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == parameters
