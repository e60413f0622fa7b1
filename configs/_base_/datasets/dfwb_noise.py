# Gaussian noise, made on the fly: good pictures of DFWB (DIV2K, Flickr2K, 400 of BSD500, 4,744 of the Waterloo
# Exploration Database) below data/: DIV2K/DIV2K_train_HR/, Flickr2K/Flickr2K_HR/, BSD400/, WED/, and for the evaluation
# data/benchmark/{CBSD68,Kodak24,McMaster,Urban100/HR}/.
_base_ = ['pairs.py']

train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        data_root='data',
        gt=['DIV2K/DIV2K_train_HR', 'Flickr2K/Flickr2K_HR', 'BSD400', 'WED'],
        degrade=dict(type='NoiseFault', sigma=15),
        patch=128))

test_sets = [dict(gt='CBSD68'), dict(gt='Kodak24'), dict(gt='McMaster'), dict(gt='Urban100/HR')]
# the noise of the published numbers, the same in every run
common = dict(degrade=dict(type='NoiseFault', sigma=15, seed=0))
val_dataloader = dict(
    dataset=dict(type='TestSets', data_root='data/benchmark', sets=test_sets[:1], common=common))
test_dataloader = dict(
    dataset=dict(
        type='TestSets', data_root='data/benchmark', sets=test_sets, common=common, skip_missing=True))

# all three colours, without cutting a border off
val_evaluator = dict(type='RestorationMetric')
test_evaluator = val_evaluator
