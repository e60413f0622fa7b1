# ISIC 2017: the official training has no threshold in the fusion, and the official evaluation again 0.4.
_base_ = 'mhs-vm-unet-4h_1xb32-300e_isic2018-256x256.py'

model = dict(model=dict(threshold=0.0))
data_root = 'data/isic2017/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
