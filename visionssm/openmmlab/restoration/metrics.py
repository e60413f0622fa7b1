"""PSNR, SSIM and LPIPS of restored pictures, a row for each data set."""
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.device import get_device
from mmengine.evaluator import BaseMetric
from torch import nn
from torchvision.models import AlexNet_Weights, VGG16_Weights

from ...checkpoints import CheckpointError, check_fit, load_state_dict
from ...checkpoints.transfer import hash_file
from ...registry import METRICS
from ...restoration.metrics import psnr, ssim, ssim_volume, to_uint8
from ...restoration.resize import imresize
from ...utils.suggest import check_choice

__all__ = ['RestorationMetric', 'create_lpips', 'lpips_distance']

# torchvision's weights that the distances were fitted to, and the least side of a picture
LPIPS_NETS = {'alex': (AlexNet_Weights.IMAGENET1K_V1, 31), 'vgg': (VGG16_Weights.IMAGENET1K_V1, 16)}


def _is_official(path: Path, url: str) -> bool:
    """Whether a file is the one of torchvision, whose name ends in the first digits of its hash."""
    return hash_file(path).startswith(Path(url).stem.rpartition('-')[2])


def create_lpips(kind: Literal['alex', 'vgg'], weights: str | None = None) -> tuple[nn.Module, str]:
    """Build the network of LPIPS ("The unreasonable effectiveness of deep features", arXiv 1801.03924) by torchmetrics.

    The linear layers are those that torchmetrics brings, version 0.1 of the authors.

    Args:
        kind: 'alex', which tables show, or 'vgg'.
        weights: Of the network below: None fetches torchvision's; a path reads them, running no code of the file;
            'random' draws them, always the same, which is of use to tests alone.

    Returns:
        The network, and what to call its numbers: `LPIPS` or `LPIPS-VGG`, with `-random` or `-custom` behind it unless
        the weights are torchvision's own.
    """
    check_choice('lpips', kind, tuple(LPIPS_NETS))
    if importlib.util.find_spec('torchmetrics') is None:
        raise ModuleNotFoundError('LPIPS needs torchmetrics, which is not installed: '
                                  'pip install "visionssm[restoration]" brings it, or set lpips=None')
    from torchmetrics.functional.image.lpips import _NoTrainLpips
    name, official = 'LPIPS' if kind == 'alex' else f'LPIPS-{kind.upper()}', LPIPS_NETS[kind][0]
    if weights is None:
        try:
            return _NoTrainLpips(net=kind), name
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f'LPIPS needs weights of ImageNet, the file {Path(official.url).name}, which could not be fetched: '
                f'{error}. Fetch {official.url} where there is a network, and set lpips_weights=PATH or put the file '
                f'into {Path(torch.hub.get_dir(), "checkpoints")}; lpips=None leaves the column out') from error
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = _NoTrainLpips(net=kind, pnet_rand=True)
    if weights == 'random':
        return net, f'{name}-random'
    if not Path(weights).is_file():
        raise FileNotFoundError(f'lpips_weights is {weights}, which is no file; it takes the path of '
                                f"torchvision's {Path(official.url).name}, 'random' for tests, or None to fetch it")
    state = load_state_dict(weights)
    own = {key: f'features.{key.partition(".")[2]}' for key in net.net.state_dict()}
    try:
        check_fit(net.net, {key: state[theirs] for key, theirs in own.items() if theirs in state}, str(weights))
    except CheckpointError as error:
        raise CheckpointError(f'lpips_weights takes {Path(official.url).name} of torchvision. {error}') from error
    net.net.load_state_dict({key: state[theirs] for key, theirs in own.items()})
    return net, name if _is_official(Path(weights), official.url) else f'{name}-custom'


@torch.no_grad()
def lpips_distance(net: nn.Module, restored: torch.Tensor, target: torch.Tensor, least: int = 31) -> float:
    """Distance of two pictures, from 0 up.

    Args:
        net: What `create_lpips` built.
        restored: RGB or gray, (C, H, W), in [0, 1].
        target: Of the same shape.
        least: Least side of a picture.

    Returns:
        The distance of the whole pictures, rounded to bytes; a gray one counts as RGB with equal channels.
    """
    if restored.shape != target.shape or restored.shape[0] not in (1, 3):
        raise ValueError(f'LPIPS compares RGB or gray pictures of one shape, got {tuple(restored.shape)} and '
                         f'{tuple(target.shape)}')
    if min(restored.shape[-2:]) < least:
        raise ValueError(f'LPIPS needs at least {least} x {least} pixels, got {restored.shape[-2]} x '
                         f'{restored.shape[-1]}')
    device = next(net.parameters()).device
    pair = [(to_uint8(x).float() / 255).expand(3, -1, -1)[None].to(device) for x in (restored, target)]
    return float(net(*pair, normalize=True))


def _enlarge(bad: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A bad picture, enlarged bicubically to the size of the good one."""
    scale = target.shape[-1] // bad.shape[-1]
    bad = bad.to(target)
    return (imresize(bad, scale) if scale > 1 else bad).clamp(0, 1)


@METRICS.register_module()
class RestorationMetric(BaseMetric):
    """Mean PSNR (dB), SSIM and on demand LPIPS over the pictures of each data set, as `PSNR_NAME` and so on.

    `PSNR`, `SSIM` and `LPIPS` are the means over the data sets. Pictures are compared as bytes, as the papers do, and
    count once by index. After an evaluation `rows` (on the main process) holds `dict(class, images, PSNR, SSIM)`, a row
    a data set.

    Args:
        border: Pixels left out on every side: the scale in super-resolution, 0 elsewhere.
        y_channel: Compare luma alone: super-resolution and JPEG.
        volume: As SIDD's benchmark: values that are not rounded, and an SSIM over all three colours at once.
        lpips: 'alex' or 'vgg' adds LPIPS (lower is better) of the whole pictures, whatever `border` and `y_channel`.
        lpips_weights: See `create_lpips`; numbers with other weights than the published have another name.
        baseline: Score the bad pictures too, enlarged bicubically where they are smaller: `input PSNR` and so on.
        collect_device: 'cpu' or 'gpu', see mmengine.
        prefix: Prefix of the names.
    """

    # none, said so that MMEngine does not warn
    default_prefix = ''

    def __init__(
            self,
            border: int = 0,
            y_channel: bool = False,
            volume: bool = False,
            lpips: Literal['alex', 'vgg'] | None = None,
            lpips_weights: str | None = None,
            baseline: bool = False,
            collect_device: str = 'cpu',
            prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if volume and (border or y_channel):
            raise ValueError(f'volume=True goes without border ({border}) and y_channel ({y_channel})')
        self.border, self.y_channel, self.volume = border, y_channel, volume
        self.rows: list[dict[str, Any]] = []
        self.columns = ['PSNR', 'SSIM']
        self.lpips = lpips
        if lpips is not None:
            net, column = create_lpips(lpips, lpips_weights)
            self.net = net.to(get_device())
            self.columns.append(column)
        elif lpips_weights is not None:
            raise ValueError(f"lpips_weights is {lpips_weights} and lpips None; set lpips='alex' or 'vgg'")
        self.baseline = baseline
        if baseline:
            self.columns += [f'input {column}' for column in self.columns]

    def _compare(self, restored: torch.Tensor, target: torch.Tensor) -> list[float]:
        if self.volume:
            scores = [psnr(restored, target, peak=1.), ssim_volume(restored, target)]
        else:
            pair = to_uint8(restored), to_uint8(target)
            scores = [measure(*pair, border=self.border, y_channel=self.y_channel) for measure in (psnr, ssim)]
        if self.lpips is not None:
            scores.append(lpips_distance(self.net, restored, target, LPIPS_NETS[self.lpips][1]))
        return [float(score) for score in scores]

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Record the scores of one batch.

        Args:
            data_batch: The pictures that the model was given, as `inputs`.
            data_samples: What the model predicts, a dictionary a picture.
        """
        for place, sample in enumerate(data_samples):
            if sample['target'] is None:
                raise ValueError(f'{sample["path"]} has no true picture to compare with')
            try:
                scores = self._compare(sample['restored'], sample['target'])
                if self.baseline:
                    scores += self._compare(_enlarge(data_batch['inputs'][place], sample['target']), sample['target'])
            except ValueError as error:
                raise ValueError(f'{sample["path"]}: {error}') from error
            self.results.append((sample['index'], sample['name'], *scores))

    def compute_metrics(self, results: list[tuple]) -> dict[str, float]:
        """Average over the pictures of all processes.

        Args:
            results: What `process` recorded.

        Returns:
            Name to value.
        """
        if not results:
            raise ValueError('no predictions to evaluate: the test set is empty')
        pictures = {index: (name, *scores) for index, name, *scores in results}
        self.rows = []
        for name in dict.fromkeys(pictures[index][0] for index in sorted(pictures)):
            scores = torch.tensor([rest for other, *rest in pictures.values() if other == name], dtype=torch.float64)
            means = dict(zip(self.columns, scores.mean(0).tolist(), strict=True))
            self.rows.append({'class': name or 'all', 'images': len(scores), **means})
        values = {f'{key}_{row["class"]}': row[key] for row in self.rows for key in self.columns}
        return {**values, **{key: sum(row[key] for row in self.rows) / len(self.rows) for key in self.columns}}
