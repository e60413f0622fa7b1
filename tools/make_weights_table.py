"""Writes the table of released weights in docs/checkpoints.md from the catalogue: never edit it by hand.

    python tools/make_weights_table.py            # write it
    python tools/make_weights_table.py --check    # exit 1 if it is not what the catalogue gives
"""
import argparse
import sys
from pathlib import Path

try:
    from visionssm.checkpoints import Entry, entries
    from visionssm.checkpoints.catalogue import split_hub, without_weights
except ImportError as error:
    sys.exit(f'{error}: install the checkout first, with `pip install -e .`')

PAGE = Path(__file__).resolve().parent.parent / 'docs' / 'checkpoints.md'
START = '<!-- made by tools/make_weights_table.py; do not edit below -->\n'
UNITS = {'top1': 'top-1 {}', 'top5': 'top-5 {}', 'box_ap': 'box AP {}', 'mask_ap': 'mask AP {}', 'miou': 'mIoU {}',
         'miou_ms': 'multi-scale {}', 'fid_50k': 'FID {}'}


def origin(entry: Entry) -> str:
    """Returns a link to the file, or to the page that a browser gets it from."""
    if not entry.sources:
        return f'[by hand]({entry.page})' if entry.page else 'not published'
    hub = split_hub(entry.sources[0])
    return f'[{entry.file}]({f"https://huggingface.co/{hub[0]}/blob/main/{hub[1]}" if hub else entry.sources[0]})'


def metric(name: str, value: float) -> str:
    """Returns a number of the authors with what it is."""
    return UNITS.get(name, name.replace('_', ' ') + ' {}').format(value)


def make_table() -> str:
    """Returns the licences of the families and the table of all entries."""
    lines = ['', '### Licences', '', '| family | licence | |', '|---|---|---|']
    lines += [f'| [{entry.family}]({entry.repository}) | {entry.licence} | {entry.licence_note} |'
              for entry in {entry.family: entry for entry in reversed(entries())}.values()]
    lines += ['', '### Files', '', '| name | file | trained on | stated by the authors | licence | |',
              '|---|---|---|---|---|---|']
    for entry in entries():
        stated = ', '.join(metric(name, value) for name, value in entry.metric.items())
        lines.append(f'| `{entry.name}` | {origin(entry)} | {entry.trained_on} | {stated} | {entry.licence} | '
                     f'{entry.note} |')
    lines += ['', 'Without weights: ' + '; '.join(
        f'`{name}` ({reason.rstrip(".")})' for name, reason in without_weights().items()) + '.']
    return '\n'.join(lines) + '\n'


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the table."""
    parser = argparse.ArgumentParser(description='The table of released weights, from the catalogue')
    parser.add_argument('--check', action='store_true', help='exit 1 if the page is out of date, and write nothing')
    args = parser.parse_args(arguments)
    text = PAGE.read_text(encoding='utf-8')
    head, found, _ = text.partition(START)
    if not found:
        sys.exit(f'{PAGE} has no line {START.strip()!r}')
    page = head + START + make_table()
    if args.check:
        if page != text:
            sys.stderr.write(f'{PAGE} is not what the catalogue gives; run `python tools/make_weights_table.py`\n')
        return int(page != text)
    PAGE.write_text(page, encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
