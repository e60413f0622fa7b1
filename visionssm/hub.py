"""Weights in the layout of the hub of Hugging Face, as timm reads it: `config.json`, `model.safetensors`, `README.md`.

A folder of this layout is what `timm.create_model('local-dir:FOLDER', pretrained=True)` takes, and as a repository of
the hub `'hf-hub:OWNER/NAME'`. Models of other tasks than classification have the same layout, with their task in
`config.json`; `visionssm.create_model` takes both kinds.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import download_from_hf, generate_readme

from ._factory import create_model
from ._version import __version__
from .checkpoints import CheckpointError, check_fit, load_state_dict, save_safetensors
from .checkpoints.download import is_offline
from .checkpoints.load import read_metadata
from .checkpoints.transfer import DownloadError
from .conversion import Source, choose_variant
from .models._describe import CLASSIFICATION, task_of, timm_config
from .models._detect import Unfilled, fit_ours
from .utils.files import atomic_write

__all__ = ['HUB', 'Package', 'pack', 'pull', 'push']

HUB = 'hf-hub:'
_WEIGHTS = 'model.safetensors'
_OLD_WEIGHTS = 'pytorch_model.bin'
# task -> what the hub calls it
_PIPELINES = {CLASSIFICATION: 'image-classification', 'restoration': 'image-to-image', 'detection': 'object-detection',
              'segmentation': 'image-segmentation', 'diffusion': 'unconditional-image-generation'}
_NO_METRICS = ('epoch', 'iter')


@dataclass(frozen=True)
class Package:
    """A model as it is shared.

    Attributes:
        config: Content of `config.json`.
        state_dict: The weights.
        notes: What the file says about where they are from.
        metadata: Header of the weights.
        parameters: Number of parameters.
    """

    config: Mapping[str, Any]
    state_dict: Mapping[str, torch.Tensor]
    notes: Mapping[str, Any]
    metadata: Mapping[str, str]
    parameters: int

    @property
    def task(self) -> str:
        """Its task."""
        return str(self.config.get('task', CLASSIFICATION))

    def write(self, folder: Path, title: str, licence: str | None = None) -> None:
        """Write the three files; each appears whole or not at all, and the weights come last.

        Args:
            folder: Where.
            title: Name of the repository, for the card.
            licence: Licence of the weights; what the file says when None.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / 'README.md').exists():
            atomic_write(self.card(title, licence), folder / 'README.md')
        atomic_write(json.dumps(self.config, indent=2), folder / 'config.json')
        save_safetensors(self.state_dict, folder / _WEIGHTS, self.metadata)

    def licence(self) -> str | None:
        """Return the licence that the file states; None where it states none."""
        return self.notes.get('licence')

    def card(self, title: str, licence: str | None = None) -> str:
        """Return the card of the model, Markdown with the header that the hub reads.

        Args:
            title: Name of the repository; `OWNER/NAME` for one on the hub.
            licence: Licence of the weights; what the file says when None.
        """
        licence = licence or self.licence()
        pipeline = _PIPELINES.get(self.task, self.task)
        library = 'timm' if self.task == CLASSIFICATION else 'visionssm'
        card: dict[str, Any] = {
            'tags': list(dict.fromkeys((pipeline, library, 'visionssm'))), 'library_name': library,
            'description': f"A model of the task {self.task}, `{self.config['architecture']}` of visionssm "
                           f'{__version__}.',
            'details': self._details(licence), 'usage': self._usage(title)}
        if licence and re.fullmatch(r'[a-z0-9][a-z0-9.-]*', licence):
            card['license'] = licence
        else:
            card.update(license='other', license_name=re.sub(r'[^a-z0-9.]+', '-', (licence or 'not stated').lower()))
        return generate_readme(card, title.rpartition('/')[2], task_name=pipeline)

    def _details(self, licence: str | None) -> dict[str, Any]:
        cfg, notes = self.config.get('pretrained_cfg') or {}, self.notes
        metrics = notes.get('metrics') or {key: value for key, value in notes.items() if key not in _NO_METRICS
                                           and isinstance(value, int | float) and not isinstance(value, bool)}
        rows = {'Architecture': self.config['architecture'], 'Parameters': f'{self.parameters / 1e6:.2f} M',
                'Input': ' x '.join(map(str, cfg['input_size'])) if cfg.get('input_size') else None,
                'Classes': self.config.get('num_classes'), 'Trained on': notes.get('trained_on'),
                'Weights': notes.get('weights'), 'Converted from': notes.get('source'),
                'Original': notes.get('repository') or cfg.get('origin_url'),
                'Paper': notes.get('paper') or cfg.get('paper_ids'), 'Licence': licence,
                'About the licence': notes.get('licence_note'),
                'Metrics': {key: f'{value:g}' for key, value in metrics.items()}}
        return {label: value for label, value in rows.items() if value}

    def _usage(self, title: str) -> str:
        place = f'{HUB}{title}' if '/' in title else f'local-dir:{title}'
        maker = 'timm' if self.task == CLASSIFICATION else 'visionssm'
        lines = ['import timm', 'import visionssm  # puts its models into the registry of timm'] if maker == 'timm' \
            else ['import visionssm']
        return '\n'.join(['```python', *lines, '', f"model = {maker}.create_model('{place}', pretrained=True).eval()",
                          '```'])


def pack(source: Source, name: str | None = None) -> Package:
    """Find out what a file in our layout holds, and check that the model it names takes its weights.

    Args:
        source: A file of a training here (`best/model.safetensors`), of `visionssm convert`, or bare weights.
        name: Registered name of the model; what the file says, or its keys tell, when None.

    Returns:
        The model, ready to be written.

    Raises:
        CheckpointError: It is of a kind that no loader of the hub builds, or the weights are not of the model.
    """
    try:
        config, notes = (json.loads(source.metadata.get(part, '{}')) for part in ('config', 'notes'))
    except ValueError as error:
        raise CheckpointError(f'The header of {source.path} is damaged: {error}.') from error
    if 'scope' in config or config.get('task') == 'backbone':
        kind = 'a backbone without its classifier' if 'scope' not in config else 'a detector or segmenter of OpenMMLab'
        raise CheckpointError(f'{source.path} holds {kind}, which neither timm nor visionssm.create_model builds by '
                              'name: share the file itself.')
    state_dict, arguments = source.state_dict, dict(config.get('model_args') or {})
    if name is None and not config.get('architecture'):
        name, state_dict, arguments = _recognise(source)
    elif name is not None and name != config.get('architecture'):
        config, arguments = {}, {}
    architecture = name or config['architecture']
    if 'num_classes' in config:
        arguments.setdefault('num_classes', config['num_classes'])
    with Unfilled(), torch.device('meta'):
        model = create_model(architecture, **arguments)
    check_fit(model, state_dict, str(source.path))
    if not config:
        task = task_of(architecture)
        config = timm_config(model) if task == CLASSIFICATION else {
            'architecture': architecture, 'task': task, 'model_args': arguments}
    metadata = {**{key: value for key, value in source.metadata.items() if key != 'format'},
                'config': json.dumps(config), 'notes': json.dumps(notes), 'producer': f'visionssm {__version__}'}
    return Package(config, state_dict, notes, metadata, sum(weight.numel() for weight in model.parameters()))


def _recognise(source: Source) -> tuple[str, Mapping[str, torch.Tensor], dict[str, Any]]:
    fit = fit_ours(source.state_dict)
    if fit is None or fit.dense:
        raise CheckpointError(f'{source.path} does not say what model it is of, and its keys tell none: give --name, '
                              'or bring a file of the authors into our layout first, by visionssm convert.')
    variant = choose_variant(source.path, fit)
    return variant.name, fit.state_dict, variant.arguments


def push(package: Package, repository: str, licence: str | None = None, private: bool = False) -> str:
    """Upload a model to the hub, with the login of huggingface_hub; a card that is there stays.

    Args:
        package: What `pack` returned.
        repository: `OWNER/NAME`; made if it is not there.
        licence: As for `Package.write`.
        private: Make it private, if it is made.

    Returns:
        Address of the commit.

    Raises:
        DownloadError: The hub refuses, cannot be reached, or no network may be used.
    """
    if is_offline():
        raise DownloadError(f'{repository}: no network may be used (VISIONSSM_OFFLINE, HF_HUB_OFFLINE)')
    from huggingface_hub import HfApi

    api = HfApi(library_name='visionssm', library_version=__version__)

    def upload() -> str:
        identifier = api.create_repo(repository, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            package.write(Path(folder), identifier, licence)
            if api.file_exists(identifier, 'README.md'):
                Path(folder, 'README.md').unlink()
            return str(api.upload_folder(
                repo_id=identifier, folder_path=folder, commit_message=f"Add {package.config['architecture']}"))

    return str(_reach_hub(upload))


def pull(place: str) -> Package:
    """Read a model in the layout of the hub.

    Args:
        place: A folder, or `hf-hub:OWNER/NAME[@REVISION]`.

    Returns:
        The model, whose weights are those of the model that the configuration names.

    Raises:
        FileNotFoundError: The folder, or a file in it, is not there.
        DownloadError: The hub has no such repository or cannot be reached.
        CheckpointError: A file is damaged, or the weights are of another model.
    """
    if place.startswith(HUB):
        repository = place.removeprefix(HUB)
        config_path = Path(_reach_hub(lambda: download_from_hf(repository, 'config.json')))
        weights = Path(_reach_hub(lambda: _download_weights(repository)))
    else:
        folder = Path(place.removeprefix('local-dir:'))
        config_path = folder / 'config.json'
        weights = next((folder / name for name in (_WEIGHTS, _OLD_WEIGHTS) if (folder / name).is_file()),
                       folder / _WEIGHTS)
        for path in (config_path, weights):
            if not path.is_file():
                raise FileNotFoundError(f'There is no file {str(path)!r}; a folder of visionssm push has config.json '
                                        f'and {_WEIGHTS}.')
    try:
        config = dict(json.loads(config_path.read_text(encoding='utf-8')))
    except ValueError as error:
        raise CheckpointError(f'{config_path} is damaged: {error}.') from error
    name = config.get('architecture')
    if not isinstance(name, str) or not (timm.is_model(name) or task_of(name)):
        raise CheckpointError(f'{config_path} names the model {name!r}, which neither timm nor visionssm has.')
    metadata = {**read_metadata(weights), 'config': json.dumps(config)}
    return pack(Source(weights, '', load_state_dict(weights), metadata=metadata))


def _download_weights(repository: str) -> str:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return str(download_from_hf(repository, _WEIGHTS))
    except EntryNotFoundError:
        return str(download_from_hf(repository, _OLD_WEIGHTS))


def _reach_hub(work: Callable[[], str | os.PathLike]) -> str | os.PathLike:
    """Do something with the hub; its errors become ours."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # the bases of the hub's error are those of the HTTP library that it uses
    errors: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, EntryNotFoundError)
    try:
        return work()
    except errors as error:
        reason = f'{error} ({error.__cause__})' if error.__cause__ else str(error)
        raise DownloadError(' '.join(reason.split())) from error
