"""MHS-VM as a classifier: the encoder of the U-Net, with its weights."""
import pytest
import torch

import visionssm
from visionssm.models import MHSVM
from visionssm.segmentation import MHSUNet

TINY = {'depths': (1, 2, 1), 'dims': (16, 32, 64), 'd_state': 4, 'num_heads': 3}


def test_an_encoder_of_the_unet_fits_by_its_keys():
    unet = MHSUNet(depths_decoder=(1, 1, 1), **TINY).eval()
    model = MHSVM(num_classes=5, **TINY).eval()
    shared = {key: value for key, value in unet.state_dict().items() if key.startswith(('stem.', 'stages.'))}
    rest = model.load_state_dict(shared, strict=False)
    assert not rest.unexpected_keys and all(key.startswith(('norm.', 'head.')) for key in rest.missing_keys)
    x = torch.randn(2, 3, 48, 32)
    deepest, _ = unet.encode(x)
    torch.testing.assert_close(model.forward_features(x), model.norm(deepest))


def test_registered_model_is_the_official_encoder():
    model = visionssm.create_model('mhs_vm_tiny', device='meta')
    unet = visionssm.create_model('mhs_vm_unet_4h', device='meta')
    sizes = {key: value.shape for key, value in unet.state_dict().items() if key.startswith(('stem.', 'stages.'))}
    assert sizes.items() <= {key: value.shape for key, value in model.state_dict().items()}.items()
    assert sum(p.numel() for p in model.parameters()) == 9_414_664


def test_drop_path_rises_through_the_stages():
    model = MHSVM(drop_path_rate=0.3, **TINY)
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0., 0.1, 0.2, 0.3])


def test_state_parameters_are_not_decayed():
    names = MHSVM(**TINY).no_weight_decay()
    assert 'stages.0.blocks.0.mixer.scan.heads.C.A_log' in names
    assert len(names) == 4 * 3 * 3  # blocks, heads, A_log and D and dt_bias


@pytest.mark.parametrize('options', [
    {'num_heads': 4}, {'num_heads': 4, 'project_out': False}, {'threshold': 0.}, {'mixer_drop_rate': 0.1},
    {'in_chans': 1}, {'num_classes': 0}], ids=str)
def test_options_run(options: dict):
    model = MHSVM(**{'num_classes': 5, **TINY, **options}).eval()
    out = model(torch.randn(2, model.in_chans, 33, 20))
    assert out.shape == (2, model.num_classes or 64) and out.isfinite().all()


def test_stages_need_channels_and_depths():
    with pytest.raises(ValueError, match=r'dims are \(16, 32\) and depths \(1, 2, 1\)'):
        MHSVM(**{**TINY, 'dims': (16, 32)})
