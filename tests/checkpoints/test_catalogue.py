"""The catalogue: every entry is complete, and belongs to a model that exists with the keys of its official file."""
import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from timm.models import get_pretrained_cfg

import visionssm
from visionssm.checkpoints import CheckpointError, Entry, entries, find_entry, list_weights
from visionssm.checkpoints.catalogue import parse, split_hub, without_weights
from visionssm.models._detect import Unfilled
from visionssm.models._official import families
from visionssm.models._tasks import TASKS, task_modules
from visionssm.utils.paths import config_root

ROOT = Path(__file__).resolve().parent.parent.parent
KEYS = ROOT.parent / 'shared' / 'keys'
ALL = entries()
METRICS = re.compile(r'top1|top5|(box|mask)_ap|miou(_ms)?|(psnr|ssim|iou|dsc)_\w+|fid_50k')
MODELS = [entry for entry in ALL if not entry.config]
DENSE = [entry for entry in ALL if entry.config]


def ids(entry: Entry) -> str:
    return entry.name


@functools.cache
def default_cfgs() -> dict[str, object]:
    """The tags of all models of tasks: name.tag to configuration."""
    found = {}
    for module in task_modules():
        for model, default in getattr(module, 'default_cfgs', {}).items():
            found.update({f'{model}.{tag}' if tag else model: cfg for tag, cfg in default.cfgs.items()})
    return found


@functools.cache
def models_of(task: str) -> list[str]:
    return visionssm.list_models(task)


def configuration(entry: Entry):
    return default_cfgs().get(entry.name) or get_pretrained_cfg(entry.name, allow_unregistered=False)


def test_names_are_unique():
    assert len({entry.name for entry in ALL}) == len(ALL) > 100
    assert list_weights('restoration') == [entry.name for entry in ALL if entry.task == 'restoration']


@pytest.mark.parametrize('entry', ALL, ids=ids)
def test_every_field_has_the_form_it_is_read_in(entry: Entry):
    assert entry.task in ('classification', *TASKS)
    assert re.fullmatch(r'https://github\.com/[\w-]+/[\w-]+', entry.repository)
    assert re.fullmatch(r'[0-9a-f]{40}|v[\d.]+', entry.commit)
    assert re.fullmatch(r'arXiv:\d{4}\.\d{5}', entry.paper)
    assert entry.licence and entry.licence_note and entry.trained_on and entry.preprocessing
    assert entry.sha256 is None or re.fullmatch(r'[0-9a-f]{64}', entry.sha256)
    assert entry.size is None or (isinstance(entry.size, int) and entry.size > 1000)
    assert entry.reader in ('state_dict', 'ultralytics') and isinstance(entry.ema, bool)
    assert all(METRICS.fullmatch(name) and isinstance(value, float) for name, value in entry.metric.items())
    for source in entry.sources:
        assert re.fullmatch(r'https://github\.com/\S+', source) or split_hub(source)
        assert source.endswith(entry.file) and entry.file
    assert entry.published == bool(entry.sources or entry.page)
    assert not entry.page or re.fullmatch(r'https://drive\.google\.com/file/d/[\w-]{33}/view', entry.page)


@pytest.mark.parametrize('entry', MODELS, ids=ids)
def test_every_model_exists_and_agrees_with_its_registered_configuration(entry: Entry):
    assert entry.family in families() and entry.model in models_of(entry.task)
    assert entry.name.partition('.')[0] == entry.model
    cfg = configuration(entry)
    assert (cfg.origin_url, cfg.paper_ids) == (entry.repository, entry.paper)
    if entry.published:
        assert cfg.license == entry.licence
    if cfg.hf_hub_id:
        assert entry.sources == (f'hf://{cfg.hf_hub_id}/{cfg.hf_hub_filename}',)
    elif cfg.url:
        assert cfg.url in entry.sources
    elif entry.page:
        assert entry.page in cfg.description
    if entry.task == 'classification':
        given = {key: entry.preprocessing[key] for key in ('crop_pct', 'interpolation')}
        assert given == {'crop_pct': cfg.crop_pct, 'interpolation': cfg.interpolation}
        for key in ('input_size', 'mean', 'std'):
            assert tuple(entry.preprocessing[key]) == getattr(cfg, key)


def test_every_model_has_weights_or_a_reason_why_not():
    covered = {entry.model for entry in ALL} | set(without_weights())
    assert {name for name in visionssm.list_models() if not name.endswith('_pico')} == covered
    tags = {name for name in default_cfgs() if '.' in name}
    assert tags <= {entry.name for entry in MODELS}


@pytest.mark.parametrize('entry', DENSE, ids=ids)
def test_every_detector_and_segmenter_has_its_config(entry: Entry):
    path = config_root() / entry.config
    assert entry.name.partition('.')[0] == path.stem and entry.task == path.parent.name
    text = path.read_text()
    assert f"'{entry.model}'" in text or f'visionssm://{entry.model}' in text
    assert entry.model in models_of('classification')


def official_shapes(entry: Entry) -> dict[str, torch.Tensor]:
    path = KEYS / f'{entry.keys}.json'
    if not path.is_file():
        pytest.skip(f'no list of official keys {entry.keys} here')
    return {key: torch.empty(value['shape'], dtype=getattr(torch, value['dtype']), device='meta')
            for key, value in json.loads(path.read_text())['keys'].items()}


@pytest.mark.slow
@pytest.mark.parametrize('entry', {(entry.model, entry.keys): entry for entry in MODELS}.values(), ids=ids)
def test_the_keys_of_the_official_file_fit_the_model(entry: Entry):
    shapes = official_shapes(entry)
    with Unfilled(), torch.device('meta'):
        model = visionssm.create_model(entry.model)
        given = sys.modules[type(model).__module__].checkpoint_filter_fn(shapes, model)
    assert {key: value.shape for key, value in given.items()} == {
        key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize('entry', {entry.keys: entry for entry in DENSE}.values(), ids=ids)
def test_the_keys_of_official_backbones_fit_the_models(entry: Entry):
    shapes = official_shapes(entry)
    with Unfilled(), torch.device('meta'):
        given = visionssm.from_official(entry.family, shapes).backbone.state_dict()
        wanted = visionssm.create_model(entry.model).state_dict()
    assert len(given) > 50
    assert {key: value.shape for key, value in given.items()} == {key: wanted[key].shape for key in given}


@pytest.mark.parametrize(('name', 'found'), [
    ('vmamba_tiny', 'vmamba_tiny.in1k'), ('vssd_tiny', 'vssd_tiny.in1k'), ('mambair_sr_x4', 'mambair_sr_x4.df2k'),
    ('vssd_tiny.mesa_in1k', 'vssd_tiny.mesa_in1k'), ('dis_huge_patch2', 'dis_huge_patch2'),
    ('mask-rcnn_vmamba-base-s2l15_fpn_1x_coco', 'mask-rcnn_vmamba-base-s2l15_fpn_1x_coco')])
def test_a_name_without_a_tag_is_the_first_entry(name: str, found: str):
    assert find_entry(name).name == found


def test_unknown_names_and_models_without_weights_are_told():
    with pytest.raises(ValueError, match="Unknown weights 'vmamba_tinny'. Did you mean 'vmamba_tiny'"):
        find_entry('vmamba_tinny')
    with pytest.raises(CheckpointError, match='no weights of vim2_tiny: The authors published neither'):
        find_entry('vim2_tiny')
    with pytest.raises(ValueError, match="Unknown family 'vmambas'. Did you mean 'vmamba'"):
        entries('vmambas')


@pytest.mark.parametrize(('content', 'message'), [
    ({'weight': [], 'weights': []}, 'fam.yaml has unknown fields at its top: weight'),
    ({'weights': [{'name': 'm', 'url': 'x'}]}, "fam.yaml has unknown fields entry 'm': url"),
    ({'weights': [{'name': 'm'}]}, "fam.yaml, entry 'm': .*missing .*'task'")])
def test_mistakes_in_a_file_are_named(content: dict, message: str):
    with pytest.raises(ValueError, match=message):
        parse(content, 'fam')
