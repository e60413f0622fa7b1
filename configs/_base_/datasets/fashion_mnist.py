# Fashion-MNIST, 28 x 28 grey; source: see visionssm.openmmlab.datasets.load_fashion_mnist
source = 'auto'
data_root = None

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='SeededSampler', shuffle=True),
    collate_fn=dict(type='collate_images'),
    dataset=dict(
        type='FashionMNIST',
        split='train',
        source=source,
        root=data_root,
        transform=dict(type='ShiftFlip', shift=2, flip=0.5)))
val_dataloader = dict(
    batch_size=250,
    num_workers=0,
    sampler=dict(type='SeededSampler', shuffle=False),
    collate_fn=dict(type='collate_images'),
    dataset=dict(
        type='FashionMNIST',
        split='test',
        source=source,
        root=data_root,
        transform=dict(type='ShiftFlip')))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
