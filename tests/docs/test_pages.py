"""A page means the same on a code host (CommonMark) as in the site (Python-Markdown): no list or table goes missing."""
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

markdown = pytest.importorskip('markdown')
pytest.importorskip('pymdownx')
markdown_it = pytest.importorskip('markdown_it')

ROOT = Path(__file__).resolve().parent.parent.parent
# what the host shows as it stands: the site puts parts of README.md and kernels/README.md in its place
INCLUDING = {'index.md', 'operators.md'}
PAGES = [path.relative_to(ROOT).as_posix() for path in [
    ROOT / 'README.md', ROOT / 'kernels' / 'README.md', *sorted(ROOT.glob('docs/**/*.md'))]
    if path.name not in INCLUDING]
TAGS = {'blockquote', 'h1', 'h2', 'h3', 'img', 'li', 'ol', 'pre', 'table', 'tr', 'ul'}


def counts(html: str) -> Counter[str]:
    return Counter(tag for tag in re.findall(r'<(\w+)', html) if tag in TAGS)


def in_the_site(text: str) -> Counter[str]:
    names, options = [], {}
    for extension in yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['markdown_extensions']:
        name, given = next(iter(extension.items())) if isinstance(extension, dict) else (extension, {})
        names.append(name)
        options[name] = given
    return counts(markdown.markdown(text, extensions=names, extension_configs=options))


def on_a_host(text: str) -> Counter[str]:
    return counts(markdown_it.MarkdownIt('commonmark').enable('table').render(text))


@pytest.mark.parametrize('page', PAGES)
def test_the_site_shows_what_a_code_host_shows(page: str):
    text = (ROOT / page).read_text()
    assert in_the_site(text) == on_a_host(text), 'put a blank line before lists and tables, and indent by four spaces'


def test_a_list_that_only_a_code_host_sees_is_found():
    assert in_the_site('Text:\n- one\n- two\n') != on_a_host('Text:\n- one\n- two\n')
