"""`visionssm info`: what is known about a model, or about weights."""
import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..checkpoints import Entry
from ..utils.command import Command
from .cards import Card, find_weights, format_metric, link_of, model_card, stated, weights_state

__all__ = ['info']


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('names', nargs='+', metavar='NAME', help='as in vmamba_tiny, vssd_tiny.mesa_in1k, '
                                                                 'mambair_sr_x2 or mask-rcnn_vmamba-tiny_fpn_1x_coco')
    parser.add_argument('--json', action='store_true', help='write JSON: a list with one object a name')


def _weights_facts(entry: Entry) -> dict[str, Any]:
    return {'name': entry.name, 'tag': entry.tag, 'state': weights_state(entry), 'file': entry.file,
            'address': link_of(entry), 'config': entry.config, 'trained_on': entry.trained_on,
            'licence': entry.licence, 'licence_note': entry.licence_note, 'stated': stated(entry),
            'preprocessing': dict(entry.preprocessing), 'note': entry.note}


def _as_json(card: Card, only: Entry | None) -> dict[str, Any]:
    facts = {**dataclasses.asdict(card), 'bibtex': card.bibtex()}
    if card.paper:
        facts['paper']['url'] = card.paper.url
    kept = {'weights': card.weights, 'dense': card.dense}
    if only is not None:
        kept = {key: tuple(entry for entry in kept[key] if entry == only) for key in kept}
    return {**facts, **{key: [_weights_facts(entry) for entry in found] for key, found in kept.items()}}


def _numbers(values: Sequence[Any]) -> str:
    return ', '.join(f'{value:.4g}' if isinstance(value, float) else str(value) for value in values)


def _architecture(card: Card) -> Iterator[tuple[str, str]]:
    yield 'class', card.class_name
    for part, blocks in card.blocks.items():
        yield 'blocks', f'{_numbers(blocks)}  ({part})'
    if card.channels:
        yield 'features', f'channels {_numbers(card.channels)} at strides {_numbers(card.strides)}'
    options = {key: value for key, value in card.options.items() if key != 'dims' or not card.channels}
    yield 'sizes', ', '.join(f'{key} {value}' for key, value in options.items())
    yield 'parameters', f'{card.parameters:,}'
    size = card.preprocessing['input_size']
    yield 'multiply-adds', f'{card.macs / 1e9:.4g} G for one input of {" x ".join(map(str, size))}'


def _input(card: Card) -> Iterator[tuple[str, str]]:
    cfg = card.preprocessing
    note = next((str(entry.preprocessing['note']) for entry in card.weights if 'note' in entry.preprocessing), '')
    if card.task == 'classification':
        yield 'input', (f'{" x ".join(map(str, cfg["input_size"]))}, {cfg["interpolation"]}, {cfg["crop_mode"]} crop '
                        f'of {cfg["crop_pct"]:g}')
        yield 'normalise', f'mean {_numbers(cfg["mean"])}; standard deviation {_numbers(cfg["std"])}'
    else:
        yield 'input', f'{" x ".join(map(str, cfg["input_size"]))}{"; " if note else ""}{note}'


def _weights(entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        numbers = ', '.join(format_metric(name, value) for name, value in stated(entry).items())
        yield 'weights', f'{entry.name}: {weights_state(entry)}'
        for label, text in (('stated', numbers), ('trained on', entry.trained_on), ('file', link_of(entry)),
                            ('licence', ': '.join(filter(None, (entry.licence, entry.licence_note)))),
                            ('note', entry.note)):
            if text:
                yield f'  {label}', text


def _sections(card: Card, only: Entry | None) -> Iterator[tuple[str, str]]:
    yield 'task', only.task if only else card.task
    yield 'family', card.family
    if only and only.config:
        yield 'config', only.config
        yield 'backbone', f'{card.name}, with its classifier of ImageNet:'
    yield 'about', card.about
    yield from _architecture(card)
    yield from _input(card)
    for name, value in card.measured.items():
        yield 'measured', format_metric(name, value)
    yield from _weights(card.weights if only is None else [only])
    if only is None and card.dense:
        yield 'backbone of', f'{len(card.dense)} released detectors and segmenters:'
        for entry in card.dense:
            yield '', f'{entry.name} ({", ".join(format_metric(*item) for item in entry.metric.items())})'
    if card.no_weights:
        yield 'weights', f'none: {card.no_weights}'
    elif not card.weights:
        yield 'weights', 'none'
    if card.repository:
        yield 'repository', card.repository
    if card.paper:
        yield 'paper', f'{card.paper.title}, {card.paper.url}'


def _write(card: Card, only: Entry | None) -> None:
    rows = list(_sections(card, only))
    width = max(len(label) for label, _ in rows)
    lines = [only.name if only else card.name, *(f'  {label:<{width}}  {text}' for label, text in rows)]
    if card.paper:
        lines += ['', card.bibtex()]
    sys.stdout.write('\n'.join(lines) + '\n')


def _info(args: argparse.Namespace) -> int:
    found = []
    for name in args.names:
        entry = find_weights(name)
        found.append((model_card(entry.model if entry else name), entry))
    if args.json:
        sys.stdout.write(json.dumps([_as_json(*pair) for pair in found], indent=1) + '\n')
        return 0
    for number, (card, entry) in enumerate(found):
        sys.stdout.write('\n' if number else '')
        _write(card, entry)
    return 0


info = Command('Show what is known about a model: architecture, parameters, multiply-adds, what its authors state and '
               'what was measured here, weights with their licences, paper and citation.', _add_options, _info)
