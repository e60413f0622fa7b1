"""LPIPS beside PSNR and SSIM: distances, names of the numbers, weights from files, and the table."""
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')
pytest.importorskip('torchmetrics', reason='needs the extra [restoration]')

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import visionssm.openmmlab.restoration.metrics as metrics  # noqa: E402
from visionssm.checkpoints import CheckpointError  # noqa: E402
from visionssm.openmmlab.evaluate_dense import _tables  # noqa: E402
from visionssm.openmmlab.restoration.metrics import RestorationMetric, create_lpips, lpips_distance  # noqa: E402

pytestmark = pytest.mark.usefixtures('bare_alexnet')


def pictures(seed: int = 0, side: int = 40) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_the_distance_is_zero_for_equal_pictures_and_grows_with_the_difference():
    net, name = create_lpips('alex', 'random')
    x, noise = pictures()
    near, far = ((x + share * (noise - x)) for share in (0.1, 0.6))
    assert name == 'LPIPS-random' and lpips_distance(net, x, x) == 0
    assert 0 < lpips_distance(net, near, x) < lpips_distance(net, far, x)
    # drawn the same way every time, whatever was drawn before, and without a trace in the generator
    torch.manual_seed(5)
    before = torch.rand(3)
    torch.manual_seed(5)
    again, _ = create_lpips('alex', 'random')
    assert torch.equal(torch.rand(3), before)
    assert lpips_distance(again, near, x) == lpips_distance(net, near, x)
    gray = x[:1]
    assert lpips_distance(net, noise[:1], gray) == pytest.approx(
        lpips_distance(net, noise[:1].expand(3, -1, -1), gray.expand(3, -1, -1)))


def test_the_linear_layers_are_those_of_the_authors():
    net, _ = create_lpips('alex', 'random')
    bundled = torch.load(Path(importlib.util.find_spec('torchmetrics').origin).parent
                         / 'functional/image/lpips_models/alex.pth', map_location='cpu', weights_only=True)
    assert bundled and all(torch.equal(value, net.state_dict()[key]) for key, value in bundled.items())
    assert not net.training and not any(param.requires_grad for param in net.parameters())


def test_weights_are_read_from_a_file_and_foreign_ones_are_named(tmp_path, monkeypatch):
    source, _ = create_lpips('alex', 'random')
    state = {f'features.{key.partition(".")[2]}': value + 0.01 for key, value in source.net.state_dict().items()}
    state['classifier.6.bias'] = torch.zeros(1000)
    path = tmp_path / 'alexnet.safetensors'
    save_file(state, path)
    net, name = create_lpips('alex', str(path))
    assert name == 'LPIPS-custom'
    assert all(torch.equal(value, source.net.state_dict()[key] + 0.01) for key, value in net.net.state_dict().items())
    monkeypatch.setattr(metrics, '_is_official', lambda *_: True)
    assert create_lpips('alex', str(path))[1] == 'LPIPS'
    del state['features.0.weight']
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r'(?s)alexnet-owt-7be5be79.pth.*slice1\.0\.weight'):
        create_lpips('alex', str(path))


def test_the_official_file_is_known_by_its_hash(tmp_path):
    path = tmp_path / 'any.pth'
    path.write_bytes(b'abc')
    # SHA-256 of the standard's example begins so
    assert metrics._is_official(path, 'https://host/net-ba7816bf.pth')
    assert not metrics._is_official(path, 'https://host/net-ba7816be.pth')


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r'alexnet-owt-7be5be79.pth.*no route.*lpips_weights=PATH'):
        create_lpips('alex')
    with pytest.raises(FileNotFoundError, match='absent.pth, which is no file'):
        create_lpips('alex', 'absent.pth')
    with pytest.raises(ValueError, match="lpips is 'squeeze'"):
        RestorationMetric(lpips='squeeze')
    with pytest.raises(ValueError, match='lpips None'):
        RestorationMetric(lpips_weights='random')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'visionssm\[restoration\]'):
        RestorationMetric(lpips='alex')


def test_scores_and_table_have_a_column_that_says_what_it_is():
    metric = RestorationMetric(border=2, lpips='alex', lpips_weights='random')
    (one, two), (three, four) = pictures(0), pictures(1)
    samples = [dict(index=0, name='A', path='a.png', restored=one, target=two),
               dict(index=1, name='B', path='b.png', restored=three, target=three),
               dict(index=2, name='B', path='c.png', restored=three, target=four)]
    metric.process(None, samples)
    values = metric.compute_metrics(metric.results)
    distances = [lpips_distance(metric.net, item['restored'], item['target']) for item in samples]
    assert values['LPIPS-random_A'] == pytest.approx(distances[0])
    assert values['LPIPS-random_B'] == pytest.approx((distances[1] + distances[2]) / 2)
    assert values['LPIPS-random'] == pytest.approx((values['LPIPS-random_A'] + values['LPIPS-random_B']) / 2)
    # the perfect picture makes an infinite PSNR of its set
    table, = _tables(values, {'sets': metric.rows})
    assert 'LPIPS-random' in table and f'{values["LPIPS-random"]:.4f}' in table.splitlines()[-1]
    small = dict(samples[0], restored=one[:, :20], target=two[:, :20])
    with pytest.raises(ValueError, match='a.png: LPIPS needs at least 31 x 31 pixels, got 20 x 40'):
        metric.process(None, [small])
    plain = RestorationMetric()
    plain.process(None, samples[:1])
    assert set(plain.compute_metrics(plain.results)) == {'PSNR', 'SSIM', 'PSNR_A', 'SSIM_A'}
