"""The page about the command line names every command there is, and what each needs."""
import re

from visionssm import cli


def test_every_command_is_on_the_page_with_its_extra(repo_root):
    text = (repo_root / 'docs' / 'cli.md').read_text()
    rows = dict(re.findall(r'^\| `([\w-]+)` \| [^|]+\| ([^|]*)\|$', text.partition('## For other programs')[0], re.M))
    assert rows.keys() == cli.COMMANDS.keys()
    for name, entry in cli.COMMANDS.items():
        assert entry.extra in rows[name].replace('`', ''), name
        assert bool(entry.extra) == bool(rows[name].strip()), name
