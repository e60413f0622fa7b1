"""Evaluation: of a model by a config, or of any classifier by its name on a folder of images."""
import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.registry import DefaultScope

from ..utils.command import Command
from ..utils.reporting import Report
from ..utils.suggest import did_you_mean
from .check import ConfigError, check_config
from .cli import USER_ERRORS, add_common_options, load_config
from .evaluate_dense import apply_options, move_data, record_scores, report, without_pretraining
from .facts import describe_checkpoint
from .metrics import Accuracy
from .runner import VisionRunner
from .scopes import EXTRAS
from .visuals import write_json

__all__ = ['evaluate', 'format_table', 'model_config', 'test_config']

logger = logging.getLogger('visionssm')

TRAINING_KEYS = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg',
                 'val_evaluator', 'auto_scale_lr')


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, config_nargs='?')
    parser.add_argument('checkpoint', nargs='?', help='weights: of a training here, safetensors, published ones, or '
                                                      'visionssm://NAME (default with --model: its published weights)')
    parser.add_argument('--model', help='name of a model of timm or visionssm, instead of a config')
    parser.add_argument('--data', help='folder of images, or root of the data set; replaces that of the config')
    parser.add_argument('--out', help='JSON file for the results (default: accuracy.json or results.json in the work '
                                      'directory)')
    parser.add_argument('--json', action='store_true', help='write the results as JSON, and nothing else, to the '
                                                            'standard output')
    parser.add_argument('--show-dir', help='folder for pictures of ground truth and prediction (detection and '
                                           'segmentation)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='lowest score of the detections in these pictures')
    parser.add_argument('--tta', action='store_true', help="test-time augmentation by the config's tta_model and "
                                                           'tta_pipeline (detection and segmentation)')
    parser.add_argument('--batch-size', type=int, help="images at a time (default: the config's)")
    parser.add_argument('--amp', nargs='?', const='bf16', choices=['bf16', 'fp16'], help='mixed precision')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.model is None:
        if args.checkpoint is None:
            parser.error('give CONFIG and CHECKPOINT, or --model NAME --data FOLDER')
        return
    if args.data is None:
        parser.error('--model needs --data FOLDER')
    if args.checkpoint is not None:
        parser.error(f'--model stands for the config {args.config}; give one of the two')
    if args.cfg_options or args.launcher != 'none':
        parser.error('--cfg-options and --launcher need a config, and --model takes none')
    args.config, args.checkpoint = None, args.config


def model_config(name: str, data: str, checkpoint: str | None = None) -> Config:
    """The config that evaluates a model on a folder of class folders with the model's own preprocessing.

    Args:
        name: Model name.
        data: Folder `<data>/<class>/<image>` or `<data>/val/<class>/<image>`. The folders are the classes that the
            checkpoint names; without names and for a model of 1000 classes they are ImageNet's synsets in the official
            order; otherwise sorted folder names.
        checkpoint: Weights, which also say the number of classes and channels; None takes the published ones.

    Returns:
        The config, without a work dir.
    """
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name.split('.')[0]) else None
    if cfg is None:
        raise ValueError(f'unknown model {name!r}. {did_you_mean(name.split(".")[0], timm.list_models())} '
                         'See timm.list_models().')
    facts = describe_checkpoint(checkpoint, name)
    pre = facts.data_config(cfg.to_dict())
    transform = {'type': 'TimmTransform', **{key: pre[key] for key in
                                             ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')}}
    imagenet = facts.arguments.get('num_classes', cfg.num_classes) == 1000
    dataset = {'type': 'TimmDataset', 'root': data, 'split': 'val', 'transform': transform,
               'mode': 'L' if pre['input_size'][0] == 1 else 'RGB',
               'class_map': list(facts.classes) or ('imagenet-1k' if imagenet else None)}
    return Config({
        'default_scope': 'visionssm',
        'model': {'type': 'ImageClassifier',
                  'model': {'name': name, 'pretrained': checkpoint is None, **facts.arguments},
                  'data_preprocessor': {'mean': pre['mean'], 'std': pre['std']}},
        'test_dataloader': {'batch_size': 64, 'num_workers': min(4, os.cpu_count() or 1), 'dataset': dataset,
                            'sampler': {'type': 'SeededSampler', 'shuffle': False},
                            'collate_fn': {'type': 'collate_images'}},
        'test_evaluator': {'type': 'Accuracy', 'topk': (1, 5)},
        'test_cfg': {},
    })


def test_config(args: argparse.Namespace) -> Config:
    """The config of an evaluation: nothing of the training is left in it.

    Args:
        args: Options of `evaluate.parse`.

    Returns:
        The checked config.
    """
    if args.model:
        cfg = model_config(args.model, args.data, args.checkpoint)
        cfg.work_dir = args.work_dir or str(Path('work_dirs', args.model, 'test'))
    else:
        cfg = load_config(args)
        if args.work_dir is None:
            cfg.work_dir = str(Path(cfg.work_dir) / 'test')
        for key in ('model', 'test_dataloader', 'test_evaluator', 'test_cfg'):
            if cfg.get(key) is None:
                raise ConfigError(f'The config lacks the key {key!r}, which evaluation needs')
        if not isinstance(cfg.model, Mapping):
            raise ConfigError(f"model is {cfg.model!r}; it must be a dict with a 'type'")
        without_pretraining(cfg.model)
    dense = cfg.default_scope in EXTRAS
    kind = str(cfg.model.get('type')).rpartition('.')[2]
    restores = kind == 'ImageRestorer'
    for option in ('show_dir', 'tta'):
        if getattr(args, option) and not dense:
            raise ConfigError(f'--{option.replace("_", "-")} is for detection and segmentation; {args.config} is of '
                              f'the scope {cfg.default_scope}')
    if args.data and restores:
        move_data(cfg, args.data)
    elif args.data and not dense:
        cfg.test_dataloader.dataset.root = args.data
    if args.batch_size:
        cfg.test_dataloader.batch_size = args.batch_size
    cfg.load_from, cfg.resume = args.checkpoint, False
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        check_config(cfg)
    for key in TRAINING_KEYS:
        cfg.pop(key, None)
    # checkpoints hold the averaged weights where training averaged, so its other hooks have nothing to do here
    cfg.custom_hooks = [] if dense or restores or kind == 'DiffusionModel' else [{'type': 'VisualReportHook'}]
    if dense:
        apply_options(cfg, args)
    return cfg


def format_table(summary: Mapping[str, Any], max_classes: int = 50) -> str:
    """Lays out accuracies as text.

    Args:
        summary: What `metrics.summarise` returns.
        max_classes: With more classes than this only the ten worst are listed.

    Returns:
        One line a class and one for all images.
    """
    keys = [key for key in summary if key.startswith('top')]
    rows = [row for row in summary['classes'] if row['count']]
    note = ''
    if len(rows) > max_classes:
        note = f'(the 10 worst of {len(rows)} classes; the JSON file has all)\n'
        rows = sorted(rows, key=lambda row: row[keys[0]])[:10]
    rows = [*rows, {'class': 'all', **summary}]
    width = max(len('class'), *(len(row['class']) for row in rows))
    head = f'{"class":<{width}}  {"images":>7}' + ''.join(f'  {key.replace("top", "top-"):>7}' for key in keys)
    lines = [f'{row["class"]:<{width}}  {row["count"]:>7}' + ''.join(f'  {row[key]:>7.2f}' for key in keys)
             for row in rows]
    rule = '-' * len(head)
    return '\n'.join([note + head, rule, *lines[:-1], rule, lines[-1]])


def _autocast(name: str | None) -> contextlib.AbstractContextManager:
    if name is None:
        return contextlib.nullcontext()
    return torch.autocast(get_device(), dtype=torch.bfloat16 if name == 'bf16' else torch.float16)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, prints the table and writes the results.

    Args:
        args: Options of `evaluate.parse`.

    Returns:
        The results as they are in the JSON file; empty on processes other than the main one.
    """
    cfg = test_config(args)
    runner = VisionRunner.from_cfg(cfg)
    with _autocast(args.amp), record_scores(cfg.default_scope) as scores:
        values = runner.test()
    if cfg.default_scope in EXTRAS:
        return report(cfg, args, values, scores) if is_main_process() else {}
    metric = next((item for item in runner.test_evaluator.metrics if isinstance(item, Accuracy)), None)
    if not is_main_process():
        return {}
    rows = next((item.rows for item in runner.test_evaluator.metrics if hasattr(item, 'rows')), None)
    if metric is None:
        return report(cfg, args, values, {} if rows is None else {'sets': rows})
    results = {'config': args.config, 'model': dict(runner.cfg.model.model), 'checkpoint': args.checkpoint,
               'metrics': values, **metric.summary}
    dataset = runner.test_dataloader.dataset
    if getattr(dataset, 'num_unreadable', 0):
        logger.warning('%d unreadable images were left out', dataset.num_unreadable)
        results['unreadable'] = dataset.num_unreadable
    out = Path(args.out) if args.out else Path(runner.work_dir, 'accuracy.json')
    write_json(results, out)
    sys.stdout.write(f'{format_table(metric.summary)}\nresults: {out}\ntop-1: {metric.summary["top1"]:.2f}\n')
    return results


def _evaluate(args: argparse.Namespace) -> int:
    with Report(args.json) as output:
        results = run(args)
        if args.json and results:
            output.say(results, '')
    return 0


evaluate = Command('Evaluate a model: CONFIG CHECKPOINT, or, a classifier by its name, --model NAME --data FOLDER '
                   '[CHECKPOINT].', _add_options, _evaluate, _check_options, USER_ERRORS, intermixed=True)
