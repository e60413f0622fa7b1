"""An MMEngine model around any image classifier of timm's registry, with its preprocessor and its losses."""
import inspect
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import timm
import torch
import torch.nn as nn
from mmengine.dist import all_reduce
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DefaultScope
from timm.data.mixup import Mixup, mixup_target
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import visionssm  # noqa: F401  (puts our models into timm's registry)

from ..registry import MODELS
from ..utils.suggest import did_you_mean
from . import dist

for _loss in (BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy,
              nn.CrossEntropyLoss):
    MODELS.register_module(module=_loss)
soft_target_loss = SoftTargetCrossEntropy()

# losses that read class indices only and so cannot follow Mixup or CutMix
INDEX_LOSSES = (LabelSmoothingCrossEntropy, JsdCrossEntropy)


class Mesa(NamedTuple):
    """Distillation from the model's own averaged weights (MESA: sharpness-aware training for free)."""
    weight: float = 1.0
    """Factor of the loss."""
    start: float = 0.25
    """Share of the training that runs without it."""


def _read_mesa(options: dict) -> Mesa:
    for key in options:
        if key not in Mesa._fields:
            raise ValueError(f'mesa has no key {key!r}. {did_you_mean(key, Mesa._fields)} '
                             f'It takes {", ".join(Mesa._fields)}.')
    mesa = Mesa(**options)
    if not mesa.weight > 0:
        raise ValueError(f'mesa.weight must be above 0, got {mesa.weight}; mesa=None switches the loss off')
    if not 0 <= mesa.start < 1:
        raise ValueError(f'mesa.start must be in [0, 1), the share of the training without the loss, got {mesa.start}')
    return mesa


def create_timm_model(name: str, **kwargs: Any) -> nn.Module:
    """Create a model of timm's registry, ours or timm's, with errors that name the nearest valid spelling.

    Args:
        name: The registered name, with or without a tag, or a ``hf-hub:`` or ``local-dir:`` address.
        **kwargs: What ``timm.create_model`` takes.

    Returns:
        The model.
    """
    if ':' not in name and not timm.is_model(name.split('.')[0]):
        raise ValueError(f'Unknown model {name!r}. {did_you_mean(name.split(".")[0], timm.list_models())} '
                         'See timm.list_models().')
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        wrong = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if wrong is None or wrong[2] not in kwargs:
            raise ValueError(f'Model {name!r} cannot be built with {kwargs}: {error}') from error
        plain = {key: value for key, value in kwargs.items() if key in ('in_chans', 'num_classes')}
        model = timm.create_model(name, device='meta', **plain)
        known = [key for key in inspect.signature(type(model).__init__).parameters if key not in ('self', 'kwargs')]
        raise ValueError(f'Model {name!r} has no argument {wrong[2]!r}. {did_you_mean(wrong[2], known)} '
                         f'It takes {", ".join(known)}.') from error


@MODELS.register_module()
class ClsDataPreprocessor(BaseDataPreprocessor):
    """Move a batch to the device, normalise it, and in training mix it.

    Args:
        mean: Per channel, in units of [0, 1]; None leaves the values as they are.
        std: Per channel, in units of [0, 1].
        mixup: Arguments of ``timm.data.Mixup``; None switches Mixup and CutMix off.
        num_classes: Number of classes of the mixed targets.
        non_blocking: Whether copies to the device may overlap with computation.
    """

    def __init__(
            self,
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
            mixup: dict | None = None,
            num_classes: int = 1000,
            non_blocking: bool = True,
    ) -> None:
        super().__init__(non_blocking=non_blocking)
        if (mean is None) != (std is None):
            raise ValueError(f'mean and std go together: got mean={mean}, std={std}; give both or neither')
        if mean is not None and len(mean) != len(std):
            raise ValueError(f'mean and std need one value a channel each: got {len(mean)} and {len(std)}')
        for key in mixup or {}:
            known = inspect.signature(Mixup).parameters
            if key not in known:
                raise ValueError(f'mixup has no key {key!r}. {did_you_mean(key, known)} It takes {", ".join(known)}.')
        self.mixup = None if mixup is None else Mixup(**{'num_classes': num_classes, **mixup})
        for key, values in (('mean', mean), ('std', std)):
            tensor = None if values is None else torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(key, tensor, persistent=False)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Prepare one batch.

        Args:
            data: ``inputs`` (B, C, H, W), integers in 0..255 or floats in 0..1; ``labels`` (B,), and anything else,
                which is passed on.
            training: Whether Mixup and CutMix apply.

        Returns:
            The batch with float ``inputs``; ``labels`` are class indices (B,), or densities (B, num_classes) when
            mixed.
        """
        data = self.cast_data(data)
        # random erasing and albumentations' ToFloat hand out floats, which are in 0..1 already
        inputs = data['inputs'].float() / (1 if data['inputs'].is_floating_point() else 255)
        if self.mean is not None:
            if inputs.shape[1] != len(self.mean):
                raise ValueError(f'the images have {inputs.shape[1]} channels and data_preprocessor.mean has '
                                 f'{len(self.mean)} values; set mean and std to one value a channel')
            inputs = (inputs - self.mean) / self.std
        data['inputs'] = inputs
        if training and self.mixup is not None:
            data['inputs'], data['labels'] = self._mix(inputs, data['labels'])
        return data

    def _mix(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        even = len(inputs) // 2 * 2
        rest = mixup_target(labels[even:], self.mixup.num_classes, 1.0, self.mixup.label_smoothing)
        if even == 0:
            return inputs, rest
        # timm pairs samples, so the odd one of a last batch stays as it is
        mixed, targets = self.mixup(inputs[:even], labels[:even])
        return torch.cat([mixed, inputs[even:]]), torch.cat([targets, rest])


def _build(cfg: dict) -> Any:
    """Build a part whose bare name is one of ours, also after a run of another scope in the same process."""
    with DefaultScope.overwrite_default_scope('visionssm'):
        return MODELS.build(cfg)


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Any classifier of timm's registry as an MMEngine model.

    Args:
        model: ``name`` and any argument of ``timm.create_model`` (``pretrained``, ``num_classes``, ``img_size``,
            ``drop_path_rate``, ``checkpoint_path``, ...).
        loss: A registered loss. None takes ``SoftTargetCrossEntropy`` with Mixup or CutMix and
            ``CrossEntropyLoss`` without.
        mixup: Arguments of ``timm.data.Mixup``; None switches Mixup and CutMix off.
        data_preprocessor: Arguments of :class:`ClsDataPreprocessor`; ``mean`` and ``std`` are the model's own
            unless given.
        grad_checkpointing: Whether blocks are recomputed in the backward pass to save memory.
        mesa: ``dict(weight=1.0, start=0.25)`` adds, after that share of the training, ``weight`` times the soft-target
            cross-entropy to the class probabilities of the averaged model, which needs an ``EMAHook``.
        init_cfg: Not used: timm's models initialise themselves. Kept for MMEngine's protocol.
    """

    def __init__(
            self,
            model: dict,
            loss: dict | None = None,
            mixup: dict | None = None,
            data_preprocessor: dict | None = None,
            grad_checkpointing: bool = False,
            mesa: dict | None = None,
            init_cfg: dict | None = None,
    ) -> None:
        if 'name' not in model:
            raise ValueError(f"model needs a 'name', as in dict(name='vim_tiny'): got {dict(model)}")
        net = create_timm_model(**model)
        preprocessor = {'type': 'ClsDataPreprocessor', 'num_classes': net.num_classes, 'mixup': mixup,
                        **self._normalisation(net), **(data_preprocessor or {})}
        super().__init__(data_preprocessor=_build(preprocessor), init_cfg=init_cfg)
        self.model = net
        self.mesa = None if mesa is None else _read_mesa(mesa)
        self.evaluated_size: tuple[int, ...] | None = None
        self.set_teacher(None)
        if grad_checkpointing:
            net.set_grad_checkpointing(True)
        mixes = self.data_preprocessor.mixup is not None
        self.loss = _build(loss or {'type': 'SoftTargetCrossEntropy' if mixes else 'CrossEntropyLoss'})
        if mixes and isinstance(self.loss, INDEX_LOSSES):
            raise ValueError(f'{type(self.loss).__name__} reads class indices, which Mixup and CutMix replace by '
                             'densities; use SoftTargetCrossEntropy or BinaryCrossEntropy (smoothing then belongs '
                             'to mixup.label_smoothing)')
        if not mixes and isinstance(self.loss, SoftTargetCrossEntropy):
            raise ValueError('SoftTargetCrossEntropy needs densities, which only Mixup and CutMix make; '
                             'use CrossEntropyLoss or LabelSmoothingCrossEntropy, or give mixup=dict(...)')

    @staticmethod
    def _normalisation(net: nn.Module) -> dict:
        """Mean and standard deviation of the model's own configuration, when they fit its channels."""
        cfg, channels = net.pretrained_cfg, getattr(net, 'in_chans', 3)
        mean, std = cfg.get('mean'), cfg.get('std')
        if not mean or not std or len(mean) != channels:
            return {}
        return {'mean': list(mean), 'std': list(std)}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.model.num_classes

    def init_weights(self) -> None:
        """Keep what timm has initialised or loaded: MMEngine would call the model's own initialiser again."""
        self._is_init = True

    def set_teacher(self, teacher: nn.Module | None) -> None:
        """Learn from another model's answers as well, as the option ``mesa`` says.

        Args:
            teacher: An :class:`ImageClassifier` that answers without gradient, in evaluation mode; None for none.
        """
        # past nn.Module's registration: the teacher is no part of this model's parameters, weights or copies
        self.__dict__['teacher'] = None if teacher is None else teacher.eval()

    def _losses(self, inputs: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        # losses in float32 whatever autocast chose for the head
        loss = self.loss(logits.float(), labels)
        if self.mesa is None or self.teacher is None:
            return {'loss': loss}
        with torch.no_grad():
            target = self.teacher(inputs).float().softmax(dim=-1)
        dist.reshard(self.teacher)
        return {'loss_cls': loss, 'loss_mesa': self.mesa.weight * soft_target_loss(logits.float(), target)}

    def parse_losses(self, losses: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum the losses for the backward pass, and average over all processes what is logged.

        Args:
            losses: What ``forward`` returns in the mode ``loss``.

        Returns:
            The loss of this process, and values for the log.
        """
        loss, log_vars = super().parse_losses(losses)
        logged = {name: value.detach().clone() for name, value in log_vars.items()}
        for value in logged.values():
            all_reduce(value, 'mean')
        return loss, logged

    def get_layer_depth(self, param_name: str, prefix: str = 'model.') -> tuple[int, int]:
        """Layer of a parameter, as mmpretrain's layer-decay constructor asks for it.

        Args:
            param_name: Name of the parameter in this module.
            prefix: What stands before timm's name of the parameter.

        Returns:
            The layer's number, counted from the input, and the number of layers.
        """
        from .optim import layer_ids
        layers = layer_ids(self.model)
        depth = max(layers.values())
        return layers.get(param_name.removeprefix(prefix), depth), depth + 1

    def forward(
            self,
            inputs: torch.Tensor,
            labels: torch.Tensor | None = None,
            paths: Sequence[str] | None = None,
            indices: Sequence[int] | None = None,
            mode: Literal['tensor', 'loss', 'predict'] = 'tensor',
    ) -> torch.Tensor | dict[str, torch.Tensor] | list[dict]:
        """Logits, a loss or predictions.

        Args:
            inputs: Normalised images (B, C, H, W).
            labels: Class indices (B,), or densities (B, num_classes).
            paths: Where the images come from.
            indices: Places of the images in the dataset.
            mode: ``tensor`` for logits (B, num_classes), ``loss`` for ``dict(loss=...)`` (with a teacher ``loss_cls``
                and ``loss_mesa``, whose sum is the loss), ``predict`` for one ``dict(index, label, scores, path)`` an
                image, its scores (num_classes,) float32 on the CPU.

        Returns:
            What ``mode`` asks for.
        """
        channels = getattr(self.model, 'in_chans', inputs.shape[1])
        if inputs.shape[1] != channels:
            raise ValueError(f'the model takes {channels} channels and the images have {inputs.shape[1]}; '
                             f'set model.model.in_chans={inputs.shape[1]} or convert the images')
        logits = self.model(inputs)
        if mode == 'tensor':
            return logits
        if mode == 'loss':
            return self._losses(inputs, logits, labels)
        if mode != 'predict':
            raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")
        self.evaluated_size = tuple(inputs.shape[1:])
        scores = logits.float().softmax(dim=-1).cpu()
        count = len(scores)
        labels = [None] * count if labels is None else labels.tolist()
        indices = range(count) if indices is None else indices
        paths = [None] * count if paths is None else paths
        return [{'index': index, 'label': label, 'scores': score, 'path': path}
                for index, label, score, path in zip(indices, labels, scores, paths, strict=True)]
