"""`visionssm info`: what is known about models of all tasks, and about weights."""
import pytest

import visionssm


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path))


def test_a_classifier_is_described(run):
    done = run('info', 'vmamba_pico', '--json')
    card, = done.json
    model = visionssm.create_model('vmamba_pico')
    assert card['parameters'] == sum(parameter.numel() for parameter in model.parameters())
    assert card['blocks'] == {'stages': [1, 1, 2, 1]}
    assert card['channels'] == [info['num_chs'] for info in model.feature_info] and card['strides'] == [4, 8, 16, 32]
    assert card['macs'] == visionssm.analysis.count_flops(model, (3, 32, 32))['macs']
    assert card['measured'] == {'fashion_mnist_top1': 84.3}
    assert card['weights'] == [] and card['paper']['url'] == 'https://arxiv.org/abs/2401.10166'


def test_a_classifier_is_described_in_words(run):
    out = run('info', 'vssd_tiny').out
    for text in ('24,270,724', 'top-1 84.1', 'channels 64, 128, 256, 512 at strides 4, 8, 16, 32', 'none stated',
                 'bicubic, center crop of 0.875', 'https://github.com/YuHengsss/VSSD', '@misc{vssd,',
                 'mask-rcnn_vssd-tiny_fpn_1x_coco (box AP 46.9, mask AP 42.6)'):
        assert text in out


@pytest.mark.parametrize('name, texts', [
    ('mambair_light_sr_x2', ('restoration', 'PSNR (Y) 32.85 dB on Urban100', 'upscale 2', 'apache-2.0', 'by hand')),
    ('dis_small_patch2', ('diffusion', '29,132,752', 'not published', 'cc-by-nc-4.0', 'patch_size 2')),
    ('mhs_vm_unet_pico', ('segmentation', '1, 1, 1  (up_stages)', 'weights        none')),
    ('mamba_yolo_tiny', ('detection', '1, 1, 3, 1  (backbone.stages)', 'agpl-3.0', 'letterbox')),
    ('vim2_tiny', ('none: The authors published neither code nor weights.',)),
])
def test_models_of_other_tasks_are_described(run, name, texts):
    out = run('info', name).out
    for text in texts:
        assert text in out


def test_one_file_of_weights_is_described_alone(run):
    card, = run('info', 'vssd_tiny.mesa_in1k', '--json').json
    assert [row['name'] for row in card['weights']] == ['vssd_tiny.mesa_in1k'] and card['dense'] == []
    assert card['weights'][0]['stated'] == {'top1': 84.1}
    out = run('info', 'mask-rcnn_vmamba-tiny_fpn_1x_coco').out
    assert 'box AP 47.3' in out and 'vmamba_tiny, with its classifier' in out and 'vmamba_tiny.in1k' not in out


def test_a_misspelt_name_gets_a_suggestion_and_debug_the_traceback(run):
    done = run('info', 'vssd_tny')
    assert done.code == 1 and done.out == ''
    assert done.err.count('\n') == 1 and "Did you mean 'vssd_tiny'" in done.err
    with pytest.raises(ValueError, match='vssd_tny'):
        run('info', 'vssd_tny', '--debug')
