"""The command line of training: options and the config that they make."""
import argparse
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.registry import DefaultScope

from ..checkpoints import CheckpointError
from ..utils.command import Command
from ..utils.paths import config_root
from .check import ConfigError, check_config, check_overrides, optimizer_sections
from .data import UnreadableImagesError
from .evaluate_dense import record_scores, summary
from .hooks import NonFiniteError
from .runner import VisionRunner
from .scopes import check_installed, explain_import_error, find_any_config

USER_ERRORS = (CheckpointError, ConfigError, NonFiniteError, OSError, UnreadableImagesError, ValueError)


class _OptionsAction(DictAction):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes KEY=VALUE, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def add_common_options(parser: argparse.ArgumentParser, config_nargs: str | None = None) -> None:
    """Options that training and evaluation share.

    Args:
        parser: The parser to add them to.
        config_nargs: '?' where there may be no config.
    """
    parser.add_argument('config', nargs=config_nargs,
                        help="a config file, the name of one that comes with the package, or of another package's as "
                             'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/CONFIG)')
    parser.add_argument('--cfg-options', nargs='+', action=_OptionsAction, default={}, metavar='KEY=VALUE',
                        help='override keys of the config, as in model.model.name=vim_tiny train_cfg.max_epochs=10')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='what started the processes of a distributed run')
    # older launchers pass the local rank as an option, newer ones in the environment
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from a checkpoint; without a value, from the newest whole one in the work '
                             'directory')
    parser.add_argument('--amp', nargs='?', const='bf16', choices=['bf16', 'fp16'],
                        help='mixed precision (default: bf16; fp16 needs a GPU)')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate by batch size / auto_scale_lr.base_batch_size')
    parser.add_argument('--seed', type=int, help="seed of the run (default: the config's)")


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the common options name, with its overrides.

    Args:
        args: Options of :func:`add_common_options`.

    Returns:
        The config.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    # so that a config anywhere can build on ours: _base_ = '{{$VISIONSSM_CONFIGS:configs}}/classification/...'
    os.environ.setdefault('VISIONSSM_CONFIGS', str(config_root()))
    path = find_any_config(args.config)
    try:
        cfg = Config.fromfile(str(path))
    except SyntaxError as error:
        raise ConfigError(f'{path} is no Python: {error}') from error
    except ImportError as error:
        raise explain_import_error(error, path) from error
    check_overrides(args.cfg_options)
    cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.setdefault('default_scope', 'visionssm')
    check_installed(cfg.default_scope)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / path.stem)
    return cfg


def train_config(args: argparse.Namespace) -> Config:
    """The config of a training run.

    Args:
        args: Options of `train.parse`.

    Returns:
        The checked config.
    """
    cfg = load_config(args)
    if args.seed is not None:
        cfg.randomness = {**cfg.get('randomness', {}), 'seed': args.seed}
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.amp:
        for place, section in optimizer_sections(cfg.optim_wrapper).items():
            kind = section.get('type', 'OptimWrapper')
            if str(kind).removeprefix('visionssm.') not in ('OptimWrapper', 'AmpOptimWrapper'):
                raise ConfigError(f'--amp cannot replace {place}.type={kind!r}; it stands for AmpOptimWrapper')
            # the bare name means MMEngine's, which refuses to run without a GPU, in configs of other scopes
            prefix = '' if cfg.default_scope == 'visionssm' else 'visionssm.'
            section.update(type=f'{prefix}AmpOptimWrapper', dtype={'bf16': 'bfloat16', 'fp16': 'float16'}[args.amp])
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ConfigError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=N) in the config: the batch '
                              'size that its learning rate is meant for')
        cfg.auto_scale_lr.enable = True
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        check_config(cfg)
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if cfg.get(key) is None:
            raise ConfigError(f'The config lacks the key {key!r}, which training needs')
    return cfg


def _train(args: argparse.Namespace) -> int:
    cfg = train_config(args)
    runner = VisionRunner.from_cfg(cfg)
    with record_scores(cfg.default_scope) as scores:
        runner.train()
    found = summary({key: buffer.current() for key, buffer in runner.message_hub.log_scalars.items()
                     if key.startswith('val/')}, scores)
    if is_main_process() and found:
        from .visuals import save_curves
        save_curves(runner.work_dir)
        # not through the logger: other programs read these lines
        print('\n'.join(f'{name}: {value:.2f}' for name, value in found.items()), flush=True)  # noqa: T201
    return 0


# ends with a line such as `top-1: NN.NN` or `mIoU: NN.NN` where the config evaluates
train = Command('Train a model as a config says.', _add_train_options, _train, errors=USER_ERRORS,
                stopped='stopped; the same command with --resume goes on from the last checkpoint')
