"""tools/predict.py: names, pictures, unreadable files, and what a checkpoint says about itself."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionssm.checkpoints import save_safetensors
from visionssm.openmmlab.checkpoint import export_best
from visionssm.openmmlab.classifier import ImageClassifier
from visionssm.openmmlab.predict import Predictor, find_images, predict
from visionssm.openmmlab.predict_dense import UniqueNames

CLASSES = tuple(f'kind {number}' for number in range(10))


@pytest.fixture
def exported(tmp_path):
    """A classifier and what training exports of it."""
    torch.manual_seed(2)
    model = {'name': 'test_vit', 'img_size': 28, 'patch_size': 7, 'in_chans': 1, 'num_classes': 10,
             'pretrained_cfg_overlay': {'crop_pct': 1.0}}
    classifier = ImageClassifier(model, data_preprocessor={'mean': [0.3], 'std': [0.4]}).eval()
    return classifier, str(export_best(classifier, classifier.state_dict(), tmp_path / 'best', CLASSES))


def test_the_tool_prints_the_best_classes_and_draws(run_python, exported, pictures, tmp_path):
    done = run_python('tools/predict.py', str(pictures), '--checkpoint', exported[1], '--topk', '3',
                      '--device', 'cpu', '--out', str(tmp_path / 'out'))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(pictures / 'picture0.png') and [line.split()[0] for line in lines[1:4]] == ['1', '2', '3']
    assert len(lines) == 5 * 4 + 1 and all('kind' in line for line in lines[1:4])
    names = {f'picture{number}_prediction.png' for number in range(5)} | {'predictions.png'}
    assert {path.name for path in (tmp_path / 'out').iterdir()} == names


def test_scores_equal_the_classifiers_own(exported, pictures):
    classifier, path = exported
    predictions = list(Predictor(checkpoint=path, device='cpu').predict(find_images([pictures]), topk=10))
    images = [torch.from_numpy(np.asarray(Image.open(p.path)).copy())[None] for p in predictions]
    data = classifier.data_preprocessor({'inputs': torch.stack(images)})
    expected = classifier(**data, mode='predict')
    for prediction, output in zip(predictions, expected, strict=True):
        scores = torch.empty(10)
        scores[prediction.labels] = torch.tensor(prediction.probabilities)
        torch.testing.assert_close(scores, output['scores'], atol=1e-5, rtol=0)


def test_a_model_without_a_size_of_its_own_sees_pictures_as_large_as_in_its_evaluation(tmp_path):
    classifier = ImageClassifier({'name': 'vssd_pico', 'num_classes': 10}).eval()
    classifier(torch.rand(1, 3, 48, 40), mode='predict')
    path = str(export_best(classifier, classifier.state_dict(), tmp_path / 'best'))
    assert Predictor(checkpoint=path, device='cpu').data_config['input_size'] == (3, 48, 40)


def test_a_file_that_names_its_model_is_not_tried_with_all_others(exported, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr('visionssm.openmmlab.facts.find_restorer', lambda path: pytest.fail(f'{path} names its model'))
    assert predict([str(pictures), '--checkpoint', exported[1], '--device', 'cpu', '--out', str(tmp_path / 'out')]) == 0


def test_a_photograph_is_turned_upright(exported, tmp_path):
    shades = np.arange(28 * 28, dtype=np.uint32).reshape(28, 28).astype(np.uint8)
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(shades).save(tmp_path / 'turned.png', exif=turned)
    prediction, = Predictor(checkpoint=exported[1], device='cpu').predict([tmp_path / 'turned.png'])
    np.testing.assert_array_equal(np.asarray(prediction.image), np.rot90(shades, -1))


def test_class_names_come_from_the_checkpoint(exported):
    assert Predictor(checkpoint=exported[1]).classes == list(CLASSES)


def test_class_names_from_a_file_come_first(exported, pictures, tmp_path, capsys):
    (tmp_path / 'names.txt').write_text('\n'.join('abcdefghij'))
    assert predict([str(pictures), '--checkpoint', exported[1], '--classes', str(tmp_path / 'names.txt'),
                    '--out', str(tmp_path / 'out')]) == 0
    assert 'kind' not in capsys.readouterr().out


def test_a_file_with_too_few_class_names_is_refused(exported):
    with pytest.raises(ValueError, match='2 names of classes were given and the model has 10 classes'):
        Predictor(checkpoint=exported[1], classes=['a', 'b'])


def test_imagenet_names_for_a_model_of_a_thousand_classes(tmp_path):
    model = ImageClassifier({'name': 'test_vit'}).model
    path = save_safetensors(model.state_dict(), tmp_path / 'imagenet.safetensors')
    assert Predictor('test_vit', str(path)).class_name(0).startswith('tench')


def test_bare_weights_say_their_classes_and_channels(weights, monkeypatch):
    monkeypatch.setattr('visionssm.openmmlab.predict.load_weights', lambda *args: None)
    predictor = Predictor('test_vit', weights)
    assert predictor.model.num_classes == 10 and predictor.channels == 1
    assert predictor.class_name(4) == '4'


def test_unreadable_images_are_skipped_and_reported(exported, pictures, tmp_path, caplog, capsys):
    (pictures / 'picture1.png').write_bytes((pictures / 'picture1.png').read_bytes()[:60])
    (pictures / 'text.jpg').write_text('no image')
    assert predict([str(pictures), '--checkpoint', exported[1], '--out', str(tmp_path / 'out')]) == 0
    reported = [record.getMessage() for record in caplog.records]
    assert any('picture1.png' in message for message in reported) and any('text.jpg' in m for m in reported)
    assert '2 of 6 images could not be read' in reported
    assert capsys.readouterr().out.count('picture') >= 4


def test_json_is_a_line_for_each_file_alone_on_standard_output(exported, pictures, tmp_path, capsys):
    (pictures / 'text.jpg').write_text('no image')
    out = tmp_path / 'out'
    assert predict([str(pictures), '--checkpoint', exported[1], '--topk', '2', '--out', str(out), '--json']) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failed, = (row for row in rows if 'error' in row)
    assert failed['path'] == str(pictures / 'text.jpg') and 'UnidentifiedImageError' in failed['error']
    rows.remove(failed)
    assert [row['path'] for row in rows] == [str(pictures / f'picture{number}.png') for number in range(5)]
    expected = list(Predictor(checkpoint=exported[1], device='cpu').predict(find_images([pictures])[:5], topk=2))
    for row, prediction in zip(rows, expected, strict=True):
        assert [best['label'] for best in row['classes']] == prediction.labels
        assert [best['name'] for best in row['classes']] == [CLASSES[label] for label in prediction.labels]
        assert [best['probability'] for best in row['classes']] == pytest.approx(prediction.probabilities)
        assert Path(row['picture']).is_file()


def test_nothing_readable_is_a_failure(exported, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'')
    assert predict([str(tmp_path / 'a.png'), '--checkpoint', exported[1], '--out', str(tmp_path / 'out')]) == 1
    assert not (tmp_path / 'out').exists()


def test_images_of_several_folders_may_share_a_name(exported, pictures, tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'picture0.png').write_bytes((pictures / 'picture0.png').read_bytes())
    predict([str(pictures / 'picture0.png'), str(other), '--checkpoint', exported[1], '--out', str(tmp_path / 'out')])
    assert {'picture0_prediction.png', 'picture0-2_prediction.png'} <= {p.name for p in (tmp_path / 'out').iterdir()}


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'I;16'])
def test_any_picture_mode_is_read(exported, tmp_path, mode):
    path = tmp_path / 'picture.png'
    Image.new('L', (50, 40), 7).convert('I').convert(mode).save(path) if mode == 'I;16' else Image.new(
        mode, (50, 40)).save(path)
    assert len(list(Predictor(checkpoint=exported[1]).predict([path]))) == 1


@pytest.mark.parametrize('arguments,problem', [
    (['{missing}', '--model', 'test_vit'], 'does not exist'),
    (['{empty}', '--model', 'test_vit'], 'no images in the folder'),
    (['{image}', '--model', 'vim_pcio', '--checkpoint', '{weights}'], 'vim_pico'),
    (['{image}', '--checkpoint', '{weights}'], 'which model'),
    (['{image}', '--checkpoint', '{missing}'], 'does not exist'),
    (['{image}', '--model', 'test_resnet', '--checkpoint', '{weights}'], 'missing'),
], ids=['no-file', 'no-images', 'misspelt-model', 'no-model', 'no-checkpoint', 'other-model'])
def test_wrong_requests_end_with_one_clear_error(arguments, problem, weights, pictures, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    places = {'missing': tmp_path / 'nothing.png', 'empty': tmp_path / 'empty', 'weights': weights,
              'image': pictures / 'picture0.png'}
    command = [argument.format(**places) for argument in arguments]
    assert predict([*command, '--out', str(tmp_path / 'out')]) == 1
    errors = capsys.readouterr().err.partition('error: ')[2]
    assert 'error: ' not in errors and problem in errors.lower()


def test_a_training_checkpoint_rebuilds_its_model(exported, pictures, tmp_path):
    classifier, _ = exported
    model = {'type': 'ImageClassifier', 'model': {'name': 'test_vit', 'img_size': 28, 'patch_size': 7, 'in_chans': 1,
                                                  'num_classes': 10, 'pretrained': True,
                                                  'pretrained_cfg_overlay': {'crop_pct': 1.0}},
             'data_preprocessor': {'mean': [0.3], 'std': [0.4]}}
    meta = {'cfg': f'model = {model!r}', 'mmengine_version': '0', 'dataset_meta': {'classes': CLASSES}}
    torch.save({'meta': meta, 'state_dict': classifier.state_dict()}, tmp_path / 'epoch_1.pth')
    expected = next(Predictor(checkpoint=exported[1]).predict([pictures / 'picture3.png']))
    found = next(Predictor(checkpoint=str(tmp_path / 'epoch_1.pth')).predict([pictures / 'picture3.png']))
    assert found.labels == expected.labels
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_the_export_says_how_it_was_trained(exported):
    config = json.loads(Path(exported[1]).with_name('config.json').read_text())
    assert config['model_args']['in_chans'] == 1 and config['pretrained_cfg']['mean'] == pytest.approx([0.3])


def test_an_interrupt_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr('visionssm.openmmlab.predict.run', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert predict(['picture.png', '--model', 'vim_pico']) == 130
    assert capsys.readouterr().err.strip() == 'stopped'


def test_results_never_share_a_name():
    name = UniqueNames()
    paths = ['a.png', 'b/a.png', 'a-2.png', 'b/a-2.png', 'A.jpg', 'c/a.png']
    assert [name(Path(path)) for path in paths] == ['a', 'a-2', 'a-2-2', 'a-2-3', 'A-3', 'a-4']
