"""Small models for the tests of this folder."""
from collections.abc import Callable

import pytest
import torch

from visionssm.models import Vim

TINY = {
    'img_size': 32, 'patch_size': 8, 'embed_dim': 16, 'depth': 3, 'd_state': 4, 'num_classes': 5,
}
# Constructor options that change the computation, by a readable name.
VARIANTS = {
    'released': {},
    'overlapping': {'stride': 4},
    'head-token': {'class_token': 'head', 'divide_output': False},
    'double-token': {'class_token': 'double'},
    'no-token': {'class_token': 'none'},
    'no-token-max': {'class_token': 'none', 'global_pool': 'max'},
    'no-token-last': {'class_token': 'none', 'global_pool': 'last'},
    'no-token-logit-max': {'class_token': 'none', 'global_pool': 'logit_max'},
    'rope-both': {'class_token': 'head', 'rope': 'both'},
    'rope-hidden': {'class_token': 'none', 'rope': 'hidden', 'pos_embed': False},
    'rope-middle': {'rope': 'both'},
    'rope-official': {'rope': 'both', 'rope_official': True},
    'shared-directions': {'bimamba_type': 'v1'},
    'one-direction': {'bimamba_type': 'none'},
    'layernorm-scaled': {'norm_layer': 'layernorm', 'init_values': 0.5},
}


@pytest.fixture
def make() -> Callable[..., Vim]:
    """Build a tiny Vim in evaluation mode."""
    def build(**options) -> Vim:
        return Vim(**{**TINY, **options}).eval()
    return build


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)
