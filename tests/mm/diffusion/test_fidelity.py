"""FID and its relatives in the engine and on the command line: names, statistics in files, errors before any work."""
import json
import pickle

import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('diffusers')

import numpy as np
import timm
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from visionssm.checkpoints import save_safetensors
from visionssm.data.fashion import embedded_fashion_mnist
from visionssm.diffusion.fidelity import frechet_distance, inception_score, moments, precision_recall
from visionssm.openmmlab.diffusion import extractors, fidelity
from visionssm.openmmlab.diffusion.extractors import ClassifierExtractor, InceptionExtractor, build_extractor
from visionssm.openmmlab.diffusion.fidelity import (
    PictureSet,
    compare,
    measure,
    measure_files,
    read_statistics,
    run_fid,
    save_statistics,
    to_image,
)
from visionssm.openmmlab.diffusion.metrics import FidelityLoop, FidelityMetric, _merge
from visionssm.openmmlab.diffusion.model import DiffusionModel
from visionssm.openmmlab.evaluate import evaluate
from visionssm.registry import METRICS
from visionssm.utils.paths import config_root

TINY = {'name': 'dis_pico', 'patch_size': 14, 'embed_dim': 16, 'depth': 2, 'drop_path_rate': 0.0}


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """Weights of a tiny classifier of the clothes, not trained."""
    torch.manual_seed(0)
    arguments = {'img_size': 28, 'patch_size': 14, 'in_chans': 1}
    model = timm.create_model('test_vit', num_classes=10, **arguments)
    config = {'architecture': 'test_vit', 'num_classes': 10, 'model_args': arguments,
              'pretrained_cfg': {'mean': [0.3], 'std': [0.3], 'input_size': [1, 28, 28]}}
    path = tmp_path_factory.mktemp('classifier') / 'classifier.safetensors'
    save_safetensors(model.state_dict(), path, {'config': json.dumps(config)})
    return str(path)


@pytest.fixture(scope='module')
def extractor(classifier):
    return ClassifierExtractor('test_vit', classifier)


@pytest.fixture(scope='module')
def inception_file(tmp_path_factory):
    """Random weights of torch-fidelity's Inception, as a file."""
    module = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'load_state_dict_from_url', lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, 'load_state_dict', lambda *_: None)
        net = module.FeatureExtractorInceptionV3('inception-v3-compat', ['2048'])
    path = tmp_path_factory.mktemp('inception') / 'random.pth'
    torch.save(net.state_dict(), path)
    return str(path)


def pictures(start: int, stop: int) -> list[Image.Image]:
    return [Image.fromarray(array) for array in embedded_fashion_mnist('test')[0][start:stop]]


def write_folder(folder, start: int, stop: int, drawn: bool = False):
    folder.mkdir()
    labels = embedded_fashion_mnist('test')[1][start:stop]
    for number, (picture, label) in enumerate(zip(pictures(start, stop), labels, strict=True)):
        picture.save(folder / f'{label:04d}_{number:05d}.png')
    if drawn:
        (folder / 'settings.json').write_text('{"seed": 5}')
    return folder


def write_config(tmp_path, name='config', evaluator=None, **test):
    """A config whose test draws 24 pictures in two steps, and weights for it; `test` overrides."""
    torch.manual_seed(3)
    model = DiffusionModel(TINY)
    model.export(model.state_dict(), tmp_path, {})
    test = {'num_samples': 24, 'sampler': 'ddim', 'steps': 2, 'batch_size': 24, **test}
    evaluators = evaluator if isinstance(evaluator, list) else [evaluator]
    path = tmp_path / f'{name}.py'
    path.write_text(f'_base_ = {str(config_root() / "diffusion" / "dis-pico_fashion-mnist.py")!r}\n'
                    f'model = dict(model=dict(_delete_=True, **{TINY!r}))\n'
                    f'test_evaluator = {evaluators!r}\ntest_cfg = dict(**{test!r})\n'
                    "log_level = 'WARNING'\nvisualizer = dict(vis_backends=[])\n")
    return [str(path), str(tmp_path / 'model.safetensors'), '--work-dir', str(tmp_path / name)]


def results(tmp_path, name='config'):
    return json.loads((tmp_path / name / 'results.json').read_text())


def test_a_test_draws_and_compares_whatever_the_batch(tmp_path, classifier, capsys):
    metrics = [{'type': 'DiffusionLoss'}, {'type': 'FidelityMetric', 'extractor': 'test_vit', 'checkpoint': classifier}]
    assert evaluate(write_config(tmp_path, 'whole', metrics)) == 0
    found = results(tmp_path, 'whole')
    assert found['metrics'].keys() >= {'val_loss', 'mse', 'FID[test_vit]', 'IS[test_vit]', 'precision[test_vit]',
                                       'recall[test_vit]', 'recognised[test_vit]'}
    assert not {'FID', 'sFID', 'IS'} & found['metrics'].keys()
    assert (found['test_cfg']['num_samples'], found['test_cfg']['sampler']) == (24, 'ddim')
    assert found['summary'] == {'FID[test_vit]': pytest.approx(found['metrics']['FID[test_vit]'])}
    assert capsys.readouterr().out.splitlines()[-1].startswith('FID[test_vit]: ')
    assert evaluate(write_config(tmp_path, 'parts', metrics[1:], batch_size=7)) == 0
    parts = results(tmp_path, 'parts')['metrics']
    assert 'mse' not in parts
    assert parts == pytest.approx({key: found['metrics'][key] for key in parts}, rel=1e-4)


def test_the_numbers_are_those_of_the_pictures_that_were_drawn(tmp_path, classifier, extractor, monkeypatch):
    kept = {}

    def keep(metric, batch, indices, labels):
        kept.update({index: (picture, label) for index, picture, label in zip(indices, batch, labels, strict=True)})
        return original(metric, batch, indices, labels)

    original = FidelityMetric.process_drawn
    monkeypatch.setattr(FidelityMetric, 'process_drawn', keep)
    evaluator = {'type': 'FidelityMetric', 'extractor': 'test_vit', 'checkpoint': classifier}
    assert evaluate(write_config(tmp_path, evaluator=evaluator, batch_size=5)) == 0
    assert [kept[index][1] for index in sorted(kept)] == [index % 10 for index in range(24)]
    drawn = extractor([kept[index][0] for index in sorted(kept)])
    real = extractor(pictures(0, 1000))
    hits = (drawn['logits'].argmax(1) == torch.arange(24) % 10).double().mean()
    precision, recall = precision_recall(real['features'], drawn['features'])
    score, spread = inception_score(drawn['logits'])
    expected = {'FID': frechet_distance(drawn['features'], real['features']), 'IS': score, 'IS_std': spread,
                'precision': precision, 'recall': recall, 'recognised': 100 * float(hits)}
    assert results(tmp_path)['metrics'] == pytest.approx(
        {f'{key}[test_vit]': value for key, value in expected.items()}, rel=1e-4)


def test_a_reference_needs_no_test_data(tmp_path, classifier, extractor):
    save_statistics(measure(pictures(0, 200), 200, extractor), extractor, tmp_path / 'real.npz')
    evaluator = {'type': 'FidelityMetric', 'extractor': 'test_vit', 'checkpoint': classifier,
                 'reference': str(tmp_path / 'real.npz')}
    options = ['--cfg-options', 'test_dataloader.dataset.source=root', 'test_dataloader.dataset.root=/nowhere']
    assert evaluate([*write_config(tmp_path, evaluator=evaluator), *options]) == 0
    found = results(tmp_path)['metrics']
    assert 'FID[test_vit]' in found and 'precision[test_vit]' not in found


def test_missing_weights_are_named_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(FidelityLoop, '_draw', lambda *_: pytest.fail('drawn'))
    assert evaluate(write_config(tmp_path, evaluator={'type': 'FidelityMetric'})) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / 'cache') in message and 'weights-inception-2015-12-05' in message
    assert 'weights=FILE' in message and "extractor='vim_pico'" in message
    evaluator = {'type': 'FidelityMetric', 'extractor': 'vim_pico', 'checkpoint': 'none.safetensors'}
    assert evaluate(write_config(tmp_path, evaluator=evaluator)) == 1
    assert 'none.safetensors' in capsys.readouterr().err


@pytest.mark.parametrize(('change', 'message'), [
    ({'num_samples': 10}, '10 pictures are too few'),
    ({'num_samples': 1}, 'num_samples is 1'),
    ({'sampler': 'eulr'}, 'eulr'),
    ({'type': 'TestLoop', '_delete_': True}, 'FidelityLoop'),
])
def test_a_test_that_cannot_work_is_refused(tmp_path, classifier, capsys, change, message):
    evaluator = {'type': 'FidelityMetric', 'extractor': 'test_vit', 'checkpoint': classifier}
    argv = write_config(tmp_path, evaluator=evaluator)
    if '_delete_' in change:
        text = (tmp_path / 'config.py').read_text().splitlines()
        lines = [f'test_cfg = dict(**{change!r})' if line.startswith('test_cfg') else line for line in text]
        (tmp_path / 'config.py').write_text('\n'.join(lines))
    else:
        argv += ['--cfg-options', *(f'test_cfg.{key}={value}' for key, value in change.items())]
    assert evaluate(argv) == 1
    assert message in capsys.readouterr().err


def test_processes_are_joined_without_counting_a_picture_twice(classifier, extractor):
    def metric():
        found = FidelityMetric('test_vit', classifier)
        found.prepare(30)
        return found

    def seen(item):
        return {side: _merge(parts) for side, parts in item._seen.items()}

    images, real = pictures(0, 30), torch.stack([torch.from_numpy(np.array(item))[None] for item in pictures(30, 81)])
    whole, first, second = metric(), metric(), metric()
    whole.process_drawn(images, list(range(30)), [index % 10 for index in range(30)])
    whole.process({'inputs': real, 'indices': list(range(51))}, [])
    for item, rank in ((first, 0), (second, 1)):
        places = list(range(rank, 30, 2)) + [29]
        item.process_drawn([images[place] for place in places], places, [place % 10 for place in places])
        # the sampler evens out 51 pictures by repeating the first one
        dealt = [place % 51 for place in range(rank, 52, 2)]
        item.process({'inputs': real[dealt], 'indices': dealt}, [])
    joined = first.compute_metrics([seen(first), seen(second)])
    assert joined == pytest.approx(whole.evaluate(51), rel=1e-5)
    with pytest.raises(ValueError, match='no drawn pictures'):
        metric().compute_metrics([{'real': {}, 'drawn': {}}])


def test_inception_is_that_of_torch_fidelity_and_numbers_of_other_weights_say_so(inception_file, monkeypatch, caplog):
    found = InceptionExtractor(inception_file)
    assert found.suffix == f'[inception:{found.fingerprint[:8]}]' and 'not the published file' in caplog.text
    grey, colour = pictures(0, 1)[0], Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 30, 3), np.uint8))
    rows = found([grey, colour, grey])
    assert {key: value.shape for key, value in rows.items()} == {
        'features': (3, 2048), 'logits': (3, 1008), 'spatial': (3, 2023)}
    torch.testing.assert_close(rows['features'][0], rows['features'][2])
    from torch_fidelity.utils import create_feature_extractor
    library = create_feature_extractor('inception-v3-compat', ['2048', 'logits_unbiased'], cuda=False,
                                       feature_extractor_weights_path=inception_file)
    three = torch.from_numpy(np.array(grey)).expand(1, 3, 28, 28)
    for key, value in zip(('features', 'logits'), library(three.contiguous()), strict=True):
        torch.testing.assert_close(rows[key][:1], value)
    # the roots of matrices of 2048 x 2048 take their time, and are tested elsewhere
    monkeypatch.setattr(fidelity, 'frechet_distance', lambda *_: 1.0)
    pair = PictureSet({key: value.repeat(4, 1) for key, value in rows.items()})
    assert compare(pair, pair, found).keys() == {f'{name}{found.suffix}' for name in (
        'FID', 'sFID', 'IS', 'IS_std', 'precision', 'recall')}
    found.suffix = ''
    assert compare(pair, pair, found).keys() == {'FID', 'sFID', 'IS', 'IS_std', 'precision', 'recall'}
    monkeypatch.setattr(extractors, 'INCEPTION_SHA256', found.fingerprint)
    monkeypatch.setattr(InceptionExtractor, '_build', staticmethod(lambda path: found.net))
    assert (InceptionExtractor(inception_file).suffix, InceptionExtractor(inception_file).name) == ('', 'inception')


def test_weights_that_are_no_inception_are_refused(tmp_path, classifier):
    with pytest.raises(ValueError, match='does not fit .*Inception'):
        InceptionExtractor(classifier)
    (tmp_path / 'bad.pth').write_bytes(pickle.dumps({'a': print}))
    with pytest.raises(ValueError, match=r'bad\.pth'):
        InceptionExtractor(str(tmp_path / 'bad.pth'))


def test_statistics_are_read_back_and_those_of_another_network_refused(tmp_path, extractor):
    found = measure(pictures(0, 90), 90, extractor)
    save_statistics(found, extractor, tmp_path / 'ours.npz')
    back = read_statistics(tmp_path / 'ours.npz', extractor)
    assert back.count == 90 and frechet_distance(back.moments['features'], found.rows['features']) < 1e-9
    expected = moments(found.rows['features'])
    with np.load(tmp_path / 'ours.npz') as file:
        np.testing.assert_array_equal(file['sigma'], expected.covariance.numpy())
    np.savez(tmp_path / 'ttur.npz', mu=expected.mean, sigma=expected.covariance)
    with pytest.raises(ValueError, match="ttur.npz holds statistics of the features of 'inception'"):
        read_statistics(tmp_path / 'ttur.npz', extractor)
    inception = extractors.Extractor('inception', torch.device('cpu'), 'x', '')
    assert read_statistics(tmp_path / 'ttur.npz', inception).count is None
    other = ClassifierExtractor.__new__(ClassifierExtractor)
    extractors.Extractor.__init__(other, 'test_vit', torch.device('cpu'), 'other', '[test_vit]')
    with pytest.raises(ValueError, match='other weights'):
        read_statistics(tmp_path / 'ours.npz', other)


def test_pictures_in_a_file_serve_too(tmp_path, extractor):
    array = np.stack([np.asarray(picture.convert('RGB')) for picture in pictures(0, 20)])
    np.savez(tmp_path / 'batch.npz', arr_0=array)
    found = measure_files(tmp_path / 'batch.npz', extractor)
    torch.testing.assert_close(found.rows['features'], extractor(pictures(0, 20))['features'])


@pytest.mark.parametrize(('content', 'message'), [
    (dict(mu=np.zeros(3)), "neither 'mu' and 'sigma'"),
    (dict(mu=np.array([None]), sigma=np.zeros((1, 1))), 'plain arrays'),
    (dict(mu=np.zeros(3), sigma=np.zeros((2, 2)), extractor='test_vit'), r'\(3,\)'),
    (dict(arr_0=np.zeros((2, 3, 4, 4))), 'arr_0 is float64'),
    (None, 'plain arrays'),
])
def test_files_without_statistics_are_named(tmp_path, extractor, content, message):
    path = tmp_path / 'file.npz'
    path.write_bytes(b'no archive') if content is None else np.savez(path, **content)
    with pytest.raises(ValueError, match=message) as caught:
        read_statistics(path, extractor)
    assert str(path) in str(caught.value)


def test_the_tool_compares_folders_and_statistics(tmp_path, classifier, capsys):
    drawn, real = write_folder(tmp_path / 'drawn', 0, 60, drawn=True), write_folder(tmp_path / 'real', 60, 200)
    common = ['--extractor', 'test_vit', '--checkpoint', classifier, '--out', str(tmp_path / 'out.json')]
    save = ['--save-stats', str(tmp_path / 'real.npz')]
    assert run_fid([str(drawn), str(real), *common, *save, '--batch-size', '9']) == 0
    found = json.loads((tmp_path / 'out.json').read_text())
    assert found['pictures'] == {'drawn': 60, 'real': 140} and found['sampling'] == {'seed': 5}
    assert set(found['metrics']) == {f'{key}[test_vit]' for key in (
        'FID', 'IS', 'IS_std', 'precision', 'recall', 'recognised')}
    assert f'FID[test_vit]: {found["metrics"]["FID[test_vit]"]:.4f}' in capsys.readouterr().out
    assert run_fid([str(drawn), str(tmp_path / 'real.npz'), *common]) == 0
    again = json.loads((tmp_path / 'out.json').read_text())['metrics']
    assert again['FID[test_vit]'] == pytest.approx(found['metrics']['FID[test_vit]'], rel=1e-5)
    assert 'precision[test_vit]' not in again
    # real pictures need not be named by class
    assert run_fid([str(real), str(real), *common]) == 0
    same = json.loads((tmp_path / 'out.json').read_text())['metrics']
    assert same['FID[test_vit]'] < 1e-6 and same['precision[test_vit]'] == 1 and 'recognised[test_vit]' not in same


def test_the_tool_takes_the_test_data_of_a_config(tmp_path, classifier):
    drawn = write_folder(tmp_path / 'drawn', 0, 60)
    assert run_fid([str(drawn), '--real-config', str(config_root() / 'diffusion' / 'dis-pico_fashion-mnist.py'),
                    '--extractor', 'test_vit', '--checkpoint', classifier, '--out', str(tmp_path / 'out.json')]) == 0
    assert json.loads((tmp_path / 'out.json').read_text())['pictures'] == {'drawn': 60, 'real': 1000}


def test_the_tool_names_what_is_wrong(tmp_path, classifier, capsys):
    folder = write_folder(tmp_path / 'drawn', 0, 20)
    common = ['--extractor', 'test_vit', '--checkpoint', classifier]
    (folder / '0000_99999.png').write_bytes(b'no picture')
    assert run_fid([str(folder), str(folder), *common]) == 1
    assert '0000_99999.png' in capsys.readouterr().err
    assert run_fid([str(tmp_path / 'none'), str(folder), *common]) == 1
    assert 'none does not exist' in capsys.readouterr().err
    for argv in ([str(folder)], [str(folder), str(folder), '--real-config', 'x.py'], [str(folder), '--k', '0'],
                 [str(folder), '--save-stats', 'x.json']):
        with pytest.raises(SystemExit):
            run_fid(argv)


def test_the_official_tests_draw_as_the_authors_do():
    for path in sorted((config_root() / 'diffusion').glob('dis-[!p]*.py')):
        cfg = Config.fromfile(str(path))
        assert cfg.test_evaluator.type == 'FidelityMetric' and cfg.val_evaluator.type == 'DiffusionLoss', path.name
        assert (cfg.test_cfg.num_samples, cfg.test_cfg.sampler, cfg.test_cfg.steps) == (50_000, 'ddpm', 250)
        assert ('reference' in cfg.test_evaluator) == ('imagenet' in path.name), path.name
        with DefaultScope.overwrite_default_scope('visionssm'):
            assert METRICS.build(cfg.test_evaluator).sources['extractor'] == 'inception'


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: build_extractor('inception', checkpoint='x'), 'called weights'),
    (lambda: build_extractor('test_vit', weights='x'), 'called checkpoint'),
    (lambda: FidelityMetric(k=0), 'k is 0'),
    (lambda: FidelityMetric().process({}, []), 'FidelityLoop'),
    (lambda: to_image(torch.zeros(8, 4, 4)), 'reference=FOLDER_OR_NPZ'),
    (lambda: to_image(torch.full((3, 4, 4), 2.0)), 'no picture'),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
