"""Evaluation of detectors and segmentors: options of the tool, exact scores, and tables of them."""
import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config

from .check import ConfigError
from .scopes import find_class, headlines
from .visuals import write_json

__all__ = ['apply_options', 'format_scores', 'move_data', 'record_scores', 'report', 'summary', 'without_pretraining']

VISUALIZERS = {'mmdet': 'DetLocalVisualizer', 'mmseg': 'SegLocalVisualizer'}
MAX_CLASSES = 200


def without_pretraining(model: Any) -> None:
    """Takes pretrained weights out of a model's config: a checkpoint follows, so nothing is to be fetched.

    Args:
        model: The config; changed in place.
    """
    for part in model if isinstance(model, list | tuple) else ():
        without_pretraining(part)
    if isinstance(model, dict):
        model.pop('pretrained', None)
        for part in model.values():
            without_pretraining(part)


def _sections(value: Any, key: str) -> Iterator[dict]:
    """All dictionaries in a config that have a key."""
    for part in value if isinstance(value, list | tuple) else value.values() if isinstance(value, Mapping) else ():
        yield from _sections(part, key)
    if isinstance(value, dict) and key in value:
        yield value


def move_data(cfg: Config, root: str) -> None:
    """Puts a data set's root in the place of the config's, in the evaluator too.

    Args:
        cfg: Config of a test; changed in place.
        root: The folder.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f'--data {root} is no folder')
    found = [section for section in _sections(cfg.test_dataloader.dataset, 'data_root') if section['data_root']]
    if not found:
        raise ConfigError('--data stands for the data_root of the test data, and the config has none; set its files by '
                          '--cfg-options test_dataloader.dataset.ann_file=...')
    old = {str(section['data_root']) for section in found}
    for section in found:
        section['data_root'] = root
    for section in _sections(cfg.test_evaluator, 'ann_file'):
        for place in old:
            if section['ann_file'] and str(section['ann_file']).startswith(place):
                section['ann_file'] = str(Path(root, section['ann_file'][len(place):].lstrip('/')))


def _augment(cfg: Config) -> None:
    missing = [key for key in ('tta_model', 'tta_pipeline') if cfg.get(key) is None]
    if missing:
        raise ConfigError(f'--tta needs {" and ".join(missing)} in the config: the model that merges the predictions '
                          'for the augmented pictures, and the pipeline that makes these (see docs/training.md)')
    cfg.model = {**cfg.tta_model, 'module': cfg.model}
    for section in _sections(cfg.test_dataloader.dataset, 'pipeline'):
        section['pipeline'] = cfg.tta_pipeline


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Sets up the evaluation of a detector or segmentor.

    Args:
        cfg: The config of the test; changed in place.
        args: Options of `evaluate.parse`.
    """
    if args.data:
        move_data(cfg, args.data)
    if args.tta:
        _augment(cfg)
    if args.show_dir:
        cfg.custom_hooks.append({'type': 'visionssm.OverlayHook', 'folder': args.show_dir, 'score_thr': args.score_thr})
        cfg.visualizer = cfg.get('visualizer') or {'type': VISUALIZERS[cfg.default_scope]}
    prefix = str(result_file(args, cfg).with_suffix(''))
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list | tuple) else [cfg.test_evaluator]
    for evaluator in evaluators:
        kind = find_class(evaluator.get('type'), cfg.default_scope, 'METRICS')
        if any(base.__name__ == 'CocoMetric' for base in getattr(kind, '__mro__', ())):
            evaluator.setdefault('outfile_prefix', prefix)
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)


def result_file(args: argparse.Namespace, cfg: Config) -> Path:
    """The JSON file of the results."""
    return Path(args.out) if args.out else Path(cfg.work_dir, 'results.json')


@contextmanager
def record_scores(scope: str) -> Iterator[dict[str, Any]]:
    """Collects the exact scores, also of each class, of the evaluations that run while the context lasts.

    Args:
        scope: Scope of the config.

    Yields:
        `bbox` and `segm`, as `detection.scores.coco_scores` returns them, and `iou`, a list of
            `dict(class, IoU, Acc, ...)` in per cent.
    """
    if scope == 'mmdet':
        from .detection.scores import record_coco
        with record_coco() as scores:
            yield scores
    elif scope == 'mmseg':
        from .segmentation.scores import record_iou
        with record_iou() as scores:
            yield scores
    else:
        yield {}


def summary(values: Mapping[str, float], scores: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that sum up an evaluation, exact where they are known.

    Args:
        values: What the evaluator returned.
        scores: What :func:`record_scores` collected.

    Returns:
        Name to value in per cent.
    """
    exact = {f'{kind} AP': scores[kind]['AP'] for kind in ('bbox', 'segm') if kind in scores}
    found = {name: exact.get(name, value) for name, value in headlines(values).items()}
    return {name: float('nan') if value is None else value for name, value in found.items()}


def _cell(value: Any, width: int) -> str:
    text = '-' if value is None or value != value else f'{value:.2f}' if isinstance(value, float) else str(value)
    return text.rjust(width)


def format_scores(rows: list[dict[str, Any]], title: str) -> str:
    """Lays out scores as text.

    Args:
        rows: One a class, the last one for all; each with its name under `class`.
        title: Heads the first column.

    Returns:
        The table.
    """
    keys = [key for key in rows[-1] if key != 'class']
    note = ''
    if len(rows) > MAX_CLASSES + 1:
        note = f'({len(rows) - 1} classes; the JSON file has them)\n'
        rows = rows[-1:]
    width = max(len(title), *(len(str(row['class'])) for row in rows))
    head = f'{title:<{width}}' + ''.join(f'  {key:>7}' for key in keys)
    lines = [f'{row["class"]:<{width}}' + ''.join(f'  {_cell(row.get(key), max(7, len(key)))}' for key in keys)
             for row in rows]
    rule = '-' * len(head)
    return '\n'.join([note + head, rule, *lines[:-1], *([rule] if len(lines) > 1 else []), lines[-1]])


def _tables(values: Mapping[str, float], scores: Mapping[str, Any]) -> Iterator[str]:
    for kind in ('bbox', 'segm'):
        if kind in scores:
            whole = {key: value for key, value in scores[kind].items() if key != 'classes'}
            rows = scores[kind]['classes']
            yield format_scores([*rows, {'class': 'all', 'count': sum(row['count'] for row in rows), **whole}], kind)
    if 'iou' in scores:
        whole = {key.removeprefix('m'): float(value) for key, value in values.items() if key.startswith('m')}
        yield format_scores([*scores['iou'], {'class': 'mean', **whole}], 'class')
    if 'sets' in scores:
        keys = [key for key in scores['sets'][0] if key not in ('class', 'images')]
        mean = {'class': 'mean', 'images': sum(row['images'] for row in scores['sets']),
                **{key: values[key] for key in keys}}
        # papers give SSIM and LPIPS with four digits
        yield format_scores([{**row, **{key: f'{row[key]:.4f}' for key in keys if not key.endswith('PSNR')}}
                             for row in (*scores['sets'], mean)], 'data set')
    if not scores and values:
        yield format_scores([{'class': key, 'value': float(value)} for key, value in values.items()], 'metric')


def report(cfg: Config, args: argparse.Namespace, values: Mapping[str, float], scores: Mapping[str, Any]) -> dict:
    """Prints the tables and the numbers that sum them up, and writes the results.

    Args:
        cfg: Config of the test.
        args: Options of `evaluate.parse`.
        values: What the evaluator returned.
        scores: What :func:`record_scores` collected.

    Returns:
        The results as they are in the JSON file.
    """
    found = summary(values, scores)
    out = result_file(args, cfg)
    files = {kind: str(path) for kind in ('bbox', 'segm')
             if (path := out.with_suffix(f'.{kind}.json')).is_file() and kind in scores}
    results = {'config': args.config, 'checkpoint': args.checkpoint, 'tta': args.tta, 'test_cfg': dict(cfg.test_cfg),
               'summary': found,
               'metrics': {key: float(value) for key, value in values.items()}, **scores, 'predictions': files}
    write_json(results, out)
    lines = [*_tables(values, scores), f'results: {out}']
    lines += [f'predictions: {path}' for path in files.values()]
    if args.show_dir:
        lines.append(f'pictures: {args.show_dir}')
    sys.stdout.write('\n'.join([*lines, *(f'{name}: {value:.2f}' for name, value in found.items())]) + '\n')
    return results
