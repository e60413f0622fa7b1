"""Layers that two or more model families share."""

from .bimamba import BiMamba, SelectiveSSM
from .bimamba2 import BiMamba2
from .conv_block import ConvPosBlock
from .conv_stem import ConvDownsample, ConvStem, default_norm
from .downsample import ConvPosEnc, InvertedDownsample
from .mlp import Mlp
from .multi_head_scan import GatedMultiHeadScan, MultiHeadScan, scan_route_attention
from .patch_embed import PatchEmbed
from .patch_merging import PatchMerging, merge_patches
from .pos_embed import (
    class_token_index,
    drop_class_tokens,
    insert_class_tokens,
    resize_pos_embed,
    resize_pos_embed_leading,
)
from .pyramid import PlainPyramid, SimpleFeaturePyramid
from .rope import apply_rotary, rotary_table
from .routed_ssm import RoutedSSM
from .ss2d import SS2D
from .ss2d_official import ss2d_options
from .ssm_init import init_A_log_, init_A_log_uniform_, init_dt_bias_, init_dt_proj_, init_state_, negative_exp
from .state_fusion import StateFusion
from .stem import ResidualStem

__all__ = [
    'SS2D',
    'BiMamba',
    'BiMamba2',
    'ConvDownsample',
    'ConvPosBlock',
    'ConvPosEnc',
    'ConvStem',
    'GatedMultiHeadScan',
    'InvertedDownsample',
    'Mlp',
    'MultiHeadScan',
    'PatchEmbed',
    'PatchMerging',
    'PlainPyramid',
    'ResidualStem',
    'RoutedSSM',
    'SelectiveSSM',
    'SimpleFeaturePyramid',
    'StateFusion',
    'apply_rotary',
    'class_token_index',
    'default_norm',
    'drop_class_tokens',
    'init_A_log_',
    'init_A_log_uniform_',
    'init_dt_bias_',
    'init_dt_proj_',
    'init_state_',
    'insert_class_tokens',
    'merge_patches',
    'negative_exp',
    'resize_pos_embed',
    'resize_pos_embed_leading',
    'rotary_table',
    'scan_route_attention',
    'ss2d_options',
]
