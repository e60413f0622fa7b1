# DiS-S/2 on the pixels of CIFAR-10, with its ten classes.
_base_ = ['dis-small-2_cifar10-32x32.py']

model = dict(model=dict(num_classes=10))
