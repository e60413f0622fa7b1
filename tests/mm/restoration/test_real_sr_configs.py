"""The two stages for photographs with unknown faults: full size on meta, and a small run through both."""
import uuid
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')
pytest.importorskip('torchmetrics', reason='needs the extra [restoration]')

import torch  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from PIL import Image  # noqa: E402

from visionssm.openmmlab.cli import train, train_config  # noqa: E402
from visionssm.openmmlab.runner import VisionRunner  # noqa: E402
from visionssm.registry import MODELS  # noqa: E402

STAGES = ('restoration/mambair_real-sr-x4_stage1_8xb6-1000k_df2k-ost.py',
          'restoration/mambair_real-sr-x4_stage2-gan_8xb6-400k_df2k-ost.py')


@pytest.mark.parametrize('name', STAGES)
def test_the_models_build_at_full_size(name):
    cfg = train_config(train.parse([name]))
    with torch.device('meta'), DefaultScope.overwrite_default_scope('visionssm'):
        model = MODELS.build(cfg.model)
    counts = {part: sum(param.numel() for param in module.parameters()) for part, module in model.named_children()}
    assert counts['model'] == 20_569_575 and counts.get('discriminator', 4_376_897) == 4_376_897
    assert ('discriminator' in counts) == ('gan' in name)


@pytest.fixture
def small_options(tmp_path, monkeypatch, bare_alexnet) -> list[str]:
    """What makes a stage small enough for a step, on a picture of noise."""
    rng = np.random.default_rng(0)
    for place in ('DF2K/DF2K_HR_sub', 'DIV2K/DIV2K_valid_HR'):
        folder = tmp_path / 'data' / place
        folder.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (66, 73, 3), dtype=np.uint8)).save(folder / f'{number}.png')
    monkeypatch.chdir(tmp_path)
    loaders = [f'{name}_dataloader.{option}' for name in ('train', 'val', 'test') for option in (
        'num_workers=0', 'persistent_workers=False')]
    return [*loaders, 'train_dataloader.batch_size=1',
            'train_dataloader.dataset.gt=DF2K_HR_sub', 'train_dataloader.dataset.patch=32', 'model.model.upscale=4',
            'model.model.name=mambair_pico', 'model.model.depths=(1,)', 'model.model.d_state=1', 'model.tile=None',
            'train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1']


def test_a_small_network_goes_through_both_stages_and_is_evaluated(small_options, capsys):
    first, second = STAGES
    assert train([first, '--work-dir', 'one', '--cfg-options', *small_options, 'model.init_from=None']) == 0
    start = Path('one/best/model.safetensors')
    assert start.is_file()
    extra = ['model.perceptual.weights=random', 'model.discriminator.num_feat=2', f'model.init_from={start}',
             'val_evaluator.lpips_weights=random', 'test_evaluator.lpips_weights=random',
             'default_hooks.checkpoint.save_best=LPIPS-random']
    assert train([second, '--work-dir', 'two', '--cfg-options', *small_options, *extra]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    cfg = train_config(train.parse([second, '--work-dir', 'two', '--cfg-options', *small_options, *extra]))
    cfg.load_from, cfg.experiment_name, cfg.log_level = 'two/best/model.safetensors', uuid.uuid4().hex, 'ERROR'
    values = VisionRunner.from_cfg(cfg).test()
    # the averaged generator on the same faults
    assert last == f'PSNR: {values["PSNR"]:.2f}'
    assert 0 < values['LPIPS-random_DIV2K'] < 2
