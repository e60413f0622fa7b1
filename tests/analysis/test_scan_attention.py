"""The implicit attention of a scan: exact against the operators and the published formula, for every family."""
import pytest
import torch
from torch import nn

import visionssm
from visionssm.analysis import block_attention, find_block, record_scans, scan_attention
from visionssm.analysis.attention import attention_row, scan_signals
from visionssm.analysis.scans import ScanCall
from visionssm.export.inputs import example_inputs

PICO = [name for name in visionssm.list_models() if name.endswith('_pico')]
VARIANTS = [('vmamba_pico', {'routes': 'cascade'}), ('vmamba_pico', {'routes': 'unidirectional'}),
            ('vmamba_pico', {'ssm': 'mamba2'}), ('vim_pico', {'mixer': 'mamba2', 'headdim': 16}),
            ('vim_pico', {'bimamba_type': 'v1'}), ('vim_pico', {'class_token': 'double'}),
            ('vssd_pico', {'scan': 'forward'}),
            ('vssd_pico', {'scan': 'both', 'num_groups': 2, 'num_heads': (2, 4, 8, 8)})]


def make(name: str, **options: object) -> tuple[nn.Module, torch.Tensor]:
    """A model in float64 and an image that is no square where the model allows it."""
    torch.manual_seed(0)
    model = visionssm.create_model(name, **options).double()
    size = None if name.startswith('dis') else (24, 40) if name.startswith('mambair') else (32, 64)
    return model, example_inputs(model, size).tensors[0].double()


def without_skip(call: ScanCall) -> torch.Tensor:
    """What the operator itself gives, (K or 1, C, L); lines of a map behind each other."""
    left_out = {name: None for name in ('D', 'initial_states') if name in call.args}
    y = getattr(torch.ops.visionssm, call.op)(**{**call.args, **left_out})
    if call.op in ('ssd', 'nc_ssd'):
        return y.flatten(2).transpose(1, 2)
    if call.op in ('selective_scan', 'wavefront_scan_2d'):
        return y.flatten(2)
    if call.args['merge'] == 'none':
        return y[0].flatten(-2)
    channels = y.flatten(1, -3).flatten(-2)  # (lines, C, positions)
    return channels.transpose(0, 1).flatten(1)[None]


@pytest.mark.parametrize(('name', 'options'), [*((name, {}) for name in PICO), *VARIANTS], ids=str)
def test_matrix_times_input_is_what_the_operator_gives(name: str, options: dict):
    model, image = make(name, **options)
    blocks = [block for block in record_scans(model, image) if block.spatial]
    assert blocks
    for block in (blocks[0], blocks[-1]):
        for call in block.calls:
            signals, run = scan_signals(call)
            expected, y = without_skip(call), run(signals)
            y = y if len(expected) == len(y) else y.sum(0, keepdim=True)
            if call.fuse is None:
                torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-13)
            else:
                torch.testing.assert_close(y, call.fuse(expected.unflatten(-1, call.size)).flatten(-2).detach(),
                                           rtol=1e-10, atol=1e-13)
            for position in {0, y.shape[-1] // 2, y.shape[-1] - 1}:
                pixel = int(call.pixels[position])
                if pixel < 0:
                    continue
                read = (attention_row(call, pixel) * signals).sum(-1)
                read = read if len(read) == len(expected) else read.sum(0, keepdim=True)
                torch.testing.assert_close(read, y[..., position], rtol=1e-10, atol=1e-12)


def rows_by_formula(call: ScanCall, order: torch.Tensor, k: int, query: int) -> torch.Tensor:
    """a[q, p] = C_q (prod_{p < k <= q} exp(delta_k A)) delta_p B_p along a route, (C, L) in memory order."""
    args = call.args
    delta, B, C = (args[name] for name in ('delta', 'B', 'C'))
    if call.op == 'selective_scan_2d':
        delta, B, C = (x[0, k].flatten(-2) for x in (delta, B, C))
        A = args['A'].view(args['delta'].shape[1], -1, args['A'].shape[1])[k]
        bias = args['delta_bias'].view(args['delta'].shape[1], -1)[k]
    else:
        delta, B, C, A, bias = delta[0], B[0], C[0], args['A'], args['delta_bias']
    delta = nn.functional.softplus(delta + bias[:, None])
    row = torch.zeros_like(delta)
    at = order.tolist().index(query)
    for l in range(at + 1):
        decay = (A * delta[:, order[l + 1:at + 1]].sum(-1, keepdim=True)).exp()  # (C, N)
        p = order[l]
        row[:, p] = (decay * C[:, query] * B[:, p]).sum(-1) * delta[:, p]
    return row


@pytest.mark.parametrize('name', ['vim_pico', 'vmamba_pico', 'mhs_vm_pico'])
def test_rows_follow_the_published_formula(name: str):
    model, image = make(name)
    block = record_scans(model, image)[1]
    for call in block.calls:
        length = len(call.pixels)
        if 'routes' in call.args:
            from visionssm_kernels import get_routes
            orders = list(get_routes(call.args['routes']).table(*call.args['u'].shape[-2:]).long())
        else:
            orders = [torch.arange(length).flip(0) if call.args['reverse'] else torch.arange(length)]
        query = length // 3
        rows = attention_row(call, int(call.pixels[query]))
        assert len(rows) == len(orders)
        for k, order in enumerate(orders):
            torch.testing.assert_close(rows[k], rows_by_formula(call, order, k, query), rtol=1e-10, atol=1e-14)


def test_without_an_order_the_weight_is_query_times_key():
    model, image = make('vssd_pico')
    call = record_scans(model, image)[0].calls[0]
    args = call.args
    weight = -args['dt'][0] * args['A']  # (L, M)
    expected = (args['C'][0, 5] * args['B'][0]).sum(-1) * weight  # one group: (L, 1) * (L, M)
    channels = args['x'].shape[3]
    torch.testing.assert_close(attention_row(call, 5)[0], expected.t().repeat_interleave(channels, 0))


def test_a_route_reads_only_what_it_has_passed():
    model, image = make('vmamba_pico')
    found = scan_attention(model, image, 0, (13, 22))
    assert found.query == (3, 5) and found.labels == ('raster', 'column', 'raster, reversed', 'column, reversed')
    assert found.routes.shape == (4, 8, 16) and found.merged.shape == (8, 16)
    before = torch.zeros(8, 16, dtype=torch.bool)
    before[:3], before[3, :6] = True, True
    assert torch.equal(found.routes[0] > 0, before)
    beside = torch.zeros(8, 16, dtype=torch.bool)
    beside[:, :5], beside[:4, 5] = True, True
    assert torch.equal(found.routes[1] > 0, beside)
    assert bool((found.merged <= found.routes.sum(0) * (1 + 1e-6)).all())


def test_class_tokens_are_left_out_of_the_map():
    model, image = make('vim_pico')
    block = record_scans(model, image)[0]
    call = block.calls[0]
    assert (call.pixels == -1).sum() == 1 and call.pixels[7 * 15 // 2] == -1
    found = block_attention(block, (32, 64), (31, 63))
    row = attention_row(call, 7 * 15 - 1)[0].abs().mean(0)
    assert found.query == (6, 14)
    torch.testing.assert_close(found.routes[0].flatten(), row[call.pixels >= 0].float())


def test_pixels_are_found_again_where_the_order_follows_the_content():
    model, image = make('mambairv2_pico')
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if '.route.' in name:
            nn.init.normal_(parameter, std=3)
    call = record_scans(model, image)[0].calls[0]
    assert not torch.equal(call.pixels, torch.arange(len(call.pixels)))
    assert torch.equal(call.pixels.sort().values, torch.arange(len(call.pixels)))
    query = int(call.pixels[40])
    found = block_attention(record_scans(model, image)[0], tuple(call.size), divmod(query, call.size[1]))
    assert set(found.merged.flatten().nonzero().flatten().tolist()) == set(call.pixels[:41].tolist())


def test_the_model_stays_as_it_was():
    model, image = make('vmamba_pico')
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        first = scan_attention(model, image[0], -1)
    torch.testing.assert_close(first.merged, scan_attention(model, image, -1).merged)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_is_widened():
    model, image = make('vssd_pico')
    wide = scan_attention(model, image).merged
    half = scan_attention(model.bfloat16(), image).merged
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wide, rtol=0.1, atol=0.05 * float(wide.max()))


def test_hooks_are_taken_off_after_an_error():
    model, image = make('dis_pico')
    with pytest.raises(ValueError, match='Expected images'):
        scan_attention(model, image[..., :-1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_no_block_pixel_or_image_is_named():
    model, image = make('vim2_pico')
    blocks = record_scans(model, image)
    for block, message in ((12, r'no block 12 that scans. There are 12: 0 stages.0.blocks.0'), (-13, 'no block -13'),
                           ('stages.9', "no block 'stages.9'"), (2, 'stages.0.blocks.2 scans the channels')):
        with pytest.raises(ValueError, match=message):
            find_block(blocks, block)
    assert find_block(blocks, 'stages.0.blocks.1') is blocks[1]
    with pytest.raises(ValueError, match=r'query is \(32, 0\); the image has 32 rows and 64 columns'):
        block_attention(blocks[0], (32, 64), (32, 0))
    with pytest.raises(ValueError, match='needed is one image'):
        scan_attention(model, image.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match='The model has no scans'):
        scan_attention(nn.Conv2d(3, 3, 1), torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match='recorded without an image'):
        attention_row(record_scans(visionssm.create_model('mambairv2_pico'))[0].calls[0], 0)
