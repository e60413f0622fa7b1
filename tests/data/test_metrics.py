"""Accuracy against torchmetrics, per class, and across processes."""
import json
import os
import socket

import pytest
import torch
import torch.distributed as dist

from visionssm.openmmlab.data import SeededSampler
from visionssm.openmmlab.metrics import Accuracy, rank_of_label, summarise

torchmetrics = pytest.importorskip('torchmetrics', reason='needs the extra [dev]')


@pytest.fixture
def predictions():
    torch.manual_seed(4)
    labels = torch.randint(0, 7, (203,))
    scores = torch.randn(203, 7).softmax(-1)
    scores[torch.arange(203), labels] += 0.1
    return [{'index': i, 'label': int(label), 'scores': score, 'path': f'{i}.jpg'}
            for i, (label, score) in enumerate(zip(labels, scores, strict=True))]


def evaluate(metric, samples, size=None):
    metric.process(None, samples)
    return metric.evaluate(size or len(samples))


@pytest.mark.parametrize('k', [1, 3, 5])
def test_top_k_equals_torchmetrics(predictions, k):
    oracle = torchmetrics.classification.MulticlassAccuracy(7, top_k=k, average='micro')
    expected = oracle(torch.stack([p['scores'] for p in predictions]), torch.tensor([p['label'] for p in predictions]))
    assert evaluate(Accuracy(topk=k), predictions)[f'accuracy/top{k}'] == pytest.approx(100 * expected.item(), abs=1e-3)


def test_per_class_and_confusion_equal_torchmetrics(predictions):
    metric = Accuracy()
    metric.dataset_meta = {'classes': tuple('abcdefg')}
    evaluate(metric, predictions)
    scores, labels = torch.stack([p['scores'] for p in predictions]), torch.tensor([p['label'] for p in predictions])
    per_class = torchmetrics.classification.MulticlassAccuracy(7, average=None)(scores, labels)
    assert [row['top1'] for row in metric.summary['classes']] == pytest.approx((100 * per_class).tolist(), abs=1e-3)
    confusion = torchmetrics.classification.MulticlassConfusionMatrix(7)(scores, labels)
    assert metric.summary['confusion'] == confusion.tolist()
    assert [row['class'] for row in metric.summary['classes']] == list('abcdefg')


def test_the_summary_is_json(predictions):
    metric = Accuracy()
    evaluate(metric, predictions)
    assert json.loads(json.dumps(metric.summary)) == metric.summary


def test_images_count_once_whatever_was_padded(predictions):
    once, padded = Accuracy(), Accuracy()
    expected = evaluate(once, predictions)
    assert evaluate(padded, predictions + predictions[:5], size=len(predictions) + 5) == expected
    assert padded.summary['count'] == len(predictions)


def test_equal_scores_rank_by_class_number():
    assert [rank_of_label(torch.zeros(4), label) for label in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_scores_that_are_not_finite_never_hit(bad):
    assert rank_of_label(torch.tensor([0.1, bad, 0.3]), 1) == 3


def test_k_above_the_number_of_classes_is_left_out(predictions):
    few = [{**p, 'scores': p['scores'][:3], 'label': p['label'] % 3} for p in predictions]
    assert set(evaluate(Accuracy(topk=(1, 5)), few)) == {'accuracy/top1'}


def test_a_class_without_images_has_no_accuracy():
    summary = summarise([(0, 0, 0, 0), (1, 2, 0, 1)], (1,), ('a', 'b', 'c'))
    assert [row['top1'] for row in summary['classes']] == [100.0, None, 0.0] and summary['top1'] == 50.0


def test_labels_outside_the_model_are_named(predictions):
    with pytest.raises(ValueError, match='label 9 of 3.jpg.*num_classes'):
        Accuracy().process(None, [{**predictions[3], 'label': 9}])


@pytest.mark.parametrize('topk', [0, ()])
def test_impossible_k_is_refused(topk):
    with pytest.raises(ValueError, match='topk='):
        Accuracy(topk=topk)


def test_an_empty_test_set_is_an_error():
    with pytest.raises(ValueError, match='empty'):
        summarise([], (1,), ())


def evaluate_share(rank, folder, samples, port):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group('gloo', rank=rank, world_size=2)
    metric = Accuracy()
    mine = [samples[key.index] for key in SeededSampler(samples, seed=0, shuffle=False)]
    values = evaluate(metric, mine, size=len(samples))
    (folder / f'{rank}.json').write_text(json.dumps([values, metric.summary.get('confusion')]))
    dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(predictions, tmp_path):
    alone = Accuracy()
    expected = evaluate(alone, predictions)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(evaluate_share, (tmp_path, predictions, port), nprocs=2, start_method='fork')
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2))
    assert first == [expected, alone.summary['confusion']] and second == [expected, None]
