"""What Vim alone has to equal: the official resizing of its position embedding, the sizes of its registered models."""
import pytest
import torch

import visionssm
from visionssm.layers import resize_pos_embed_leading

FAMILY = 'vim'


def test_official_resize_matches(table):
    for i, config in enumerate(table.meta['config']):
        out = resize_pos_embed_leading(
            table.tensors[f'case{i}.in'], config['new_grid'], config['num_extra_tokens'])
        torch.testing.assert_close(out, table.tensors[f'case{i}.out'], rtol=0, atol=float(table.meta['atol']))


@pytest.mark.parametrize(('name', 'parameters'), [
    ('vim_tiny', 7_148_008), ('vim_small', 25_796_584), ('vim_base', 97_598_440), ('vim_tiny_stride8', 7_250_344),
    ('vim_small_stride8', 26_001_256), ('vim_tiny_rope', 7_148_008)])
def test_registered_models_have_the_published_size(name: str, parameters: int):
    model = visionssm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == parameters
