"""The command line of the export."""
import argparse
import inspect
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._factory import create_model
from ..utils.command import Command, check_folder
from .archive import export_archive, export_onnx, export_weights, need
from .compare import compare_onnx, count_nodes, own_rounding
from .inputs import Inputs, example_inputs

__all__ = ['export']

FORMATS = {'onnx': '.onnx', 'torch-export': '.pt2', 'safetensors': '.safetensors'}
TOLERANCE = 1e-4


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('name', help='name of the model, as in vmamba_tiny or vim_tiny.in1k')
    parser.add_argument('--format', default='onnx', choices=FORMATS)
    parser.add_argument('-o', '--out', help='the file (default: NAME with the suffix of the format)')
    parser.add_argument('--checkpoint', help='weights in a file of any kind that the package reads')
    parser.add_argument('--pretrained', action='store_true', help='the published weights of the name')
    parser.add_argument('--num-classes', type=int, help='classes of the head; 0 leaves the head out')
    parser.add_argument('--size', type=int, nargs='+', metavar='PIXELS', help='height and width of the graph, or one '
                                                                             "number for both (default: the model's)")
    parser.add_argument('--features', action='store_true', help='the feature maps of a backbone, for dense tasks')
    parser.add_argument('--dynamic', action='store_true', help='let the graph take any number of pictures')
    parser.add_argument('--keep-ops', action='store_true', help="torch-export: keep this package's fast ops in the "
                                                                'graph, which then needs the package to be loaded')
    parser.add_argument('--runs', type=int, default=5, help='timed runs of ONNX Runtime and PyTorch; 0 times nothing')
    parser.add_argument('--no-check', action='store_true', help='do not compare the file with the model')
    parser.add_argument('--json', action='store_true', help='print the result as JSON')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.pretrained and args.checkpoint:
        parser.error('--pretrained and --checkpoint exclude each other')
    if args.num_classes is not None and args.num_classes < 0:
        parser.error(f'--num-classes is {args.num_classes}; it must be 0 (no head) or more')
    if args.size is not None and (len(args.size) > 2 or min(args.size) < 1):
        parser.error(f'--size {" ".join(map(str, args.size))}: give one number or two, of 1 or more')
    if args.runs < 0:
        parser.error(f'--runs is {args.runs}; it must be 0 or more')
    if args.size is not None:
        args.size = args.size[0] if len(set(args.size)) == 1 else tuple(args.size)


def _takes_size(name: str) -> bool:
    """Whether the size is part of the model, as in timm: what holds a position embedding is built with `img_size`."""
    with torch.device('meta'):
        return 'img_size' in inspect.signature(type(create_model(name))).parameters


def _build(args: argparse.Namespace) -> nn.Module:
    options: dict[str, Any] = {} if args.num_classes is None else {'num_classes': args.num_classes}
    if args.features:
        options['features_only'] = True
    if args.size is not None and _takes_size(args.name):
        options['img_size'] = args.size
    try:
        model = create_model(args.name, pretrained=args.pretrained, checkpoint_path=args.checkpoint, **options)
    except TypeError as error:
        raise ValueError(f'{args.name} cannot be built with {options}: {error}') from error
    return model.eval().requires_grad_(False)


def _out(args: argparse.Namespace) -> Path:
    suffix = FORMATS[args.format]
    out = Path(args.out or args.name + suffix)
    if out.suffix != suffix:
        raise ValueError(f'--out {out}: the file of --format {args.format} ends in {suffix}')
    if out.is_dir():
        raise ValueError(f'--out {out} is a folder; give a file')
    check_folder(out.parent, f'--out {out}')
    return out


def _inputs(args: argparse.Namespace, model: nn.Module) -> Inputs:
    """Draw inputs, and run the model once: what it refuses is told before minutes of tracing."""
    inputs = example_inputs(model, args.size)
    try:
        model(*inputs.tensors)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        shape = ' x '.join(map(str, inputs.tensors[0].shape))
        raise ValueError(f'{args.name} does not run on an input of {shape}: {_first_line(error)}') from error
    return inputs


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition('\n')[0] or type(error).__name__


def _check(args: argparse.Namespace, model: nn.Module, out: Path, inputs: Inputs) -> dict[str, Any]:
    """Compare a file with the model; another number of pictures too, where it may be any."""
    found = compare_onnx(model, out, inputs, args.runs)
    error = found.error
    if args.dynamic:
        error = max(error, compare_onnx(model, out, example_inputs(model, args.size, 3, seed=1), 0).error)
    rounding = {} if error <= TOLERANCE else {'own_rounding': own_rounding(model, inputs)}
    # two roundings that know nothing of each other may add up
    if not error <= max(TOLERANCE, 2 * rounding.get('own_rounding', 0.)):
        raise ValueError(f'{out} differs from the model by {error:.1e} of the largest value, more than {TOLERANCE:g}: '
                         'do not use it, and report the model and the versions of torch, onnx and onnxruntime')
    if rounding:
        sys.stderr.write(f'warning: with these weights {args.name} multiplies roundings: it differs by '
                         f'{rounding["own_rounding"]:.1e} from itself in float64, the file from it by {error:.1e}\n')
    times = {'onnxruntime_ms': found.onnx_ms, 'pytorch_ms': found.torch_ms} if args.runs else {}
    return {'pictures': [1, 3] if args.dynamic else [1], 'relative_error': error, **rounding, **times}


def _write(args: argparse.Namespace, model: nn.Module, out: Path) -> dict[str, Any]:
    """Write the file, and return what is known of it."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    metadata = {'architecture': args.name, **{key: cfg[key] for key in ('mean', 'std', 'license') if cfg.get(key)}}
    if args.format == 'safetensors':
        export_weights(model, out, metadata)
        return {}
    inputs = _inputs(args, model)
    facts: dict[str, Any] = {'inputs': {name: list(tensor.shape) for name, tensor in zip(*inputs, strict=True)}}
    sys.stderr.write(f'writing {out}: tracing takes a minute or two for a large model\n')
    try:
        if args.format == 'torch-export':
            export_archive(model, out, inputs, args.dynamic, args.keep_ops, metadata)
            return facts
        export_onnx(model, out, inputs, args.dynamic, metadata)
    except RuntimeError as error:
        raise RuntimeError(f'{args.name} could not be exported with torch {torch.__version__}; --debug shows all of '
                           f'it: {_first_line(error)}') from error
    return {**facts, 'nodes': count_nodes(out), **({} if args.no_check else _check(args, model, out, inputs))}


def _export(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    if args.format == 'onnx':
        for package in ('onnx', 'onnxscript', *(() if args.no_check else ('onnxruntime',))):
            need(package)
    out, model = _out(args), _build(args)
    result = {'model': args.name, 'format': args.format, 'file': os.fspath(out), **_write(args, model, out)}
    files = [file for file in (out, Path(f'{out}.data')) if file.is_file()]
    result['megabytes'] = round(sum(file.stat().st_size for file in files) / 1e6, 2)
    if args.json:
        sys.stdout.write(json.dumps(result) + '\n')
    else:
        sys.stdout.write('\n'.join(f'{key}: {value}' for key, value in result.items()) + '\n')
    return 0


export = Command('Write a model as ONNX, as an archive of torch.export, or as weights.', _add_options,
                 torch.no_grad()(_export), _check_options, (OSError, ValueError, ImportError, RuntimeError))
