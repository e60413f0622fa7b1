# The demo's model on all 60,000 pictures: Debian's files, or torchvision's download.
_base_ = 'vim-pico_fashion-mnist.py'

source = 'auto'
train_dataloader = dict(dataset=dict(source=source))
val_dataloader = dict(dataset=dict(source=source))
test_dataloader = val_dataloader
