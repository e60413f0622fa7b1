"""Pytest plugin that points timm's own model tests at this package's models.

It replaces `timm.list_models` and `timm.list_pretrained` before the test module is collected, and drops the tests that
name timm's own architectures.
"""
import re
from collections.abc import Iterable
from functools import cache

import pytest
import timm
import torch

import visionssm

TIMM_LIST_MODELS = timm.list_models  # before it is replaced below
# sizes differ in widths and depths alone; picos are of their own and stay
SIZES = ('nano', 'micro', 'tiny', 'small', 'base')
SIZE = re.compile(f'_({"|".join(SIZES)})(_s2l[0-9]+)?')
# the facts that the tests of configurations look at
READ = ('num_classes', 'input_size', 'fixed_input_size', 'min_input_size', 'pool_size', 'classifier', 'first_conv')


@cache
def is_token_model(name: str) -> bool:
    """Token models keep (B, L, C) in forward_features; timm tests them apart from those with maps."""
    model = timm.create_model(name, device='meta').eval()  # one image is no batch for BatchNorm
    return model.forward_features(torch.empty(1, *model.default_cfg['input_size'], device='meta')).ndim == 3


def ours(include_tags: bool = False) -> list[str]:
    names = set(visionssm.list_models('classification'))
    return [name for name in TIMM_LIST_MODELS(include_tags=include_tags) if name.split('.')[0] in names]


def told_apart() -> list[str]:
    """Names with tags; the smallest stands for all sizes and tags that run the same code by the same facts."""
    first = {}
    for name in sorted(ours(include_tags=True), key=size):
        facts = timm.get_pretrained_cfg(name).to_dict()
        version = SIZE.sub('', name.split('.')[0])
        first.setdefault((version, str([facts.get(key) for key in READ])), name)
    return list(first.values())


def size(name: str) -> tuple[int, str]:
    found = SIZE.search(name)
    return SIZES.index(found[1]) if found else -1, name


def small() -> list[str]:
    return [name for name in ours() if name.endswith('_pico')]


def list_models(
        filter: str | Iterable[str] = '',
        module: str | Iterable[str] = '',
        pretrained: bool = False,
        exclude_filters: str | Iterable[str] = '',
        name_matches_cfg: bool = False,
        include_tags: bool | None = None,
) -> list[str]:
    """Answer the calls of timm's test module: a model of each version where facts are looked at, else the small ones.

    The two tests of configurations ask for tags; the one for token models gives its patterns as the filter.
    """
    if pretrained or isinstance(filter, str) and filter:
        return []
    if include_tags:
        return [name for name in told_apart() if is_token_model(name) == bool(filter)]
    return small()


def pytest_configure(config: pytest.Config) -> None:
    timm.list_models = list_models
    timm.list_pretrained = lambda *args, **kwargs: []
    torch.set_num_threads(1 if hasattr(config, 'workerinput') else 2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = set(ours(include_tags=True)) | set(ours())
    kept, dropped = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        (kept if params.get('model_name') in names else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
