"""Every family goes through the tools with a config and nothing else: training, resumption, evaluation, prediction."""
import uuid

import pytest
import timm
import torch
from mmengine.config import Config
from PIL import Image

from visionssm.openmmlab.cli import train
from visionssm.openmmlab.compare import find_configs
from visionssm.openmmlab.evaluate import evaluate
from visionssm.openmmlab.predict import predict
from visionssm.utils.paths import find_config

# two epochs of two steps, the second one with the average as a teacher: what batch statistics or a cache of merged
# weights would spoil
SHORT = """
_base_ = '{base}'
model = dict(mesa=dict(start=0.5))
train_dataloader = dict(num_batch_per_epoch=2, batch_size=4)
val_dataloader = dict(num_batch_per_epoch=1, batch_size=10)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=-1))
custom_hooks = [dict(type='EMAHook', decay=0.5, update_buffers=True)]
log_level = 'WARNING'
"""


@pytest.fixture(params=find_configs())
def config(request, tmp_path):
    """A config of the comparison, cut to a few steps."""
    base = find_config(request.param)
    name = Config.fromfile(str(base)).model.model.name
    if not timm.is_model(name):
        pytest.skip(f'{name} is not registered')
    path = tmp_path / f'{request.param.replace("-", "_")}.py'
    path.write_text(SHORT.format(base=base))
    return str(path)


@pytest.mark.slow
def test_a_family_trains_resumes_exactly_and_answers(config, tmp_path, capsys):
    whole, again = tmp_path / 'whole', tmp_path / 'again'
    assert train([config, '--work-dir', str(whole), '--cfg-options', f'experiment_name={uuid.uuid4().hex}']) == 0
    assert train([config, '--work-dir', str(again), '--resume', str(whole / 'epoch_1.pth'),
                  '--cfg-options', f'experiment_name={uuid.uuid4().hex}']) == 0
    one, two = (torch.load(folder / 'epoch_2.pth', weights_only=False) for folder in (whole, again))
    assert 'train/loss_mesa' in one['message_hub']['log_scalars']
    for part in ('state_dict', 'ema_state_dict'):
        assert not [key for key, value in one[part].items() if not torch.equal(value, two[part][key])]
    weights = str(whole / 'best' / 'model.safetensors')
    assert evaluate([config, weights, '--work-dir', str(tmp_path / 'test')]) == 0
    Image.new('L', (28, 28), 90).save(tmp_path / 'picture.png')
    assert predict([str(tmp_path / 'picture.png'), '--checkpoint', weights, '--out', str(tmp_path / 'out')]) == 0
    assert 'top-1: ' in capsys.readouterr().out
