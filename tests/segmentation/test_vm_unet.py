"""VM-UNet: MHS-VM's network with VMamba's mixer, and its start from a VMamba."""
import pytest
import timm
import torch

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.segmentation import MHSUNet, VMUNet

V0 = {'d_state': 4, 'expand': 2., 'gate': 'act', 'conv_bias': True, 'mlp_ratio': 0., 'stem': 'v1', 'downsample': 'v1'}
SIZE = {'dims': (8, 16, 32), 'd_state': 4}


@pytest.fixture
def vmamba() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model('vmamba_pico', **V0, depths=(1, 2, 2), dims=(8, 16, 32))


def test_models_are_listed_and_have_their_size():
    assert {'vm_unet', 'vm_unet_pico'} <= set(visionssm.list_models(task='segmentation'))
    model = visionssm.create_model('vm_unet', device='meta')
    assert sum(p.numel() for p in model.parameters()) == 27_427_561
    assert model(torch.empty(2, 3, 256, 256, device='meta')).shape == (2, 1, 256, 256)
    with pytest.raises(Exception, match='vm_unet'):
        visionssm.create_model('vm_unet', pretrained=True)


def test_only_the_mixer_differs_from_mhs_vm():
    def rest(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in model.state_dict().items() if '.mixer.' not in key}

    with torch.device('meta'):
        assert rest(VMUNet()) == rest(MHSUNet())


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (1, 1)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_any_image_gives_a_map_of_its_size(size: tuple[int, int]):
    model = visionssm.create_model('vm_unet_pico').eval()
    out = model(torch.rand(2, 3, *size))
    assert out.shape == (2, 1, *size) and ((out > 0) & (out < 1)).all()
    assert visionssm.create_model('vm_unet_pico', num_classes=3)(torch.rand(1, 1, 16, 16)).shape == (1, 3, 16, 16)


def test_a_block_computes_what_vmambas_block_does(vmamba):
    model = VMUNet(depths=(1, 2, 2), depths_decoder=(2, 2, 1), **SIZE).eval()
    model.load_vmamba(vmamba.state_dict())
    x = torch.rand(1, 3, 32, 32)
    deep, _ = model.encode(x)
    expected = vmamba.eval().forward_intermediates(x, intermediates_only=True, norm=False)[-1]
    torch.testing.assert_close(deep.permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-4)


def test_the_decoder_starts_with_the_blocks_of_the_encoder(vmamba):
    model = VMUNet(depths=(1, 1, 2), depths_decoder=(3, 1, 1), **SIZE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_vmamba({'model': vmamba.state_dict()})
    after, source = model.state_dict(), vmamba.state_dict()
    assert torch.equal(after['up_stages.0.blocks.1.mixer.ssm.x_proj'], source['stages.2.blocks.1.mixer.ssm.x_proj'])
    assert torch.equal(after['up_stages.2.blocks.0.norm.weight'], source['stages.0.blocks.0.norm1.weight'])
    own = [key for key in after if torch.equal(after[key], before[key])]
    assert 'up_stages.0.blocks.2.mixer.in_proj.weight' in own and 'up_stages.1.upsample.expand.weight' in own


@pytest.mark.parametrize(('options', 'message'), [
    ({'depths': (2, 2, 2)}, r'entries are missing: stages\.0\.blocks\.1'),
    ({'dims': (12, 24, 48)}, 'The VMamba does not fit VMUNet')])
def test_another_vmamba_is_refused(vmamba, options: dict, message: str):
    model = VMUNet(**{**SIZE, 'depths': (1, 2, 2), 'depths_decoder': (1, 1, 1), **options})
    with pytest.raises(CheckpointError, match=message):
        model.load_vmamba(vmamba.state_dict())


def test_drop_path_reaches_both_halves():
    model = VMUNet(depths=(1, 1), depths_decoder=(1, 1), dims=(8, 16), drop_path_rate=0.3)
    rates = [[getattr(block.drop_path, 'drop_prob', 0.) for stage in stages for block in stage.blocks]
             for stages in (model.stages, model.up_stages)]
    assert rates == [pytest.approx([0., 0.3]), pytest.approx([0.3, 0.])]


def test_files_of_ours_load(tmp_path):
    donor = visionssm.create_model('vm_unet_pico')
    torch.save({'state_dict': donor.state_dict()}, tmp_path / 'unet.pth')
    model = visionssm.create_model('vm_unet_pico', checkpoint_path=tmp_path / 'unet.pth')
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in model.state_dict().items())


def test_scripts():
    model = VMUNet(depths=(1, 1), depths_decoder=(1, 1), **{**SIZE, 'dims': (8, 16)}).eval()
    x = torch.rand(1, 3, 17, 16)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
