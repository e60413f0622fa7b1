"""MHS-VM's U-Net for the segmentation of medical images

An encoder of multi-head scan blocks with strides 4 to 32, and a decoder of the same blocks that adds the encoder's maps
and doubles the resolution, up to the size of the image.

Paper: `MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba`
    - https://arxiv.org/abs/2406.05992
Code: https://github.com/PixDeep/MHS-VM (Apache-2.0), after VM-UNet, https://github.com/JCruan519/VM-UNet (Apache-2.0)

Written anew from the published equations and checkpoints; the weights of the official repository load. What differs:
tables of routes follow the size of the image; images whose sides the strides do not divide are padded by repeating
their last row and column, and the result is cropped; the threshold of the fusion, which the official files do not hold,
is that of the official evaluation (0.4), also for weights that were trained with another one.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import nn

from visionssm.layers import GatedMultiHeadScan, MultiHeadScan
from visionssm.models._builder import build_task_model, filter_official, load_official_keys
from visionssm.models._official import Official, take_known
from visionssm.models._tasks import register_task_model

from ._unet import UNet, medical_cfg

__all__ = ['MHSUNet']

_logger = logging.getLogger('visionssm')


class MHSUNet(UNet):
    """MHS-VM's U-Net: images to one map of logits a class, or to one map of probabilities."""

    official_class = 'VMUNet'

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1,
            depths: Sequence[int] = (2, 2, 2, 2),
            depths_decoder: Sequence[int] = (2, 2, 2, 1),
            dims: Sequence[int] = (96, 192, 384, 768),
            d_state: int = 16,
            num_heads: int = 4,
            project_out: bool = True,
            threshold: float = 0.4,
            probabilities: bool = True,
            drop_rate: float = 0.,
            mixer_drop_rate: float = 0.,
            drop_path_rate: float = 0.2,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model.

        Args:
            in_chans: Channels of the images; a model of 3 takes gray images too.
            num_classes: Classes.
            depths: Blocks of each stage of the encoder.
            depths_decoder: Blocks of each stage of the decoder, the deepest one first.
            dims: Channels of each stage of the encoder; the decoder has them in reverse.
            d_state: State size N.
            num_heads: Heads of the scan: 3, or 4 for plain lines too.
            project_out: Normalise and project the joined heads; without, `num_heads` must divide `dims`.
            threshold: Routes of a pixel whose coefficient of variation is below are left out.
            probabilities: Return probabilities where there is one class only; else, and for more classes, logits.
            drop_rate: Dropout behind the stem.
            mixer_drop_rate: Dropout behind the gate of each mixer.
            drop_path_rate: Stochastic depth: it rises from 0 through the encoder and falls through the decoder.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        mixer = partial(
            GatedMultiHeadScan, d_state=d_state, num_heads=num_heads, project_out=project_out, threshold=threshold,
            drop=mixer_drop_rate)
        super().__init__(
            mixer, in_chans, num_classes, depths, depths_decoder, dims, probabilities, drop_rate, drop_path_rate,
            device, dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_official_keys(state_dict, prefix, self, OFFICIAL)
        super()._load_from_state_dict(state_dict, prefix, *args)


_GATE = 'self_attention.'
# official prefix of a mixer and ours, in each official class
_MIXERS = {
    'VMUNet': [(f'vmunet.{theirs}.{{}}.blocks.{{}}.{_GATE}', f'{ours}.{{}}.blocks.{{}}.mixer.')
               for theirs, ours in (('layers', 'stages'), ('layers_up', 'up_stages'))],
    'VSSM': [(f'{theirs}.{{}}.blocks.{{}}.{_GATE}', f'{ours}.{{}}.blocks.{{}}.mixer.')
             for theirs, ours in (('layers', 'stages'), ('layers_up', 'up_stages'))],
    'VSSGate': [('', '')],
    'VSSUnGated': [('', '')],
}
_ENGINE = (('x_proj_weight', 'x_proj'), ('dt_projs_weight', 'dt_proj'), ('dt_projs_bias', 'dt_bias'),
           ('A_logs', 'A_log'), ('Ds', 'D'))
_MOST_STAGES = 8


def _scan_rows(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Return the rows of a multi-head scan; the second names of what is stored twice come last."""
    names = (('scanning.seq2seq_engine', 'x_ssproj.weight'), ('mambaeng', 'x_ssproj_W'))
    rows = [(f'{theirs}cat_norm.{{}}', f'{ours}cat_norm.{{}}'), (f'{theirs}y_proj.weight', f'{ours}out_proj.weight')]
    for engine, projection in names:
        rows.append((f'{theirs}{projection}', f'{ours}proj.weight'))
        rows += [(f'{theirs}scanhead_{{}}.{engine}.{name}', f'{ours}heads.{{}}.{own}') for name, own in _ENGINE]
    return rows


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    """Return the rows (official key, our key) of an official class."""
    if official_class == 'MHSM':
        return tuple(_scan_rows('', ''))
    rows = []
    for theirs, ours in _MIXERS[official_class]:
        rows += _scan_rows(f'{theirs}mhs.', f'{ours}scan.')
        rows += [(f'{theirs}{name}.{{}}', f'{ours}{own}.{{}}')
                 for name, own in (('in_proj', 'in_proj'), ('conv2d', 'conv'), ('out_norm', 'out_norm'))]
    if official_class not in ('VMUNet', 'VSSM'):
        return tuple(rows)
    prefix = 'vmunet.' if official_class == 'VMUNet' else ''
    return (
        *rows,
        (f'{prefix}patch_embed.proj.{{}}', 'stem.conv1.{}'),
        (f'{prefix}patch_embed.norm.{{}}', 'stem.norm1.{}'),
        (f'{prefix}layers.{{}}.blocks.{{}}.ln_1.{{}}', 'stages.{}.blocks.{}.norm.{}'),
        (f'{prefix}layers_up.{{}}.blocks.{{}}.ln_1.{{}}', 'up_stages.{}.blocks.{}.norm.{}'),
        *((f'{prefix}layers.{i}.downsample.{{}}.{{}}', f'stages.{i + 1}.downsample.{{}}.{{}}')
          for i in range(_MOST_STAGES)),
        (f'{prefix}layers_up.{{}}.upsample.{{}}.{{}}', 'up_stages.{}.upsample.{}.{}'),
        (f'{prefix}final_up.{{}}.{{}}', 'final_up.{}.{}'),
        (f'{prefix}final_conv.{{}}', 'final_conv.{}'),
    )


def _alias_table() -> tuple[tuple[str, str], ...]:
    """Return the rows (key of an entry that repeats another, key of that other) of all official classes."""
    mixers = [f'{theirs}mhs.' for official_class in ('VMUNet', 'VSSM') for theirs, _ in _MIXERS[official_class]]
    return tuple(
        row for scan in [*mixers, 'mhs.', ''] for row in (
            (f'{scan}x_ssproj_W', f'{scan}x_ssproj.weight'),
            (f'{scan}scanhead_{{}}.mambaeng.{{}}', f'{scan}scanhead_{{}}.scanning.seq2seq_engine.{{}}')))


def _tidy(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the buffers of a profiler (thop), which the official training leaves in its files."""
    return {
        key: value for key, value in state_dict.items()
        if key.rpartition('.')[2] not in ('total_ops', 'total_params')}


# What the official constructors take where the caller says nothing.
_DEFAULTS = {
    'input_channels': 3, 'num_classes': 1, 'depths': (2, 2, 9, 2), 'depths_decoder': (2, 9, 2, 2),
    'dims': (96, 192, 384, 768), 'd_state': 16, 'drop_rate': 0., 'attn_drop_rate': 0., 'drop_path_rate': 0.2}
_SCAN_DEFAULTS = {'head_num': 3, 'with_proj': True, 'gfu_t': 0.4}
_NO_EFFECT = frozenset((
    'dims_decoder', 'feed_channels', 'hw', 'img_size', 'in_chans', 'load_ckpt_path', 'norm_layer', 'para_dict',
    'patch_norm', 'patch_size', 'route_dict', 'use_checkpoint'))


def _scan_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the official options of the scan; they stand in a dictionary of their own."""
    given = dict(config.get('para_dict') or {})
    unknown = sorted(set(given) - set(_SCAN_DEFAULTS))
    if unknown:
        _logger.warning('Ignored entries of para_dict that are not known: %s.', ', '.join(map(str, unknown)))
    o = {**_SCAN_DEFAULTS, **given}
    return {
        'd_state': config.get('d_state', 16), 'num_heads': o['head_num'], 'project_out': bool(o['with_proj']),
        'threshold': float(o['gfu_t'])}


def _build_official(official_class: str, config: Mapping[str, Any]) -> nn.Module:
    """Build our model from the keyword arguments of an official constructor."""
    scan = _scan_options(config)
    if official_class == 'MHSM':
        return MultiHeadScan(config['d_model'], **scan)
    if official_class in ('VSSGate', 'VSSUnGated'):
        return GatedMultiHeadScan(config['d_model'], gated=official_class == 'VSSGate', **scan)
    o = take_known('MHS-VM', config, _DEFAULTS, _NO_EFFECT)
    dims = [o['dims'] << i for i in range(len(o['depths']))] if isinstance(o['dims'], int) else list(o['dims'])
    decoder = list(config.get('dims_decoder') or dims[::-1])
    if decoder != dims[::-1] or any(2 * fine != coarse for fine, coarse in pairwise(dims)):
        raise ValueError(f'dims are {dims} and dims_decoder {decoder}; the official network runs with channels that '
                         f'double from stage to stage, and with the same ones in reverse in its decoder.')
    if config.get('patch_size', 4) != 4:
        raise ValueError(f"patch_size is {config['patch_size']}; the official tables of routes are made for 4.")
    model = MHSUNet(
        config.get('in_chans', o['input_channels']), o['num_classes'], o['depths'], o['depths_decoder'], dims,
        probabilities=official_class == 'VMUNet', drop_rate=o['drop_rate'],
        mixer_drop_rate=o['attn_drop_rate'], drop_path_rate=o['drop_path_rate'], **scan)
    model.official_class = official_class
    return model


def _count(state_dict: Mapping[str, torch.Tensor], prefix: str) -> int:
    """Return how many numbers follow `prefix` in the keys."""
    return len({key[len(prefix):].partition('.')[0] for key in state_dict if key.startswith(prefix)})


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer official class and arguments from keys and shapes; the threshold is that of the official evaluation."""
    sd = OFFICIAL.settle(state_dict)
    scan = next((key for key in sd if key.endswith('x_ssproj.weight')), None)
    if scan is None:
        raise ValueError(
            'These are not the keys of an official MHS-VM state dict (no x_ssproj.weight in any of them); the first '
            f'ones are {sorted(sd)[:5]}.')
    scan = scan.removesuffix('x_ssproj.weight')
    width, rank = sd[f'{scan}scanhead_C.scanning.seq2seq_engine.x_proj_weight'].shape[1], sd[
        f'{scan}scanhead_C.scanning.seq2seq_engine.dt_projs_weight'].shape[2]
    heads = _count({key.removeprefix(scan): key for key in sd if key.startswith(scan)}, 'scanhead_')
    options = {
        'd_state': (width - rank) // 2,
        'para_dict': {'head_num': heads, 'with_proj': f'{scan}y_proj.weight' in sd, 'gfu_t': _SCAN_DEFAULTS['gfu_t']}}
    if scan in ('', 'mhs.'):
        official_class = 'MHSM' if not scan else 'VSSGate' if 'in_proj.weight' in sd else 'VSSUnGated'
        return official_class, {'d_model': sd[f'{scan}x_ssproj.weight'].shape[1], **options}
    prefix = 'vmunet.' if scan.startswith('vmunet.') else ''
    levels = range(_count(sd, f'{prefix}layers.'))
    dim, in_chans = sd[f'{prefix}patch_embed.proj.weight'].shape[:2]
    dims = [dim << i for i in levels]
    return 'VMUNet' if prefix else 'VSSM', {
        'input_channels': in_chans, 'num_classes': len(sd[f'{prefix}final_conv.weight']),
        'depths': [_count(sd, f'{prefix}layers.{i}.blocks.') for i in levels],
        'depths_decoder': [_count(sd, f'{prefix}layers_up.{i}.blocks.') for i in levels],
        'dims': dims, 'dims_decoder': dims[::-1], **options}


OFFICIAL = Official(
    family='mhs_vm',
    classes=('VMUNet', 'VSSM', 'VSSGate', 'VSSUnGated', 'MHSM'),
    keys=_key_table,
    build=_build_official,
    infer=_infer_official,
    tidy=_tidy,
    aliases=_alias_table(),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: An `MHSUNet`.

    Returns:
        Our keys.
    """
    return filter_official(state_dict, model, OFFICIAL)


def _cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    if file:
        kwargs['url'] = f'https://github.com/PixDeep/MHS-VM/raw/main/pretrained/{file}'
    return medical_cfg(
        origin_url='https://github.com/PixDeep/MHS-VM',
        paper_name='MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba',
        paper_ids='arXiv:2406.05992',
        **kwargs)


default_cfgs = generate_default_cfgs({
    'mhs_vm_unet_4h.isic18': _cfg('best_4h.pth'),
    'mhs_vm_unet_3h.isic18': _cfg('best_3h.pth', description='The official repository does not say what it reaches.'),
    'mhs_vm_unet_pico': _cfg(input_size=(3, 32, 32), description='A small model without weights, for tests.'),
})


def _create_mhs_unet(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> MHSUNet:
    return build_task_model(
        MHSUNet, variant, default_cfgs, checkpoint_filter_fn, pretrained, **dict(model_args, **kwargs))


@register_task_model('segmentation')
def mhs_vm_unet_4h(pretrained: bool = False, **kwargs: Any) -> MHSUNet:
    """MHS-VM's U-Net with four heads: 17.3M parameters; ISIC2018 validation IoU 0.809, DSC 0.894 as stated."""
    return _create_mhs_unet('mhs_vm_unet_4h', pretrained, kwargs)


@register_task_model('segmentation')
def mhs_vm_unet_3h(pretrained: bool = False, **kwargs: Any) -> MHSUNet:
    """MHS-VM's U-Net with three heads: 17.4M parameters."""
    return _create_mhs_unet('mhs_vm_unet_3h', pretrained, kwargs, num_heads=3)


@register_task_model('segmentation')
def mhs_vm_unet_pico(pretrained: bool = False, **kwargs: Any) -> MHSUNet:
    """A weightless U-Net for tests: 32 x 32 images, quick on a CPU."""
    return _create_mhs_unet(
        'mhs_vm_unet_pico', pretrained, kwargs, depths=(1, 1, 1), depths_decoder=(1, 1, 1), dims=(16, 32, 64),
        d_state=4)
