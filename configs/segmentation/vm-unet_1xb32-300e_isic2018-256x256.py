# VM-UNet, the baseline, by the recipe of MHS-VM. It starts from an ImageNet model of VMamba; encoder=None starts from
# random weights, as MHS-VM does.
_base_ = ['../_base_/datasets/isic.py', '../_base_/schedules/isic_300e.py']

model = dict(
    type='visionssm.MedicalSegmentor',
    model=dict(name='vm_unet', drop_path_rate=0.2),
    encoder='visionssm://vmamba_tiny_v0')
