# A classifier trained with Mixup and CutMix as Swin's recipe has them; a config adds model.model.name.
model = dict(
    type='ImageClassifier',
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode='batch', label_smoothing=0.1),
    loss=dict(type='SoftTargetCrossEntropy'))
