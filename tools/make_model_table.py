"""Writes docs/models.md, the table of all backbones, from the registry: never edit that file by hand.

    python tools/make_model_table.py            # write it
    python tools/make_model_table.py --check    # exit 1 if it is not what the registry gives

A family's file may define `official_results`, 'name.tag' to a dictionary with any of `top1`, `top5` (per cent, as its
authors state them) and `trained_on`; what is not there leaves its cell empty.
"""
import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

try:
    import visionssm
    from visionssm.analysis import count_flops
except ImportError as error:
    sys.exit(f'{error}: install the checkout first, with `pip install -e .`')

from timm.models import PretrainedCfg, model_entrypoint

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / 'docs' / 'models.md'
HEADER = """\
# Backbones

Made by `python tools/make_model_table.py` from the registry; do not edit. `visionssm.create_model(NAME)` builds a
model, `visionssm.create_model('NAME.TAG', pretrained=True)` loads the official weights.

Parameters and multiply-adds are measured here, for one image of the size given and with the classifier
(`visionssm.analysis.count_flops`). A multiply-add is one MAC. Counted are matrix products, convolutions and scans, a
selective scan with 3 MACs per step and state; not counted are normalisations, activations, gates, sums and the moving
of data, so other counts may differ by a few per cent. Top-1 and top-5 are what the authors state for their weights on
ImageNet-1K; they have not been measured again here. The licence is the one that the weights are published under. An
empty cell means: not stated.
"""
COLUMNS = ('name', 'tag', 'input', 'parameters (M)', 'MACs (G)', 'top-1', 'top-5', 'trained on', 'weights', 'licence')
NUMBERS = ('input', 'parameters (M)', 'MACs (G)', 'top-1', 'top-5')


def families() -> dict[ModuleType, list[str]]:
    """Returns the family modules with their registered names, in the order of their files."""
    names: dict[str, list[str]] = {}
    for name in visionssm.list_models('classification'):
        names.setdefault(model_entrypoint(name).__module__, []).append(name)
    modules = {importlib.import_module(module): found for module, found in sorted(names.items())}
    return {module: [name for name in module.default_cfgs if name in found] for module, found in modules.items()}


def weights(cfg: PretrainedCfg) -> str:
    """Returns a link to released weights: the file, a page to fetch it from by hand, or else the repository."""
    if cfg.url:
        return f'[{cfg.url.rpartition("/")[2]}]({cfg.url})'
    if cfg.hf_hub_id:
        return f'[{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id})'
    page = re.search(r'https?://\S+', cfg.description or '')
    return f'[fetched by hand]({page[0]})' if page else f'[see the repository]({cfg.origin_url})'


def rows(module: ModuleType, name: str) -> Iterator[dict[str, str]]:
    """Yields one row a tag of a model."""
    default = module.default_cfgs[name]
    for tag in default.tags:
        cfg = default.cfgs[tag]
        full_name = f'{name}.{tag}' if tag else name
        results = getattr(module, 'official_results', {}).get(full_name, {})
        counts = count_flops(visionssm.create_model(full_name, device='meta'), cfg.input_size)
        row = {
            'name': f'`{name}`',
            'input': '{1} x {2}'.format(*cfg.input_size),
            'parameters (M)': f'{counts["params"] / 1e6:.2f}',
            'MACs (G)': f'{counts["macs"] / 1e9:.2f}' if counts['macs'] >= 1e8 else f'{counts["macs"] / 1e9:.4f}',
            'weights': 'none',
        }
        if tag:  # a name without a tag has no released weights
            row |= {
                'tag': f'`{tag}`',
                'top-1': str(results.get('top1', '')),
                'top-5': str(results.get('top5', '')),
                'trained on': results.get('trained_on') or ('ImageNet-1K' if tag.endswith('in1k') else ''),
                'weights': weights(cfg),
                'licence': cfg.license or '',
            }
        yield row


def section(module: ModuleType, names: list[str]) -> str:
    """Returns the heading and the table of a family."""
    family = module.__name__.rpartition('.')[2]
    lines = [f'## {(module.__doc__ or family).splitlines()[0].rstrip(".")}', '']
    cfg = module.default_cfgs[names[0]].default
    facts = []
    if cfg.paper_name:
        facts.append(f'Paper: {cfg.paper_name} ({cfg.paper_ids})')
    if cfg.origin_url:
        facts.append(f'origin: <{cfg.origin_url}>')
    if (ROOT / 'docs' / 'models' / f'{family}.md').is_file():
        facts.append(f'details: [{family}.md](models/{family}.md)')
    if facts:
        lines += [' · '.join(facts), '']
    lines += [f'| {" | ".join(COLUMNS)} |', f'|{"|".join("---:" if c in NUMBERS else "---" for c in COLUMNS)}|']
    for row in (row for name in names for row in rows(module, name)):
        lines.append(f'| {" | ".join(row.get(column, "") for column in COLUMNS)} |')
    return '\n'.join(lines) + '\n'


def make_table() -> str:
    """Returns the whole page."""
    return '\n'.join([HEADER, *(section(module, names) for module, names in families().items())])


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the table and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare instead of writing; exit status 1 if stale')
    parser.add_argument('--output', type=Path, default=TABLE, help='file to write or compare (default: docs/models.md)')
    args = parser.parse_args(arguments)
    page = make_table()
    if not args.check:
        args.output.write_text(page)
        return 0
    current = args.output.read_text() if args.output.is_file() else ''
    if current == page:
        return 0
    changed = sorted(set(page.splitlines()) ^ set(current.splitlines()))
    sys.stderr.write(
        f'{args.output} is not what the registry gives; run `python tools/make_model_table.py`. Lines that differ:\n'
        + '\n'.join(changed[:10]) + '\n')
    return 1


if __name__ == '__main__':
    sys.exit(main())
