# DiS-S/2 on 64 x 64 pixels of CelebA, without classes: data/celeba/{train,val}/<any folder>/*.jpg. How the authors cut
# the faces is not published; here it is the centre crop of all their data sets.
_base_ = ['../_base_/datasets/pixels.py', '../_base_/schedules/dis_1000e.py', '../_base_/diffusion_runtime.py']

model = dict(
    type='DiffusionModel',
    model=dict(name='dis_small_patch2', img_size=64, in_chans=3, num_classes=0))

data = dict(root='data/celeba', transform=dict(size=64))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
