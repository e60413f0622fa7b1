# MHS-VM's U-Net with three heads on ISIC 2018; the authors state no numbers of it.
_base_ = ['../_base_/datasets/isic.py', '../_base_/schedules/isic_300e.py']

model = dict(
    type='visionssm.MedicalSegmentor',
    # the threshold of the fusion is 0.5 in the official training on ISIC 2018, and 0.4 in the official evaluation
    model=dict(name='mhs_vm_unet_3h', threshold=0.5, drop_path_rate=0.2),
    test_threshold=0.4)
