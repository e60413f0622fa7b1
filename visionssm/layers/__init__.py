"""Layers that two or more model families share."""

from .bimamba import BiMamba, SelectiveSSM
from .patch_embed import PatchEmbed
from .pos_embed import (
    class_token_index,
    drop_class_tokens,
    insert_class_tokens,
    resize_pos_embed,
    resize_pos_embed_leading,
)
from .pyramid import PlainPyramid, SimpleFeaturePyramid
from .rope import apply_rotary, rotary_table
from .ss2d import RoutedSSM
from .ssm_init import init_A_log_, init_dt_bias_, init_dt_proj_, negative_exp

__all__ = [
    'BiMamba',
    'PatchEmbed',
    'PlainPyramid',
    'RoutedSSM',
    'SelectiveSSM',
    'SimpleFeaturePyramid',
    'apply_rotary',
    'class_token_index',
    'drop_class_tokens',
    'init_A_log_',
    'init_dt_bias_',
    'init_dt_proj_',
    'insert_class_tokens',
    'negative_exp',
    'resize_pos_embed',
    'resize_pos_embed_leading',
    'rotary_table',
]
