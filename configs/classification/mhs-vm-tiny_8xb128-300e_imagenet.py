# Our own recipe for the encoder of MHS-VM as a classifier, untried: the authors segment and never trained on ImageNet.
# It is that of VMamba-T, whose blocks these resemble.
_base_ = 'vmamba-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='mhs_vm_tiny', drop_path_rate=0.2))
