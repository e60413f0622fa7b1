"""Every family against fixtures of its official code: outputs, maps, gradients, keys, sizes of released models."""
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import visionssm
from visionssm.models._detect import Unfilled
from visionssm.models._official import families, find_official, translate_key

ROOT = Path(__file__).resolve().parent.parent.parent
FAMILIES = families()
# official code that computes something in float32 also in a float64 model, and what its last digit moves here: the
# angle of a time step is up to 999 radians, and math libraries differ in it (seen: 3.6e-6)
FLOAT32_INSIDE = {'dis': 2e-5}


def build(golden, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = visionssm.from_official(
        golden.family, golden.state_dict, golden.meta['config'], official_class=golden.meta['official_class'])
    return model.eval().to(dtype)


def run(golden, model: torch.nn.Module) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Outputs (the maps of a dense model, the one output of another) and the input with its gradient to come."""
    dtype = next(model.parameters()).dtype
    x = golden.tensors['input'].to(dtype).requires_grad_()
    out = model(x, *[golden.tensors[name] for name in golden.meta.get('extra_inputs', [])])
    return (list(out) if golden.dense else [out]), x


def flat(maps: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([m.flatten(1) for m in maps], dim=1)


def expected_outputs(golden, name: str) -> list[torch.Tensor]:
    """Outputs of the official code: 'feature' and 'output', or 'feature64' and 'output64'."""
    maps = golden.part('feature64.' if name == 'output64' else 'feature.')
    return [maps[str(i)] for i in range(len(maps))] if golden.dense and maps else [golden.tensors[name]]


def loss(golden, outputs: list[torch.Tensor]) -> torch.Tensor:
    """The weighted sum whose gradients a fixture holds; the shape of the weights tells over what."""
    weights = golden.part('loss_weight.')
    if weights:
        return sum((out * weights[str(i)]).sum() for i, out in enumerate(outputs))
    weight = golden.tensors['loss_weight']
    return ((outputs[-1] if weight.shape == outputs[-1].shape else flat(outputs)) * weight).sum()


def worst(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float) -> float:
    """Largest difference in units of what is allowed."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs() / (atol + rtol * expected.abs())).max().item()


def test_outputs_match_in_float32(golden):
    with torch.no_grad():
        outputs, _ = run(golden, build(golden))
    expected = expected_outputs(golden, 'output')
    assert len(outputs) == len(expected)
    for actual, wanted in zip(outputs, expected):
        assert worst(actual, wanted, float(golden.meta['atol']), float(golden.meta['rtol'])) <= 1


def test_outputs_match_in_float64(golden):
    with torch.no_grad():
        outputs, _ = run(golden, build(golden, torch.float64))
    expected = expected_outputs(golden, 'output64')
    if golden.dense and len(expected) < len(outputs):
        outputs = [flat(outputs) if expected[0].ndim == 2 else outputs[-1]]
    for actual, wanted in zip(outputs, expected):
        bound = FLOAT32_INSIDE.get(golden.family, 1e-10)
        assert worst(actual, wanted, bound, bound) <= 1


def test_gradients_match(golden):
    model = build(golden)
    outputs, x = run(golden, model)
    loss(golden, outputs).backward()
    table = find_official(golden.family).keys(golden.meta['official_class'])
    ours = {'input': x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    expected = golden.part('grad.')
    assert len(expected) > 5
    gaps = {}
    for key, grad in expected.items():
        gap = (ours[translate_key(key, table)].view_as(grad) - grad).abs().max()
        gaps[key] = (gap / grad.abs().max().clamp_min(1e-12)).item()
    assert max(gaps.values()) <= float(golden.meta['grad_rtol']), gaps


def test_official_keys_come_back(golden):
    model = build(golden)
    back = visionssm.to_official(golden.family, model, official_class=golden.meta['official_class'])
    assert back.keys() == golden.state_dict.keys()
    for key, value in golden.state_dict.items():
        torch.testing.assert_close(back[key], value, rtol=0, atol=1e-6 if 'rope' in key else 0)


def test_state_dict_alone_tells_the_model(golden):
    """Without a configuration the released models' one is inferred: it builds, loads strictly and runs."""
    if golden.family == 'vim' and isinstance(golden.meta['config'].get('img_size'), list):
        with pytest.raises(ValueError, match='form no square'):
            visionssm.from_official(golden.family, golden.state_dict)
        return
    model = visionssm.from_official(golden.family, golden.state_dict).eval()
    with torch.no_grad():
        out = model(golden.tensors['input'], *[golden.tensors[name] for name in golden.meta.get('extra_inputs', [])])
    if golden.dense:  # which stages are tapped can be told from the keys only where each tap has a norm
        assert all(m.ndim == 4 for m in out)
    else:
        assert out.shape == golden.tensors['output'].shape


def meta_state_dict(keys: dict, prefix: str = '') -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(prefix): torch.empty(entry['shape'], dtype=getattr(torch, entry['dtype']), device='meta')
        for key, entry in keys.items() if key.startswith(prefix)}


def listed_vim(key_list: dict) -> tuple[str, str, dict, int]:
    """Of Vim also whole detectors are listed: what belongs to the backbone and its pyramid."""
    config, size = key_list['official_config'], key_list['num_params']
    if 'net' in config:
        # The neck's width is in the keys alone: 192 in the light models.
        width = key_list['keys']['backbone.simfp_4.0.weight']['shape'][0]
        return ('SimpleFeaturePyramid(VisionMambaDet)', 'backbone.', {'net': config['net'], 'out_channels': width},
                key_list['num_params_backbone_with_sfp'])
    if 'backbone' in config:
        return 'VisionMambaSeg', 'backbone.', config['backbone'], key_list['num_params_backbone']
    return 'VisionMamba', '', config, size


def listed(family: str, key_list: dict) -> tuple[str, str, dict, int]:
    """Official class, prefix of its keys, configuration and number of parameters of a listed model."""
    if family == 'vim':
        return listed_vim(key_list)
    if family == 'dis':
        config = dict(key_list['official_config'])
        size = config.pop('official_name').split('/')[0]
        config['depth'] = config.pop('depth_arg', 24 if size in ('DiS-S', 'DiS-B') else 48)
        return 'DisModel', '', config, key_list['num_params']
    classes = find_official(family).classes
    named = key_list.get('official_class', classes[0]).split(':')[-1].split(' ')[0]
    return named, '', key_list['official_config'], key_list['num_params']


def test_released_sizes_load_strictly(key_list):
    family, content = key_list
    official_class, prefix, config, size = listed(family, content)
    with Unfilled(), torch.device('meta'):
        model = visionssm.from_official(
            family, meta_state_dict(content['keys'], prefix), config, official_class=official_class)
    assert sum(p.numel() for p in model.parameters()) == size
    back = visionssm.to_official(family, model, official_class=official_class)
    stored = {key.removeprefix(prefix) for key in content['keys'] if key.startswith(prefix)}
    assert back.keys() == stored


def test_released_sizes_are_inferred_from_their_keys(key_list):
    family, content = key_list
    official_class, prefix, _, size = listed(family, content)
    with Unfilled(), torch.device('meta'):
        model = visionssm.from_official(family, meta_state_dict(content['keys'], prefix))
    assert sum(p.numel() for p in model.parameters()) == size


def test_a_clone_can_check_every_family_by_itself():
    own = set()
    for path in (ROOT / 'tests' / 'golden').rglob('*.safetensors'):
        with safe_open(path, 'pt') as file:
            own.add((file.metadata() or {}).get('family', path.parent.name))
    assert own >= set(FAMILIES)
