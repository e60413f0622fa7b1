"""The registry of models of other tasks, and official files that hold a tensor under two names."""
import pytest
import torch
from torch import nn

import visionssm
from visionssm.models._official import Official, families
from visionssm.models._tasks import register_task_model, task_models

OFFICIAL = Official(
    classes=('Toy',),
    keys=lambda official_class: (('fc.{}', 'head.{}'),),
    build=lambda official_class, config: nn.Linear(1, 1),
    infer=lambda state_dict: ('Toy', {}),
    tidy=lambda state_dict: {key: value for key, value in state_dict.items() if key != 'epoch'},
    aliases=(('copy.{}', 'fc.{}'),),
)
one, two = torch.ones(1), torch.ones(1) * 2


@pytest.mark.parametrize('given', [
    {'fc.weight': one, 'copy.weight': two}, {'copy.weight': two, 'fc.weight': one, 'epoch': 3}, {'copy.weight': one},
    {'fc.weight': one}], ids=['both', 'the other order', 'the copy', 'the original'])
def test_a_tensor_under_two_names_is_read_once_and_the_original_wins(given: dict):
    assert OFFICIAL.settle(given) == {'fc.weight': one}


def test_a_tensor_under_two_names_is_written_under_both():
    assert OFFICIAL.repeat({'fc.weight': one, 'norm.bias': two}) == {
        'copy.weight': one, 'fc.weight': one, 'norm.bias': two}


def test_a_family_without_copies_keeps_its_entries_and_their_order():
    plain = Official(OFFICIAL.classes, OFFICIAL.keys, OFFICIAL.build, OFFICIAL.infer)
    weights = {'copy.weight': two, 'fc.weight': one}
    assert list(plain.settle(weights)) == list(plain.repeat(weights)) == list(weights)


def test_families_of_all_folders_are_known():
    assert {'vim', 'mhs_vm'} <= set(families())


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="Unknown task 'segmentatoin'. Did you mean 'segmentation'"):
        register_task_model('segmentatoin')


def test_registered_functions_stay_functions():
    from visionssm.segmentation import mhs_unet
    assert task_models()['segmentation']['mhs_vm_unet_pico'] is mhs_unet.mhs_vm_unet_pico
    assert isinstance(mhs_unet.mhs_vm_unet_pico(), nn.Module)


def test_a_name_of_no_task_is_unknown_everywhere():
    with pytest.raises(ValueError, match="Unknown model 'mhs_vm_unet_pio'. Did you mean 'mhs_vm_unet_pico'"):
        visionssm.create_model('mhs_vm_unet_pio')
