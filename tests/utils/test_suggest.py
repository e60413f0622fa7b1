"""Suggestions for misspelt names, and foldings of long lists."""
import logging

from visionssm.utils.logging import get_logger
from visionssm.utils.suggest import did_you_mean, list_names, nearest


def test_nearest_name_comes_first():
    assert nearest('vim_tiney', ['vim_tiny', 'vim_base', 'resnet50'])[0] == 'vim_tiny'


def test_misspelt_name_is_suggested():
    assert did_you_mean('epohcs', ['epochs', 'batch_size']) == "Did you mean 'epochs'?"


def test_few_names_are_listed_when_none_is_near():
    assert did_you_mean('zzz', ['b', 'a']) == 'Allowed: a, b.'


def test_many_names_are_not_listed():
    assert did_you_mean('zzz', [f'name{i}' for i in range(50)]) == ''


def test_short_list_is_written_out():
    assert list_names(['blocks.0.w', 'blocks.1.w']) == 'blocks.0.w, blocks.1.w'


def test_long_list_is_folded_by_its_numbers():
    names = [f'blocks.{i}.{part}' for i in range(24) for part in ('w', 'b')] + ['head.w']
    assert list_names(names) == 'blocks.{0..23}.w (24), blocks.{0..23}.b (24), head.w'


def test_numbers_that_do_not_change_stay():
    assert list_names([f'net2.{i}.w' for i in range(3)], limit=2) == 'net2.{0..2}.w (3)'


def test_logger_is_the_package_s():
    assert get_logger() is logging.getLogger('visionssm')
