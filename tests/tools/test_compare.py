"""tools/compare_models.py: trains what is not finished, and writes a page and a plot from the logs."""
import json
import shutil

import pytest

from visionssm.openmmlab.cli import train, train_config
from visionssm.openmmlab.compare import compare, find_configs, format_report, summarise_run

VIM = 'vim-pico-plain_fashion-mnist'
SHORT = ['--cfg-options', 'train_cfg.max_epochs=2', 'train_dataloader.num_batch_per_epoch=4',
         'default_hooks.logger.interval=2', 'log_processor.window_size=2', 'model.model.depth=1']


@pytest.fixture(scope='module')
def finished(run_python, tmp_path_factory, repo_root):
    """A comparison of one family that has run, and its command."""
    root = tmp_path_factory.mktemp('comparison')
    command = ['--only', VIM, '--work-dir', 'runs', '--out', 'docs/page.md', '--plot', 'docs/images/plot.png', *SHORT]
    done = run_python(str(repo_root / 'tools' / 'compare_models.py'), *command, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return root, command, done


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """The finished comparison in a folder of its own, which is the current one."""
    shutil.copytree(finished[0], tmp_path / 'here')
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'here', finished[1]


def fake_train(folder, code):
    path = folder / 'fake_train.py'
    path.write_text(f'raise SystemExit({code})')
    return path


def test_the_configs_of_the_comparison_are_found():
    assert VIM in find_configs() and 'vim-pico_fashion-mnist' not in find_configs()
    assert len(find_configs()) >= 7


def test_it_trains_and_writes_a_page_and_a_plot(finished):
    root, _, done = finished
    result = json.loads((root / 'runs' / VIM / 'result.json').read_text())
    assert len(result['top1']) == 2 and result['images'] == 1000 and result['params'] > 1e4 and result['macs'] > 1e6
    assert 0 < result['seconds_per_step'] * 8 < 3 * result['seconds'] < 300
    page = (root / 'docs' / 'page.md').read_text()
    assert f'| `vim_pico` | {result["params"] / 1e6:.2f} M | ' in page and f'**{result["top1"][-1]:.2f}**' in page
    assert '(images/plot.png)' in page and f'python tools/compare_models.py --only {VIM}' in page
    assert (root / 'docs' / 'images' / 'plot.png').read_bytes()[:4] == b'\x89PNG'
    assert f'[1/1] {VIM}: top-1' in done.stdout


def test_a_finished_run_is_not_repeated(copied):
    root, command = copied
    before = (root / 'runs' / VIM / 'result.json').read_text()
    assert compare(fake_train(root, 1), command) == 0
    assert (root / 'runs' / VIM / 'result.json').read_text() == before


def test_a_run_with_another_config_is_refused(copied, capsys):
    root, command = copied
    assert compare(fake_train(root, 0), [*command, 'optim_wrapper.optimizer.lr=1e-3']) == 1
    assert 'another config' in capsys.readouterr().err


def test_a_failed_training_is_named_and_the_others_are_written(copied, capsys):
    root, command = copied
    (root / 'docs' / 'page.md').unlink()
    assert compare(fake_train(root, 3), ['--only', 'vim2-pico_fashion-mnist', *command[1:]]) == 1
    errors = capsys.readouterr().err
    assert 'not in the table: vim2-pico_fashion-mnist' in errors
    assert '`vim_pico`' in (root / 'docs' / 'page.md').read_text()


def test_an_unfinished_log_is_no_result(copied):
    root, _ = copied
    cfg = train_config(train.parse([VIM, '--work-dir', str(root / 'runs' / VIM)]))
    with pytest.raises(ValueError, match='accuracies of 2 epochs, not of 10'):
        summarise_run(VIM, cfg)


def test_the_page_is_sorted_and_states_its_uncertainty():
    common = {'params': 250_000, 'macs': 3.2e6, 'seconds': 95.5, 'seconds_per_step': 0.05, 'images': 1000,
              'machine': {'device': 'cpu (this one)'}, 'date': '2026-01-02'}
    page = format_report([{'model': 'a_pico', 'top1': [70.0, 80.0], **common},
                          {'model': 'b_pico', 'top1': [91.0, 90.0], **common}], 'images/plot.png', 'python x')
    rows = [line for line in page.splitlines() if line.startswith('| `')]
    assert rows[0] == '| `b_pico` | 0.25 M | 3.2 M | **90.00** | 91.00 | 1:35 min | 50 ms | 2026-01-02 |'
    assert rows[1].startswith('| `a_pico`') and 'about 1.1, so neighbours within 3 points' in page
    assert page.count('device cpu (this one)') == 1


def test_an_unknown_config_is_refused(capsys):
    with pytest.raises(SystemExit):
        compare('train.py', ['--only', 'vim-pico_fashion-mnist'])
    assert VIM in capsys.readouterr().err
