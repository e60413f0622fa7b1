"""Mamba-YOLO: a one-stage detector whose backbone and neck mix by scans

The pyramid, the head and the losses of YOLOv8; in the place of its convolutions blocks of a local convolution, a
four-way selective scan and a gated convolutional MLP.

Paper: `Mamba YOLO: A Simple Baseline for Object Detection with State Space Model`
    - https://arxiv.org/abs/2406.05835
Code: https://github.com/HZAI-ZJNU/Mamba-YOLO (AGPL-3.0)

Written anew from published equations, key names and numbers, without the official code, and under the licence of this
package. What differs: the official evaluation output comes without the raw maps, which `forward_raw` returns; images
whose sides 32 does not divide are refused.

Options of the official mixer that no official model uses and that are not ported: no gate, and a scan at a lower rank.

The official repository published no weights. Files that users train with the official code are whole pickled objects:
`visionssm.checkpoints.read_ultralytics` reads them without running what is in them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, List

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from timm.models import generate_default_cfgs
from torch import nn
from torchvision.ops import box_convert

from visionssm.layers.patch_embed import check_image
from visionssm.models._builder import build_task_model, filter_official, load_official_keys
from visionssm.models._hierarchy import Stage, reset_tree
from visionssm.models._official import Official
from visionssm.models._tasks import register_task_model

from .blocks import MambaYOLOBlock, MergeConv, PyramidPool, YOLOStem, fold_norms, make_conv
from .boxes import NUM_BINS, decode_boxes

__all__ = ['MambaYOLO', 'MambaYOLOBackbone', 'PathAggregation', 'YOLOHead']

STRIDES = (8, 16, 32)


@register_notrace_function
def check_sides(x: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Return images that the strides divide, or raise a ValueError."""
    x = check_image(x, in_chans, 1, 1)
    if x.shape[2] % STRIDES[-1] or x.shape[3] % STRIDES[-1]:
        raise ValueError(
            f'An image of {x.shape[2]} x {x.shape[3]} pixels: the sides must be multiples of {STRIDES[-1]}. Resize and '
            f'pad the images first; visionssm.detection.letterbox_geometry says how.')
    return x


class MambaYOLOBackbone(nn.Module):
    """Images to maps of strides 8, 16 and 32."""

    def __init__(
            self,
            depths: Sequence[int] = (1, 1, 3, 1),
            dims: Sequence[int] = (32, 64, 128, 256),
            in_chans: int = 3,
            d_state: int = 16,
            expand: float = 2.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the backbone; arguments as for `MambaYOLO`."""
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_chans = in_chans
        self.stem = YOLOStem(in_chans, dims[0], **dd)
        self.stages = nn.ModuleList([
            Stage(
                MergeConv(dims[i - 1], dim, **dd) if i else nn.Identity(),
                [MambaYOLOBlock(dim, dim, 1, d_state, expand, **dd) for _ in range(depth)])
            for i, (depth, dim) in enumerate(zip(depths, dims, strict=True))])
        self.pool = PyramidPool(dims[-1], dims[-1], **dd)

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the maps of strides 8, 16 and 32, (B, C, H', W') each, of images (B, in_chans, H, W)."""
        # Channels-last memory from here on: norms and scans read the maps pixel by pixel.
        x = self.stem(check_sides(x, self.in_chans).contiguous(memory_format=torch.channels_last))
        maps: List[torch.Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [*maps[1:-1], self.pool(x)]


class PathAggregation(nn.Module):
    """A pyramid that carries coarse maps down to the finest one and fine maps up again (PAFPN)."""

    def __init__(
            self,
            dims: Sequence[int],
            depth: int = 1,
            d_state: int = 16,
            expand: float = 2.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the neck.

        Args:
            dims: Channels of the maps of strides 8, 16 and 32; those of the result are the same.
            depth: Mixers of each block.
            d_state: State size N.
            expand: Inner channels of a mixer over its channels.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        options = (depth, d_state, expand, False)
        fine, middle, coarse = dims
        self.down_blocks = nn.ModuleList([
            MambaYOLOBlock(coarse + middle, middle, *options, **dd),
            MambaYOLOBlock(middle + fine, fine, *options, **dd)])
        self.up_convs = nn.ModuleList([make_conv(dim, dim, 3, stride=2, **dd) for dim in (fine, middle)])
        self.up_blocks = nn.ModuleList([
            MambaYOLOBlock(fine + middle, middle, *options, **dd),
            MambaYOLOBlock(middle + coarse, coarse, *options, **dd)])

    def forward(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """Map three maps (B, C, H', W'), the finest one first, to three of the same shapes."""
        fine, middle, coarse = maps
        x = F.interpolate(coarse, scale_factor=2., mode='nearest')
        middle = self.down_blocks[0](torch.cat([x, middle], dim=1))
        x = F.interpolate(middle, scale_factor=2., mode='nearest')
        fine = self.down_blocks[1](torch.cat([x, fine], dim=1))
        middle = self.up_blocks[0](torch.cat([self.up_convs[0](fine), middle], dim=1))
        coarse = self.up_blocks[1](torch.cat([self.up_convs[1](middle), coarse], dim=1))
        return [fine, middle, coarse]


class YOLOHead(nn.Module):
    """For every cell of every map: 16 logits for the distance to each side of a box, and a logit for each class."""

    def __init__(
            self,
            dims: Sequence[int],
            num_classes: int = 80,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the two branches of each level.

        Args:
            dims: Channels of the maps.
            num_classes: Classes.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_classes = num_classes
        box_dim = max(16, dims[0] // 4, 4 * NUM_BINS)
        class_dim = max(dims[0], min(num_classes, 100))

        def branch(dim: int, hidden: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                make_conv(dim, hidden, 3, **dd), make_conv(hidden, hidden, 3, **dd),
                nn.Conv2d(hidden, outputs, 1, **dd))

        self.boxes = nn.ModuleList([branch(dim, box_dim, 4 * NUM_BINS) for dim in dims])
        self.classes = nn.ModuleList([branch(dim, class_dim, num_classes) for dim in dims])
        # Frozen, but a parameter as in official files, so that sizes and files agree.
        self.bins = nn.Parameter(torch.empty(1, NUM_BINS, 1, 1, **dd), requires_grad=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the bins, and the biases so that a cell expects 5 objects in an image of 640 x 640 pixels."""
        self.bins.copy_(torch.arange(NUM_BINS, dtype=self.bins.dtype, device=self.bins.device).view_as(self.bins))
        for boxes, classes, stride in zip(self.boxes, self.classes, STRIDES, strict=True):
            boxes[-1].bias.fill_(1.)
            classes[-1].bias.fill_(math.log(5 / self.num_classes / (640 / stride) ** 2))

    def forward(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """Map three maps (B, C_l, H_l, W_l) to (B, 64 + num_classes, H_l, W_l)."""
        return [
            torch.cat([boxes(x), classes(x)], dim=1)
            for x, boxes, classes in zip(maps, self.boxes, self.classes)]


class MambaYOLO(nn.Module):
    """Mamba-YOLO: images to boxes and class probabilities, or in training mode to raw maps."""

    official_class = 'DetectionModel'
    strides = STRIDES

    def __init__(
            self,
            num_classes: int = 80,
            depths: Sequence[int] = (1, 1, 3, 1),
            dims: Sequence[int] = (32, 64, 128, 256),
            neck_depth: int = 1,
            d_state: int = 16,
            expand: float = 2.,
            in_chans: int = 3,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model.

        Args:
            num_classes: Classes.
            depths: Blocks of the four stages of the backbone, strides 4 to 32.
            dims: Channels C of the stages, even; those of the neck's maps are the last three.
            neck_depth: Mixers of each block of the neck.
            d_state: State size N of the scans.
            expand: Inner channels of a mixer over C.
            in_chans: Channels of the images.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        for name, sizes in (('depths', depths), ('dims', dims)):
            if len(sizes) != 4 or min(sizes) < 1:
                raise ValueError(f'{name} are {tuple(sizes)}; four numbers from 1 on are needed, one a stage.')
        if any(dim % 2 for dim in dims):
            raise ValueError(f'dims are {tuple(dims)}; stem and pooling halve the channels: choose even numbers.')
        for name, value in (('num_classes', num_classes), ('neck_depth', neck_depth), ('in_chans', in_chans)):
            if value < 1:
                raise ValueError(f'{name} is {value}; at least 1 is needed.')
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.backbone = MambaYOLOBackbone(depths, dims, in_chans, d_state, expand, **dd)
        self.neck = PathAggregation(dims[1:], neck_depth, d_state, expand, **dd)
        self.head = YOLOHead(dims[1:], num_classes, **dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights.

        Args:
            needs_reset: Draw also what the sub-modules drew when they were built; needed after `to_empty()`.
        """
        if needs_reset:
            reset_tree(self)
        for module in self.modules():
            if isinstance(module, MambaYOLOBlock):
                for mixer in module.mixers:
                    nn.init.normal_(mixer.ssm.dt_proj)
                    nn.init.normal_(mixer.ssm.dt_bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_official_keys(state_dict, prefix, self, OFFICIAL)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of the backbone in the backward pass instead of storing what they compute."""
        for stage in self.backbone.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def fuse(self) -> 'MambaYOLO':
        """Fold all BatchNorms into their convolutions, in place and for good, and return the model for inference."""
        fold_norms(self.eval())
        self.official_class = ''  # the official names have no place for these weights
        return self.requires_grad_(False)

    def forward_raw(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the raw maps of strides 8, 16 and 32.

        Args:
            x: Images, (B, in_chans, H, W), with values in [0, 1] and sides that are multiples of 32.

        Returns:
            (B, 64 + num_classes, H / s, W / s) for each stride s: 16 logits each for the distances to the left, top,
            right and bottom side, then the logits of the classes.
        """
        return self.head(self.neck(self.backbone(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor | List[torch.Tensor]:
        """Detect objects.

        Args:
            x: Images, (B, in_chans, H, W), with values in [0, 1] and sides that are multiples of 32.

        Returns:
            In training mode the raw maps, see `forward_raw`. In evaluation mode (B, 4 + num_classes, A) for A cells:
            centre (x, y), width and height of a box in pixels, and the probability of each class; at least in float32.
            `visionssm.detection.non_max_suppression` makes detections of it.
        """
        raw_maps = self.forward_raw(x)
        if self.training:
            return raw_maps
        boxes, scores = decode_boxes(raw_maps, self.strides, self.head.bins.flatten())
        return torch.cat([box_convert(boxes, 'xyxy', 'cxcywh'), scores.sigmoid()], dim=2).transpose(1, 2)


_BLOCK = (
    ('lsblock.fc1.{}', 'local.conv.conv.{}'), ('lsblock.norm.{}', 'local.conv.bn.{}'),
    ('lsblock.fc2.{}', 'local.fc1.{}'), ('lsblock.fc3.{}', 'local.fc2.{}'),
    ('norm.norm.{}', 'norm1.{}'), ('norm2.norm.{}', 'norm2.{}'),
    ('mlp.fc1.{}', 'mlp.fc1.{}'), ('mlp.dwconv.{}', 'mlp.conv.{}'), ('mlp.fc2.{}', 'mlp.fc2.{}'))
_MIXER = (
    ('x_proj_weight', 'ssm.x_proj'), ('dt_projs_weight', 'ssm.dt_proj'), ('dt_projs_bias', 'ssm.dt_bias'),
    ('A_logs', 'ssm.A_log'), ('Ds', 'ssm.D'), ('conv2d.{}', 'conv.{}'), ('in_proj.{}', 'in_proj.{}'),
    ('out_norm.{}', 'out_norm.{}'), ('out_proj.{}', 'out_proj.{}'))
_STAGES = (1, 3, 5, 7)
"""Places of the backbone's stages in the official graph."""
_NECK = {11: 'neck.down_blocks.0', 14: 'neck.down_blocks.1', 17: 'neck.up_blocks.0', 20: 'neck.up_blocks.1'}
_CONVS = {
    '8.cv1': 'backbone.pool.conv1', '8.cv2': 'backbone.pool.conv2', '15': 'neck.up_convs.0', '18': 'neck.up_convs.1'}


def _block_rows(theirs: str, ours: str, proj: str, mixer: str, own_mixer: str) -> list[tuple[str, str]]:
    """Return the rows of a block; its mixers have the names `mixer` and `own_mixer` in the two languages."""
    return [
        (f'{theirs}.{proj}.0.{{}}', f'{ours}.proj.conv.{{}}'), (f'{theirs}.{proj}.1.{{}}', f'{ours}.proj.bn.{{}}'),
        *((f'{theirs}.{name}', f'{ours}.{own}') for name, own in _BLOCK),
        *((f'{theirs}.{mixer}.{name}', f'{ours}.{own_mixer}.{own}') for name, own in _MIXER)]


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    """Return the rows (official key, our key); of a single block both names, that with an index first, see `_tidy`."""
    rows = []
    for i, layer in enumerate(_STAGES):
        for theirs, ours in ((f'{layer}.{{}}', '{}'), (str(layer), '0')):
            rows += _block_rows(f'model.{theirs}', f'backbone.stages.{i}.blocks.{ours}', 'proj_conv', 'op', 'mixers.0')
    for layer, ours in _NECK.items():
        rows += _block_rows(f'model.{layer}', ours, 'in_proj', 'ss2d.{}', 'mixers.{}')
    pairs = [
        ('model.0.conv.0', 'backbone.stem.conv1.conv'), ('model.0.conv.1', 'backbone.stem.conv1.bn'),
        ('model.0.conv.3', 'backbone.stem.conv2.conv'), ('model.0.conv.4', 'backbone.stem.conv2.bn')]
    for i, layer in enumerate(_STAGES[:-1], 1):
        pairs += [(f'model.{layer + 1}.pw_linear.{j}', f'backbone.stages.{i}.downsample.conv.{name}')
                  for j, name in enumerate(('conv', 'bn'))]
    pairs += [(f'model.{theirs}.{name}', f'{ours}.{name}')
              for theirs, ours in _CONVS.items() for name in ('conv', 'bn')]
    pairs += [(f'model.21.{theirs}.{{}}.{name}', f'head.{ours}.{{}}.{name}')
              for theirs, ours in (('cv2', 'boxes'), ('cv3', 'classes'))
              for name in ('0.conv', '0.bn', '1.conv', '1.bn', '2')]
    return (*rows, *((f'{theirs}.{{}}', f'{ours}.{{}}') for theirs, ours in pairs),
            ('model.21.dfl.conv.weight', 'head.bins'))


_BARE_BLOCK = re.compile(r'model\.([1357])\.(?=[a-z])')
_INDEXED_BLOCK = re.compile(r'model\.([1357])\.0\.')
_POINTWISE = re.compile(r'model\..*\.(op|ss2d\.\d+)\.(in_proj|out_proj)\.weight')


def _tidy(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Number the block of a stage that has only one, and take the last axes off a mixer's pointwise convolutions."""
    return {
        _BARE_BLOCK.sub(r'model.\1.0.', key):
            value[:, :, 0, 0] if _POINTWISE.fullmatch(key) and value.ndim == 4 else value
        for key, value in state_dict.items()}


def _restore(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Undo `_tidy`."""
    single = [str(layer) for layer, stage in zip(_STAGES, model.backbone.stages, strict=True) if len(stage.blocks) == 1]
    restored = {}
    for key, value in state_dict.items():
        value = value[:, :, None, None] if _POINTWISE.fullmatch(key) else value
        match = _INDEXED_BLOCK.match(key)
        restored[_INDEXED_BLOCK.sub(r'model.\1.', key) if match and match[1] in single else key] = value
    return restored


def _scale(config: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the factors of depth and width, and the most channels, of an official configuration."""
    scale = config.get('scale')
    if isinstance(config.get('scales'), Mapping):
        # as in the .yaml files; the official code takes the first one where the name is none of them
        scales = dict(config['scales'])
        scale = scales.get(scale, next(iter(scales.values())))
    if scale is None:
        try:
            scale = [config[name] for name in ('depth_multiple', 'width_multiple', 'max_channels')]
        except KeyError as error:
            raise ValueError(
                f'config has no {error}; it needs depth_multiple, width_multiple and max_channels, or the three as '
                f'scale.') from error
    depth, width, most = scale
    return float(depth), float(width), float(most)


def _build_official(official_class: str, config: Mapping[str, Any]) -> MambaYOLO:
    """Build our model from an official configuration, or from the sizes that `_infer_official` finds."""
    names = {'nc': 'num_classes', 'ch': 'in_chans'}
    if 'dims' in config:
        return MambaYOLO(**{names.get(name, name): value for name, value in config.items()})
    sizes = {own: config[name] for name, own in names.items() if name in config}
    depth, width, most = _scale(config)
    short, long = (max(round(repeats * depth), 1) for repeats in (3, 9))
    dims = [8 * math.ceil(min(base, most) * width / 8) for base in (128, 256, 512, 1024)]
    return MambaYOLO(depths=(short, short, long, short), dims=dims, neck_depth=short, **sizes)


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer the sizes from keys and shapes."""
    sd = _tidy(state_dict)
    if 'model.1.0.op.x_proj_weight' not in sd or 'model.21.cv3.0.2.weight' not in sd:
        raise ValueError(
            'These are not the keys of an official Mamba-YOLO state dict (no model.1.op.x_proj_weight or '
            f'model.21.cv3.0.2.weight); the first ones are {sorted(sd)[:5]}.')
    return 'DetectionModel', {
        'nc': len(sd['model.21.cv3.0.2.weight']),
        'ch': sd['model.0.conv.0.weight'].shape[1],
        'dims': [len(sd[f'model.{layer}.0.norm.norm.weight']) for layer in _STAGES],
        'depths': [sum(f'model.{layer}.{i}.norm.norm.weight' in sd for i in range(100)) for layer in _STAGES],
        'neck_depth': sum(f'model.11.ss2d.{i}.Ds' in sd for i in range(100)),
        'd_state': sd['model.1.0.op.A_logs'].shape[1],
        'expand': sd['model.1.0.op.out_proj.weight'].shape[1] / len(sd['model.1.0.op.out_proj.weight'])}


OFFICIAL = Official(
    family='mamba_yolo',
    classes=('DetectionModel',),
    keys=_key_table,
    build=_build_official,
    infer=_infer_official,
    tidy=_tidy,
    restore=_restore,
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official state dict, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: A `MambaYOLO`.

    Returns:
        Our keys.
    """
    return filter_official(state_dict, model, OFFICIAL)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 80,
        'input_size': (3, 640, 640),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': (0., 0., 0.),
        'std': (1., 1., 1.),
        'first_conv': 'backbone.stem.conv1.conv',
        'classifier': tuple(f'head.classes.{i}.2' for i in range(3)),
        'origin_url': 'https://github.com/HZAI-ZJNU/Mamba-YOLO',
        'paper_name': 'Mamba YOLO: A Simple Baseline for Object Detection with State Space Model',
        'paper_ids': 'arXiv:2406.05835',
        'description': 'The official repository published no weights.',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'mamba_yolo_tiny': _cfg(),
    'mamba_yolo_base': _cfg(),
    'mamba_yolo_large': _cfg(),
    'mamba_yolo_pico': _cfg(input_size=(3, 64, 64), description='A small model without weights, for tests.'),
})


def _create_mamba_yolo(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> MambaYOLO:
    return build_task_model(
        MambaYOLO, variant, default_cfgs, checkpoint_filter_fn, pretrained, **dict(model_args, **kwargs))


@register_task_model('detection')
def mamba_yolo_tiny(pretrained: bool = False, **kwargs: Any) -> MambaYOLO:
    """Mamba-YOLO-T: 6.1M parameters; no weights were published."""
    return _create_mamba_yolo('mamba_yolo_tiny', pretrained, kwargs)


@register_task_model('detection')
def mamba_yolo_base(pretrained: bool = False, **kwargs: Any) -> MambaYOLO:
    """Mamba-YOLO-B, in the README "M": 21.8M parameters; no weights were published."""
    return _create_mamba_yolo('mamba_yolo_base', pretrained, kwargs, dims=(64, 128, 256, 512))


@register_task_model('detection')
def mamba_yolo_large(pretrained: bool = False, **kwargs: Any) -> MambaYOLO:
    """Mamba-YOLO-L: 57.6M parameters; no weights were published."""
    return _create_mamba_yolo(
        'mamba_yolo_large', pretrained, kwargs, depths=(2, 2, 6, 2), dims=(96, 192, 384, 576), neck_depth=2)


@register_task_model('detection')
def mamba_yolo_pico(pretrained: bool = False, **kwargs: Any) -> MambaYOLO:
    """A weightless detector for tests and small data: quick on a CPU."""
    return _create_mamba_yolo(
        'mamba_yolo_pico', pretrained, kwargs, depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), d_state=4)
