"""Restoration of picture and video files of any size, by any model, at the depth and with the colours of the input."""
import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..checkpoints import CheckpointError
from ..restoration.resize import imresize
from ..restoration.tiling import Progress, Tile, plan_tiles, restore_bands
from ..utils.command import check_folder
from ..utils.reporting import Report
from .amp import DTYPES
from .checkpoint import load_weights
from .data import READ_ERRORS
from .facts import RestorerFacts, find_restorer
from .image_files import FORMATS, PICTURE_SUFFIXES, Picture, choose_format, read_picture, write_picture
from .predict_dense import UniqueNames
from .restoration.restorer import create_restorer, restore
from .video import VIDEO_SUFFIXES, VideoFrames, VideoSink, is_video

__all__ = ['RESTORABLE_SUFFIXES', 'Restorer', 'add_restoration_options', 'enlarge', 'is_out_of_memory',
           'run_restoration']

logger = logging.getLogger('visionssm')

RESTORABLE_SUFFIXES = PICTURE_SUFFIXES | VIDEO_SUFFIXES
COMPARE_SIDE = 960
_Found = tuple[dict, str]  # what is known about a result, for JSON, and in words
LUMA = (0.299, 0.587, 0.114)


def add_restoration_options(parser: argparse.ArgumentParser) -> None:
    """Options of restoration.

    Args:
        parser: The parser of `tools/predict.py`.
    """
    group = parser.add_argument_group('restoration', 'super-resolution, denoising and removal of artefacts write '
                                      'NAME_restored.*, with the depth, alpha, colour profile and EXIF data of the '
                                      'input')
    group.add_argument('--tile', type=int, default=256, help='side of the pieces that are restored one by one and '
                       'blended (default: 256; more needs more memory, 0: the whole picture at once)')
    group.add_argument('--overlap', type=int, help='pixels that pieces share (default: 32, or a quarter of the tile)')
    group.add_argument('--self-ensemble', action='store_true',
                       help='average over the eight turned and mirrored forms: slightly better, eight times slower')
    group.add_argument('--precision', choices=['fp32', 'fp16', 'bf16'],
                       help='of the computation (default: fp16 on accelerators for pictures of 8 bits, else fp32)')
    group.add_argument('--format', choices=list(FORMATS), help='of the written pictures (default: that of PNG, TIFF '
                       'and BMP files, PNG for all others)')
    group.add_argument('--quality', type=int, default=95, help='of JPEG and WebP, 1 to 100 (WebP: 100 is lossless)')
    group.add_argument('--compare', action='store_true', help='also write NAME_compare.png: the middle of the picture '
                       'before, enlarged bicubically, and after')
    group.add_argument('--max-megapixels', type=float, default=150,
                       help='refuse pictures that say they are larger, before reading them (0: no limit)')


class Restorer:
    """A restoration model that takes pictures of any size, depth and number of channels.

    A model of RGB restores gray by three equal channels, whose mean it returns. A gray model restores the luma of
    colours (Y of BT.601, which JPEG files store) and leaves their chroma as it is, enlarged bicubically if it enlarges.
    Alpha is enlarged bicubically.

    With the overlap of 32 pixels, the results of pieces and of the whole differ by less than 0.2 of 255 levels for
    networks with initial values (0.01 for `mambair_light_sr_x2`), mostly beside the seams; weights with a longer memory
    than 32 pixels may differ more.

    Args:
        facts: What is known about the model.
        device: Where to compute.
        tile: Side of the pieces, rounded up to what the model's windows or strides divide; 0 for whole pictures.
        overlap: Pixels that pieces share; None takes 32, or a quarter of the tile.
        ensemble: Average over eight forms of the picture.
        precision: 'fp32', 'fp16', 'bf16', or None for what fits device and picture.
    """

    def __init__(
            self,
            facts: RestorerFacts,
            device: str = 'cpu',
            tile: int = 256,
            overlap: int | None = None,
            ensemble: bool = False,
            precision: str | None = None,
    ) -> None:
        self.device = torch.device(device)
        if precision == 'fp16' and self.device.type == 'cpu':
            raise ValueError('--precision fp16 needs an accelerator; on a CPU take fp32, or bf16')
        overlap = min(32, tile // 4) if overlap is None else overlap
        if tile < 0 or (tile and not 0 <= overlap < tile):
            raise ValueError(f'--tile {tile} and --overlap {overlap} do not fit; the tile is 0, or larger than the '
                             'overlap, which is 0 or more')
        self.net = _load(facts).to(self.device).eval()
        self.scale, self.channels = int(self.net.upscale), int(self.net.in_chans)
        if self.channels not in (1, 3):
            raise ValueError(f'{facts.name} takes {self.channels} channels; pictures have 1 or 3')
        multiple = int(getattr(self.net, 'multiple', getattr(self.net, 'window_size', 1)))
        self.tile, self.overlap = -(-tile // multiple) * multiple, overlap
        if self.tile != tile:
            logger.info('--tile %d is rounded up to %d, a multiple of %d', tile, self.tile, multiple)
        self.ensemble, self.precision = ensemble, precision
        self.warned = False

    def count(self, height: int, width: int) -> int:
        """How many pieces a picture has."""
        return len(plan_tiles(height, width, self.tile or max(height, width), self.overlap if self.tile else 0))

    @torch.inference_mode()
    def restore(self, pixels: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """Restores a picture; besides the two pictures, memory holds a row of pieces.

        Args:
            pixels: uint8 or uint16, (H, W, C), with 1 to 4 channels: gray or RGB, the even numbers with alpha.
            progress: Called with the number of pieces done and of all pieces.

        Returns:
            The restored picture, (s H, s W, C), of the same type.
        """
        height, width, channels = pixels.shape
        limit = np.iinfo(pixels.dtype).max
        dtype = self._dtype(pixels)

        def crop(piece: Tile) -> torch.Tensor:
            part = pixels[piece.top:piece.top + piece.height, piece.left:piece.left + piece.width]
            return torch.from_numpy(part.astype(np.float32)).permute(2, 0, 1)[None] / limit

        def run(part: torch.Tensor) -> torch.Tensor:
            color, alpha = part.split((channels - (channels % 2 == 0), int(channels % 2 == 0)), dim=1)
            restored = self._colors(color, dtype)
            return torch.cat([restored, self._enlarge(alpha)], dim=1) if alpha.shape[1] else restored

        result = np.empty((self.scale * height, self.scale * width, channels), pixels.dtype)
        tile, overlap = (self.tile, self.overlap) if self.tile else (max(height, width), 0)
        top = 0
        for band in restore_bands(run, crop, height, width, self.scale, tile, overlap, progress):
            rows = band[0].permute(1, 2, 0).clamp(0, 1).mul_(limit).round_().numpy()
            result[top:top + len(rows)] = rows
            top += len(rows)
        return result

    def _dtype(self, pixels: np.ndarray) -> torch.dtype | None:
        if self.precision is None:
            # float16 has 11 bits: enough for 8, and the 8 bits of bfloat16 are one level too few for bright pixels
            return torch.float16 if self.device.type != 'cpu' and pixels.dtype == np.uint8 else None
        return DTYPES.get(self.precision)

    def _enlarge(self, x: torch.Tensor) -> torch.Tensor:
        return imresize(x, self.scale).clamp_(0, 1) if self.scale > 1 else x

    def _colors(self, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        if x.shape[1] == self.channels:
            return self._network(x, dtype)
        if self.channels == 3:
            return self._network(x.expand(-1, 3, -1, -1), dtype).mean(1, keepdim=True)
        luma = (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        # what changes Y alone changes all three colours alike
        change = self._network(luma, dtype) - self._enlarge(luma)
        return (self._enlarge(x) + change).clamp_(0, 1)

    def _network(self, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            out = restore(self.net, x, ensemble=self.ensemble, device=self.device)
        if out.isfinite().all():
            return out
        if dtype is None:
            raise ValueError('the model returns numbers that are not finite: its weights are damaged')
        if not self.warned:
            logger.warning('%s overflows in this model; such pieces are computed again in fp32', dtype)
            self.warned = True
        return self._network(x, None)


def _load(facts: RestorerFacts) -> torch.nn.Module:
    """Build a model with its weights, or say which model the file is of."""
    if facts.checkpoint is None:
        try:
            return create_restorer(facts.name, pretrained=True)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f'{error}\nA file that you have is given by --checkpoint FILE.') from error
    net = create_restorer(facts.name, **facts.arguments)
    try:
        load_weights(net, facts.checkpoint)
    except CheckpointError as error:
        found = find_restorer(facts.checkpoint) if '://' not in facts.checkpoint else None
        if found is None:
            raise
        raise CheckpointError(f'{facts.checkpoint} holds weights of {found}, not of {facts.name}: give --model '
                              f'{found}, or leave --model out') from error
    return net


class _Job(NamedTuple):
    """What the pictures of one run share."""
    restorer: Restorer
    args: argparse.Namespace
    out: Path
    inputs: set[Path]
    taken: set[Path]
    name: UniqueNames

    def target(self, source: Path, suffix: str) -> Path:
        """Where a result goes: to no input and to no other result."""
        while True:
            path = self.out / f'{self.name(source)}_restored{suffix}'
            if path.resolve() not in self.inputs | self.taken:
                self.taken.add(path.resolve())
                return path


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory is used up."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or 'memory' in str(error)


def _picture(job: _Job, path: Path, progress: Progress) -> _Found:
    picture = read_picture(path, job.args.max_megapixels)
    pixels = job.restorer.restore(picture.pixels, progress)
    kind = choose_format(picture, job.args.format)
    target = job.target(path, kind.suffix)
    write_picture(picture._replace(pixels=pixels), target, kind, job.args.quality)
    if job.args.compare:
        before_after = compare(picture.pixels, pixels, job.restorer.scale)
        beside = target.with_name(f'{target.stem.removesuffix("_restored")}_compare.png')
        write_picture(Picture(before_after, icc=picture.icc), beside, FORMATS['png'])
    height, width = picture.pixels.shape[:2]
    found = {'restored': str(target), 'width': pixels.shape[1], 'height': pixels.shape[0]}
    return found, f'{width} x {height} -> {pixels.shape[1]} x {pixels.shape[0]} pixels, {target}'


def _video(job: _Job, path: Path, progress: Progress) -> _Found:
    video = VideoFrames(path)
    width, height = video.size
    pieces = job.restorer.count(height, width)
    target = job.target(path, '.mp4')
    scale = job.restorer.scale
    job.out.mkdir(parents=True, exist_ok=True)
    with VideoSink(target, video.rate, (scale * width, scale * height)) as sink:
        for number, frame in enumerate(video):
            done, total = number * pieces, max(video.length or 0, number + 1) * pieces
            out = job.restorer.restore(np.ascontiguousarray(frame[..., ::-1]),
                                       lambda piece, _, done=done, total=total: progress(done + piece, total))
            sink.write(out[..., ::-1])
    logger.info('%s: sound is not copied', sink.path)
    found = {'restored': str(sink.path), 'width': scale * width, 'height': scale * height, 'frames': sink.frames}
    return found, f'{sink.frames} frames, {width} x {height} -> {scale * width} x {scale * height} pixels, {sink.path}'


def enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Enlarges a picture bicubically.

    Args:
        pixels: (H, W, C), uint8 or uint16.
        scale: s.

    Returns:
        (s H, s W, C), of the same type.
    """
    if scale == 1:
        return pixels
    limit = np.iinfo(pixels.dtype).max
    large = imresize(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / limit, scale).clamp(0, 1)
    return large.permute(1, 2, 0).mul(limit).round().numpy().astype(pixels.dtype)


def compare(before: np.ndarray, after: np.ndarray, scale: int) -> np.ndarray:
    """Puts the middle of a picture before and after restoration side by side, at the result's resolution.

    Args:
        before: (H, W, C).
        after: (s H, s W, C), of the same type.
        scale: s.

    Returns:
        (h, 2 w + 4, C), at most 960 pixels high and 1924 wide; the old picture is enlarged bicubically.
    """
    limit = np.iinfo(before.dtype).max
    height, width = (min(side, max(1, COMPARE_SIDE // scale)) for side in before.shape[:2])
    top, left = (before.shape[0] - height) // 2, (before.shape[1] - width) // 2
    left_side = enlarge(before[top:top + height, left:left + width], scale)
    new = after[scale * top:scale * (top + height), scale * left:scale * (left + width)]
    return np.concatenate([left_side, np.full((len(new), 4, new.shape[2]), limit, new.dtype), new], axis=1)


def _without_results(paths: Sequence[Path], named: Sequence[str], out: Path) -> list[Path]:
    """Leave out the results of an earlier run that lie in a searched folder."""
    given = {Path(path).resolve() for path in named}
    kept = [path for path in paths if path.resolve() in given or out.resolve() != path.resolve().parent
            or not path.stem.endswith(('_restored', '_compare'))]
    if len(kept) < len(paths):
        logger.info('%d results of an earlier run in %s are left out', len(paths) - len(kept), out)
    return kept


def _attempt(
        work: Callable[[_Job, Path, Progress], _Found],
        job: _Job,
        path: Path,
        number: str,
        report: Report,
) -> str | None:
    """Restore one file; returns why that failed, or None."""
    with tqdm(desc=f'{number}{path.name}', unit='tile', disable=None, dynamic_ncols=True, leave=False) as bar:
        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            found, text = work(job, path, progress)
        except READ_ERRORS as error:
            return str(error).removeprefix(f'{path} ').removeprefix(f'{path}: ') or type(error).__name__
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return f'not enough memory with --tile {job.restorer.tile}: take a smaller one'
    report.say({'path': str(path), **found}, f'{path}: {text}')
    return None


def run_restoration(
        args: argparse.Namespace,
        facts: RestorerFacts,
        paths: Sequence[Path],
        device: str,
        report: Report,
        unread: Sequence[OSError] = (),
) -> int:
    """Restores pictures and videos as the options of `tools/predict.py` say; one that fails does not stop the others.

    Args:
        args: The options.
        facts: What is known about the model.
        paths: Pictures and videos.
        device: Where to compute.
        report: Takes what is found.
        unread: Errors of folders that could not be searched; they are listed with the files that failed.

    Returns:
        How many files were restored.
    """
    if not 1 <= args.quality <= 100:
        raise ValueError(f'--quality is {args.quality}; it must be 1 to 100')
    out = Path(args.out)
    check_folder(out, f'--out {out}')
    paths = _without_results(paths, args.images, out)
    restorer = Restorer(facts, device, args.tile, args.overlap, args.self_ensemble, args.precision)
    if restorer.channels == 1:
        logger.info('%s is a model of gray pictures; of colours it restores the brightness alone', facts.name)
    job = _Job(restorer, args, out, {path.resolve() for path in paths}, set(), UniqueNames())
    failed = {str(error.filename): str(error.strerror) for error in unread}
    for folder, problem in failed.items():
        report.fail(folder, problem)
    done = 0
    for number, path in enumerate(paths, 1):
        reason = _attempt(_video if is_video(path) else _picture, job, path,
                          f'{number}/{len(paths)} ' if len(paths) > 1 else '', report)
        if reason is None:
            done += 1
        else:
            failed[str(path)] = reason
            logger.warning('not restored: %s: %s', path, reason)
            report.fail(path, reason)
    if done and failed:
        logger.warning('%d of %d files were not restored:\n  %s', len(failed), done + len(failed),
                       '\n  '.join(f'{path}: {reason}' for path, reason in failed.items()))
    if done:
        sys.stdout.write(f'restored: {out}\n')
    return done
