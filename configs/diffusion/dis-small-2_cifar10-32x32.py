# DiS-S/2 on the pixels of CIFAR-10, without classes (torchvision's files below data/cifar10).
_base_ = ['../_base_/datasets/pixels.py', '../_base_/schedules/dis_1000e.py', '../_base_/diffusion_runtime.py']

model = dict(
    type='DiffusionModel',
    model=dict(name='dis_small_patch2', img_size=32, in_chans=3, num_classes=0))

data = dict(root='data/cifar10', name='torch/cifar10')
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
