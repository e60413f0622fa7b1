# VM-UNet on ISIC 2017.
_base_ = 'vm-unet_1xb32-300e_isic2018-256x256.py'

data_root = 'data/isic2017/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
