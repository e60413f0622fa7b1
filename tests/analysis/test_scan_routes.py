"""Scan routes: those that the models use, as orders of pixels."""
import pytest
import torch
from torch import nn

import visionssm
from visionssm.analysis import scan_routes
from visionssm_kernels import get_routes

PICO = [name for name in visionssm.list_models() if name.endswith('_pico')]
CROSS = ['raster', 'column', 'raster, reversed', 'column, reversed']
BOTH = ['raster', 'raster, reversed']
LABELS = {
    'dis_pico': BOTH, 'vim_pico': BOTH, 'spatial_mamba_pico': ['raster'], 'mambairv2_pico': ['by content'],
    'mamba2d_pico': ['diagonals from the top left'], 'vssd_pico': ['all at once'],
    **dict.fromkeys(('vmamba_pico', 'vim2_pico', 'vm_unet_pico', 'mambair_pico', 'mamba_yolo_pico'), CROSS)}


@pytest.mark.parametrize('name', PICO)
def test_every_family_shows_its_routes(name: str):
    model = visionssm.create_model(name)
    size = 28 if name == 'dis_pico' else (32, 64)
    image = torch.randn(3, 32, 64) if name == 'mambairv2_pico' else None
    for block in scan_routes(model, size, image):
        height, width = block.size
        assert size == 28 or width == 2 * height or name == 'vim_pico' and (height, width) == (7, 15)
        for route in block.routes:
            assert route.steps.shape == block.size
            if route.kind == 'path':
                [path] = route.paths()
                assert torch.equal(path.sort().values, torch.arange(height * width))
    first = scan_routes(model, size, image)[0]
    assert first.block and first.op in dir(torch.ops.visionssm)
    if name in LABELS:
        assert [route.label for route in first.routes] == LABELS[name]


def test_the_order_is_that_of_the_kernel():
    block = scan_routes(visionssm.create_model('mhs_vm_pico'), (20, 36))[0]
    assert block.size == (5, 9) and len(block.routes) == 16
    table = get_routes('mhs_4').table(5, 9).long()
    for route, order in zip(block.routes, table, strict=True):
        assert torch.equal(route.paths()[0], order)
    assert block.routes[0].label == 'snake' and block.routes[9].label == 'spiral, reversed'


def test_a_token_that_is_no_pixel_takes_a_step():
    block = scan_routes(visionssm.create_model('vim_pico'), 32)[0]
    forward, backward = (route.steps.flatten() for route in block.routes)
    assert 'position 24 of the 50 positions' in block.note
    assert forward.tolist() == [*range(24), *range(25, 50)]
    assert torch.equal(forward + backward, torch.full((49,), 49))
    tokens = scan_routes(visionssm.create_model('dis_pico'))[0]
    assert int(tokens.routes[0].steps.min()) == 2 and 'the positions 0, 1' in tokens.note


def test_lines_are_sequences_of_their_own():
    block = scan_routes(visionssm.create_model('vmamba_pico', routes='cascade'), (12, 20))[0]
    rows, _, columns, columns_back = block.routes
    assert {route.kind for route in block.routes} == {'lines'} and block.size == (3, 5)
    assert [path.tolist() for path in rows.paths()] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert columns.paths()[1].tolist() == [1, 6, 11] and columns_back.paths()[1].tolist() == [11, 6, 1]


def test_what_is_no_sequence_says_so():
    wave, back = scan_routes(visionssm.create_model('mamba2d_pico'), (16, 24))[:2]
    assert wave.routes[0].kind == 'wavefront' and wave.routes[0].paths() == []
    assert wave.routes[0].steps.tolist() == [[i + j for j in range(6)] for i in range(4)]
    assert back.routes[0].label == 'diagonals from the bottom right' and int(back.routes[0].steps[3, 5]) == 0
    every = scan_routes(visionssm.create_model('vssd_pico'), 32)[0]
    assert every.routes[0].kind == 'unordered' and not every.routes[0].steps.any() and 'No order' in every.note
    channels = scan_routes(visionssm.create_model('vim2_pico'), 32)[2]
    assert channels.routes == () and 'Scans the channels' in channels.note


def test_large_models_cost_neither_memory_nor_time():
    model = visionssm.create_model('vmamba_base', device='meta')
    blocks = scan_routes(model)
    assert len(blocks) == sum(len(stage.blocks) for stage in model.stages) and blocks[0].size == (56, 56)


def test_what_has_no_order_to_show_is_refused():
    with pytest.raises(ValueError, match='in the order of what they show: give an image'):
        scan_routes(visionssm.create_model('mambairv2_pico'), 32)
    with pytest.raises(ValueError, match='Conv2d has no scans'):
        scan_routes(nn.Conv2d(3, 3, 1), 8)
    with pytest.raises(ValueError, match='size is'):
        scan_routes(visionssm.create_model('vmamba_pico'), (32, 32, 32))
