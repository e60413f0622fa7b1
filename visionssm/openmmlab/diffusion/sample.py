"""Sampling from a trained model: pictures that depend on seed, class and number alone, whatever the batch is."""
import argparse
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from PIL import Image
from torch import nn
from tqdm import tqdm

from ...checkpoints import CheckpointError
from ...checkpoints.load import read_metadata
from ...registry import DATASETS, MODELS
from ...utils.command import Command, check_folder
from ...utils.files import atomic_write
from ...utils.reporting import Report
from ...utils.suggest import did_you_mean
from ..check import ConfigError
from ..checkpoint import load_any_weights
from ..cli import _OptionsAction, load_config
from ..data import batches
from ..facts import describe_dense
from .latents import check_settings, load_autoencoder, weights_digest

__all__ = ['Job', 'draw', 'make_pipeline', 'sample', 'save_png', 'to_grid']

Job = tuple[int | None, int]
"""A class, None for a model without, and the number of the picture within it."""
# pictures of one class before the numbers of the next one begin
PER_CLASS = 2 ** 32
# more are no picture to look at, and all are kept in memory
GRID_LIMIT = 10_000
DRAWN_NAME = re.compile(r'(?:(\d{4,})_)?(\d{5,})\.png')


def make_pipeline(model: nn.Module, sampler: str = 'ddpm', steps: int | str | None = 250, clip: bool = False) -> Any:
    """Make the pipeline that draws with a model of the engine.

    Args:
        model: A `DiffusionModel`.
        sampler: 'ddpm', 'ddim' or 'dpmsolver++'.
        steps: Steps, or their respacing.
        clip: Keep the clean image within [-1, 1] at every step.

    Returns:
        A `visionssm.diffusion.DiSPipeline`.
    """
    # diffusers is needed for sampling only
    from ...diffusion import DiSPipeline, make_scheduler
    scheduler = make_scheduler(sampler, model.process, steps, clip)
    vae = None
    if model.vae is not None:
        vae = load_autoencoder(model.vae, next(model.parameters()).device)
        scale = getattr(model.data_preprocessor, 'scale', None)
        if vae.config.latent_channels != model.model.in_chans or scale != vae.config.scaling_factor:
            raise ConfigError(
                f'the autoencoder {model.vae!r} has latents of {vae.config.latent_channels} channels, scaled by '
                f'{vae.config.scaling_factor}, and the model was trained for {model.model.in_chans} channels, scaled '
                f'by {scale}; set model.vae, or model.data_preprocessor.scale before a training')
    pipe = DiSPipeline(model.model, scheduler, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
        pipe: Any,
        jobs: Sequence[Job],
        seed: int = 0,
        guidance_scale: float = 1.5,
        eta: float = 0.0,
) -> list[Image.Image]:
    """Draw the pictures of a batch.

    Args:
        pipe: Of `make_pipeline`.
        jobs: What to draw.
        seed: Of the noise; a picture depends on it, its class and its number.
        guidance_scale: Strength of the guidance; 1 is none.
        eta: Noise of DDIM.

    Returns:
        The pictures.
    """
    from ...diffusion import image_generators
    labels = [label for label, _ in jobs if label is not None]
    numbers = [number + PER_CLASS * (0 if label is None else label + 1) for label, number in jobs]
    return pipe(
        labels or None, None, guidance_scale, image_generators(seed, numbers), len(jobs), eta=eta).images


def to_grid(pictures: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Lay out pictures of one size, row by row.

    Args:
        pictures: The pictures.
        columns: Pictures a row.
        gap: Pixels between them.

    Returns:
        One picture.
    """
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    grid = Image.new(pictures[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), 'white')
    for place, picture in enumerate(pictures):
        grid.paste(picture, (place % columns * (width + gap), place // columns * (height + gap)))
    return grid


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='the config of its training')
    parser.add_argument('checkpoint', help='weights: of a training here, safetensors, or official ones')
    parser.add_argument('--classes', nargs='+', help='classes by number or name (default: all)')
    parser.add_argument('--num', type=int, default=8, help='pictures of each class')
    parser.add_argument('--sampler', default='ddpm', choices=['ddpm', 'ddim', 'dpmsolver++'])
    parser.add_argument('--steps', type=int, default=250, help='steps of the sampler')
    parser.add_argument('--cfg-scale', type=float, help='strength of the guidance by the class, 1 for none (default: '
                                                        '1.5, 1 for a model without classes)')
    parser.add_argument('--eta', type=float, default=0.0, help='noise of DDIM, from 0 to 1')
    parser.add_argument('--clip', action='store_true', help='keep the estimate of the picture in range at every step')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--batch-size', type=int, default=32, help='pictures at a time; other numbers may change the '
                                                                    'last bit of a pixel')
    parser.add_argument('--out', default='samples', help='a folder for single files, where a second run goes on, or a '
                                                         'file NAME.png for one grid')
    parser.add_argument('--cfg-options', nargs='+', action=_OptionsAction, default={}, metavar='KEY=VALUE')
    parser.add_argument('--device', help='where to compute (default: an accelerator where there is one)')
    parser.add_argument('--json', action='store_true', help='write the results as JSON, and nothing else, to the '
                                                            'standard output')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)


def _names(cfg: Config, checkpoint: str) -> tuple[str, ...]:
    """Names of the classes: what the checkpoint says, else the config, else the class of its data set."""
    data = (cfg.get('train_dataloader') or {}).get('dataset') or {}
    kind = data.get('type')
    found = getattr(DATASETS.get(kind) if isinstance(kind, str) else kind, 'METAINFO', {})
    meta = {**found, **(data.get('metainfo') or {}), **describe_dense(checkpoint).dataset_meta}
    return tuple(meta.get('classes') or ())


def _check_process(model: nn.Module, checkpoint: str) -> None:
    """Refuse weights that were trained with another process: what they draw would be noise."""
    trained = json.loads(read_metadata(checkpoint).get('config', '{}')).get('process')
    for key, default in (('steps', 1000), ('schedule', 'linear'), ('prediction_type', 'epsilon')):
        here, there = model.process_options.get(key, default), (trained or {}).get(key, default)
        if trained is not None and here != there:
            raise ConfigError(f'{checkpoint} was trained with model.process.{key}={there} and the config has {here}; '
                              f'add --cfg-options model.process.{key}={there}, or give the config of its training')


def _load(args: argparse.Namespace) -> tuple[nn.Module, tuple[str, ...], Config]:
    """Return the model with its weights, the names of its classes as far as they are known, and the config."""
    cfg = load_config(args)
    if not isinstance(cfg.get('model'), Mapping):
        raise ConfigError(f'{args.config} is not the config of a diffusion model; model is {cfg.get("model")!r}')
    if '://' not in args.checkpoint and not Path(args.checkpoint).is_file():
        raise CheckpointError(f'{args.checkpoint} does not exist')
    with DefaultScope.overwrite_default_scope('visionssm'):
        import_modules_from_strings(**cfg.get('custom_imports', {'imports': []}))
        model = MODELS.build(cfg.model)
        if not hasattr(model, 'process'):
            raise ConfigError(f'{args.config} is not the config of a diffusion model; model.type is '
                              f'{cfg.model.get("type")}')
        names = _names(cfg, args.checkpoint)
    load_any_weights(model, args.checkpoint)
    _check_process(model, args.checkpoint)
    return model.to(args.device or get_device()).eval(), names, cfg


def _classes(given: Sequence[str] | None, count: int, names: Sequence[str]) -> list[int | None]:
    if count == 0:
        if given:
            raise ValueError(f'--classes {" ".join(given)}: the model was trained without classes')
        return [None]
    found: list[int | None] = []
    for text in given or map(str, range(count)):
        label = names.index(text) if text in names else int(text) if text.isdecimal() else -1
        if not 0 <= label < count:
            near = '' if text.isdecimal() else did_you_mean(text, names) if names else (
                'Neither the checkpoint nor the config names them.')
            raise ValueError(f'--classes {text}: the model has the classes 0 to {count - 1}. {near}'.rstrip())
        found.append(label)
    return list(dict.fromkeys(found))


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture so that the file is either complete or untouched."""
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG')
    atomic_write(buffer.getbuffer(), path)


def _file(folder: Path, job: Job) -> Path:
    label, number = job
    return folder / (f'{number:05d}.png' if label is None else f'{label:04d}_{number:05d}.png')


def _finished(folder: Path, classes: Sequence[int | None], num: int) -> set[Job]:
    """Jobs whose files are there; those appear whole or not at all, so only an empty one is of another origin."""
    found: set[Job] = set()
    for path in folder.glob('*.png'):
        name = DRAWN_NAME.fullmatch(path.name)
        if name and path.is_file() and path.stat().st_size:
            job = (None if name[1] is None else int(name[1]), int(name[2]))
            if job[0] in classes and job[1] < num and _file(folder, job) == path:
                found.add(job)
    return found


def _check_request(args: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the model is."""
    for name in ('num', 'steps', 'batch_size'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name.replace("_", "-")} is {getattr(args, name)}; it must be at least 1')
    if args.num > PER_CLASS:
        raise ValueError(f'--num is {args.num}; the most is {PER_CLASS}')
    if args.seed < 0:
        raise ValueError(f'--seed is {args.seed}; it must be at least 0')
    if not 0 <= args.eta <= 1:
        raise ValueError(f'--eta is {args.eta}; it must be from 0 to 1')
    if args.cfg_scale is not None and not math.isfinite(args.cfg_scale):
        raise ValueError(f'--cfg-scale is {args.cfg_scale}; it must be finite')


def _check_out(text: str) -> None:
    """Refuse a place that cannot be written, before hours of drawing."""
    if not text.strip():
        raise ValueError('--out is empty; give a folder, or a file NAME.png for one grid')
    out = Path(text).absolute()
    suffix = out.suffix.lower()
    if suffix == '.png' and out.is_dir():
        raise ValueError(f'--out {text} is a folder, and the name is that of a grid; give another name')
    if suffix != '.png' and suffix in Image.registered_extensions() and not out.is_dir():
        raise ValueError(f'--out {text}: a grid is written as PNG; give {Path(text).with_suffix(".png")}, or a folder '
                         'for single files')
    check_folder(out.parent if suffix == '.png' else out, f'--out {text}')


def _draw_all(args: argparse.Namespace, report: Report) -> int:
    _check_request(args)
    _check_out(args.out)
    model, names, cfg = _load(args)
    count = model.model.num_classes
    scale = args.cfg_scale if args.cfg_scale is not None else (1.5 if count else 1.0)
    if not count and scale != 1:
        raise ValueError(f'--cfg-scale {scale}: the model was trained without classes and cannot be guided; leave the '
                         'option out')
    classes = _classes(args.classes, count, names)
    out, total = Path(args.out), len(classes) * args.num
    single = out.suffix.lower() != '.png'
    if not single and total > GRID_LIMIT:
        raise ValueError(f'--out {out}: a grid of {total} pictures; the most is {GRID_LIMIT}, give a folder')
    pipe = make_pipeline(model, args.sampler, args.steps, args.clip)
    finished: set[Job] = set()
    if single:
        check_settings(out, {
            'model': cfg.model.to_dict(), 'weights': weights_digest(model.model), 'sampler': args.sampler,
            'steps': args.steps, 'cfg_scale': scale, 'eta': args.eta, 'clip': args.clip, 'seed': args.seed,
        }, {'config': args.config, 'checkpoint': args.checkpoint})
        finished = _finished(out, classes, args.num)
    # not a list: a number without an end in sight is asked for and stopped when there are enough
    todo = (job for label in classes for number in range(args.num) if (job := (label, number)) not in finished)
    pictures: list[Image.Image] = []
    with tqdm(total=total, initial=len(finished), unit='picture', disable=None, dynamic_ncols=True) as bar:
        for batch in batches(todo, args.batch_size):
            drawn = draw(pipe, batch, args.seed, scale, args.eta)
            if single:
                for job, picture in zip(batch, drawn, strict=True):
                    save_png(picture, _file(out, job))
            else:
                pictures += drawn
            bar.update(len(batch))
    if not single:
        save_png(to_grid(pictures, args.num), out)
    report.say({'drawn': total - len(finished), 'pictures': total, 'out': str(out)},
               f'{total - len(finished)} of {total} pictures drawn: {out}')
    return 0


@torch.inference_mode()
def _sample(args: argparse.Namespace) -> int:
    with Report(args.json) as report:
        return _draw_all(args, report)


# a device that cannot be used or runs out of memory raises a RuntimeError
sample = Command('Draw pictures with a diffusion model.', _add_options, _sample,
                 errors=(ImportError, OSError, RuntimeError, ValueError), stopped='stopped; the same command goes on')
