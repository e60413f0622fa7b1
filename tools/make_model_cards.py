"""Writes what the documentation says about models and weights, from the registry and the catalogue.

    python tools/make_model_cards.py            # write all of it
    python tools/make_model_cards.py --check    # write nothing; exit 1 and say what differs if anything is out of date

It measures the sizes of all models on the meta device, which takes two minutes, and writes

- `visionssm/commands/measured.json`, these sizes, and the accuracies that docs/comparison.md lists,
- docs/models.md, the table of all models,
- the parts of docs/models/*.md between `<!-- generated: ... -->` and `<!-- end of generated -->`,
- the table of docs/checkpoints.md.

`--quick` takes the sizes from `measured.json` and measures none anew: for changes of the catalogue and of pages.
"""
import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from visionssm_launcher import importing

    with importing():
        from visionssm.checkpoints import Entry, entries
        from visionssm.checkpoints.catalogue import without_weights
        from visionssm.commands.cards import (
            MEASURED,
            Card,
            format_metric,
            link_of,
            measure_model,
            measured,
            model_card,
            model_module,
            stated,
            tasks,
        )
except ImportError as error:
    sys.exit(f'{error}: install the checkout first, with `pip install -e .`')

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
PAGES = {'mambairv2': 'mambair'}
START, END = '<!-- generated: {} -->', '<!-- end of generated -->'
GENERATED = re.compile(r'<!-- generated: (\w+) -->\n.*?<!-- end of generated -->', re.DOTALL)
TABLE_START = '<!-- made by tools/make_model_cards.py; do not edit below -->\n'
HEADER = """\
# Models

Made by `python tools/make_model_cards.py` from the registry; do not edit. `visionssm.create_model(NAME)` builds a
model, `visionssm.create_model('NAME.TAG', pretrained=True)` loads the official weights, and `visionssm info NAME` shows
the same on the command line.

Parameters and multiply-adds are measured here, for one input of the size given and with the classifier
(`visionssm.analysis.count_flops`). A multiply-add is one MAC. Counted are matrix products, convolutions and scans, a
selective scan with 3 MACs per step and state; not counted are normalisations, activations, gates, sums and the moving
of data, so other counts may differ by a few per cent. What is stated is what the authors state for their weights, of
classifiers on ImageNet-1K; it has not been measured again here. The licence is the one that the weights are published
under. An empty cell means: not stated.
"""
ALIGNED = ('input', 'parameters (M)', 'MACs (G)', 'parameters')


def table(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[str]:
    """Returns the lines of a table; columns that no row fills are left out."""
    columns = [column for column in columns if any(row.get(column) for row in rows)]
    return [f'| {" | ".join(columns)} |', f'|{"|".join("---:" if c in ALIGNED else "---" for c in columns)}|',
            *(f'| {" | ".join(row.get(column, "") for column in columns)} |' for row in rows)]


def file_link(entry: Entry) -> str:
    """Returns a link to the file, or to the page that a browser gets it from."""
    address = link_of(entry)
    if not address:
        return 'not published'
    return f'[{entry.file or "file"}]({address})' if entry.sources else f'[by hand]({address})'


def numbers(entry: Entry) -> str:
    """Returns what the authors state."""
    return ', '.join(format_metric(name, value) for name, value in stated(entry).items())


def sizes(card: Card) -> dict[str, str]:
    """Returns the cells of a model's sizes."""
    giga = card.macs / 1e9
    return {'name': f'`{card.name}`', 'input': ' x '.join(map(str, card.preprocessing['input_size'])),
            'parameters (M)': f'{card.parameters / 1e6:.2f}', 'parameters': f'{card.parameters:,}',
            'MACs (G)': f'{giga:.2f}' if giga >= 0.1 else f'{giga:.4f}',
            'blocks': ' / '.join(', '.join(map(str, counts)) for counts in card.blocks.values()),
            'channels': ', '.join(map(str, card.channels)),
            'measured here': ', '.join(format_metric(*item).partition(' (docs')[0] for item in card.measured.items())}


def released(entry: Entry) -> dict[str, str]:
    """Returns the cells of a file of weights."""
    return {'tag': f'`{entry.tag}`' if entry.tag else '', 'weights': f'`{entry.name}`', 'file': file_link(entry),
            'trained on': entry.trained_on, 'stated by the authors': numbers(entry), 'licence': entry.licence,
            'note': entry.note}


def papers(cards: Sequence[Card]) -> list[Card]:
    """Returns one card for each paper."""
    return list({card.paper: card for card in reversed(cards) if card.paper}.values())[::-1]


def overview(families: Mapping[str, Sequence[Card]]) -> str:
    """Returns docs/models.md."""
    lines = [HEADER]
    for family, cards in families.items():
        first, page = cards[0], PAGES.get(family, family)
        title = (model_module(first.name).__doc__ or family).splitlines()[0].rstrip('.')
        facts = [f'Paper: {card.paper.title} ([arXiv:{card.paper.arxiv}]({card.paper.url}))' for card in papers(cards)]
        facts += [f'origin: <{first.repository}>'] if first.repository else []
        facts += [f'details: [{page}.md](models/{page}.md)'] if (DOCS / 'models' / f'{page}.md').is_file() else []
        lines += [f'## {title}', '', ' · '.join(facts), '']
        rows: list[dict[str, str]] = []
        for card in cards:
            rows += [{**sizes(card), **released(entry)} for entry in card.weights] or [sizes(card) | {'file': 'none'}]
        lines += [*table(rows, ('name', 'tag', 'input', 'parameters (M)', 'MACs (G)', 'stated by the authors',
                                'trained on', 'file', 'licence')), '']
    return '\n'.join(lines)


def part_models(cards: Sequence[Card]) -> list[str]:
    """Returns the tables of a family's page."""
    lines = table([sizes(card) for card in cards], ('name', 'blocks', 'channels', 'parameters', 'MACs (G)', 'input',
                                                    'measured here'))
    found = [entry for card in cards for entry in card.weights]
    if found:
        lines += ['', *table([released(entry) for entry in found], ('weights', 'trained on', 'stated by the authors',
                                                                    'file', 'licence', 'note'))]
    for licence, note in dict.fromkeys((entry.licence, entry.licence_note) for entry in found if entry.licence_note):
        lines += ['', f'Licence of the weights, {licence}: {note}']
    dense = sum(len(card.dense) for card in cards)
    if dense:
        lines += ['', f'{dense} released detectors and segmenters on these backbones are in '
                      '[checkpoints.md](../checkpoints.md#files).']
    reasons = {card.name: card.no_weights for card in cards if card.no_weights}
    for reason in dict.fromkeys(reasons.values()):
        lines += ['', f'{", ".join(f"`{name}`" for name in reasons if reasons[name] == reason)}: {reason}']
    return lines


def part_citation(cards: Sequence[Card]) -> list[str]:
    """Returns what to cite."""
    return ['```bibtex', '\n\n'.join(card.bibtex() for card in papers(cards)), '```']


PARTS = {'models': part_models, 'citation': part_citation}


def fill(text: str, cards: Sequence[Card], where: str) -> str:
    """Returns a page with its generated parts made anew."""
    names = GENERATED.findall(text)
    if sorted(names) != sorted(PARTS):
        raise ValueError(f'{where} must have one part each of {", ".join(START.format(name) for name in PARTS)}, '
                         f'closed by {END}; it has {names}')
    return GENERATED.sub(lambda match: '\n'.join([START.format(match[1]), '', *PARTS[match[1]](cards), '', END]), text)


def catalogue(text: str) -> str:
    """Returns docs/checkpoints.md with its tables made anew."""
    head, found, _ = text.partition(TABLE_START)
    if not found:
        raise ValueError(f'docs/checkpoints.md has no line {TABLE_START.strip()!r}')
    lines = ['', '### Licences', '', '| family | licence | |', '|---|---|---|']
    lines += [f'| [{entry.family}]({entry.repository}) | {entry.licence} | {entry.licence_note} |'
              for entry in {entry.family: entry for entry in reversed(entries())}.values()]
    lines += ['', '### Files', '', '| name | file | trained on | stated by the authors | licence | |',
              '|---|---|---|---|---|---|']
    lines += [f'| `{entry.name}` | {file_link(entry)} | {entry.trained_on} | {numbers(entry)} | {entry.licence} | '
              f'{entry.note} |' for entry in entries()]
    lines += ['', 'Without weights: ' + '; '.join(
        f'`{name}` ({reason.rstrip(".")})' for name, reason in without_weights().items()) + '.']
    return head + found + '\n'.join(lines) + '\n'


def accuracies() -> dict[str, dict[str, float]]:
    """Returns what docs/comparison.md says about small models that were trained here."""
    page = (DOCS / 'comparison.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\w+)` \|[^|]*\|[^|]*\| \**([\d.]+)\** \|', page, re.M)
    return {name: {'fashion_mnist_top1': float(value)} for name, value in rows}


def ordered() -> list[str]:
    """Returns all models in the order of their files, from the backbones on."""
    modules = dict.fromkeys(model_module(name) for name in tasks())
    return [name for module in modules for name in module.default_cfgs if name in tasks()]


def measure_all(quick: bool = False) -> dict[str, dict[str, Any]]:
    """Returns what measured.json should hold; quickly, with the sizes that it holds already."""
    known = {name: {key: value for key, value in row.items() if key != 'measured'}
             for name, row in measured().items() if quick}
    trained = accuracies()
    found = {name: known.get(name) or measure_model(name) for name in tqdm(ordered(), unit='model', disable=None)}
    return {name: row | ({'measured': trained[name]} if name in trained else {}) for name, row in found.items()}


def pages(sizes_of: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Path, str]]:
    """Yields every file with the text that it should have."""
    rows = ',\n'.join(f'{json.dumps(name)}: {json.dumps(row)}' for name, row in sizes_of.items())
    yield MEASURED, f'{{\n{rows}\n}}\n'
    families: dict[str, list[Card]] = {}
    shown: dict[str, list[Card]] = {}
    for name, row in sizes_of.items():
        card = model_card(name, row)
        families.setdefault(card.family, []).append(card)
        shown.setdefault(PAGES.get(card.family, card.family), []).append(card)
    yield DOCS / 'models.md', overview(families)
    for page, cards in shown.items():
        path = DOCS / 'models' / f'{page}.md'
        if path.is_file():
            yield path, fill(path.read_text(encoding='utf-8'), cards, f'docs/models/{page}.md')
    path = DOCS / 'checkpoints.md'
    yield path, catalogue(path.read_text(encoding='utf-8'))


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the pages and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare instead of writing; exit status 1 if stale')
    parser.add_argument('--quick', action='store_true', help='measure no sizes anew')
    args = parser.parse_args(arguments)
    stale = 0
    for path, text in pages(measure_all(args.quick)):
        current = path.read_text(encoding='utf-8') if path.is_file() else ''
        if current == text:
            continue
        if not args.check:
            path.write_text(text, encoding='utf-8')
            continue
        stale = 1
        changed = sorted(set(text.splitlines()) ^ set(current.splitlines()))
        sys.stderr.write(f'{path.relative_to(ROOT)} is out of date; run `python tools/make_model_cards.py`. Lines that '
                         'differ:\n' + '\n'.join(changed[:10]) + '\n')
    return stale


if __name__ == '__main__':
    sys.exit(main())
