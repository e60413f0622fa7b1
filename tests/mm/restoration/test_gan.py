"""Training against a discriminator: who learns when, precision, resumed runs, failures that are named, evaluation."""
import uuid
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MessageHub  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from PIL import Image  # noqa: E402

import visionssm  # noqa: E402
import visionssm.openmmlab.restoration  # noqa: E402, F401
from visionssm.openmmlab.check import ConfigError, check_config  # noqa: E402
from visionssm.openmmlab.checkpoint import load_any_weights, read_training_checkpoint  # noqa: E402
from visionssm.openmmlab.cli import train, train_config  # noqa: E402
from visionssm.openmmlab.hooks import NonFiniteError  # noqa: E402
from visionssm.openmmlab.restoration.gan import GANOptimConstructor, GANRestorer  # noqa: E402
from visionssm.openmmlab.restoration.restorer import ImageRestorer  # noqa: E402
from visionssm.openmmlab.runner import VisionRunner  # noqa: E402

TINY = dict(name='mambair_pico', depths=(1, 1), d_state=1)
MODEL = dict(type='GANRestorer', model=TINY, loss=dict(type='PixelLoss', sharpen=True),
             perceptual=dict(weights='random', layers={'conv1_2': 0.1}, sharpen=True),
             discriminator=dict(num_feat=4))
ADAM = dict(type='Adam', lr=1e-3, betas=(0.9, 0.99))
OPTIM = dict(constructor='GANOptimConstructor', generator=dict(optimizer=ADAM), discriminator=dict(optimizer=ADAM))


def build(**options) -> GANRestorer:
    torch.manual_seed(0)
    options = {**MODEL, **options}
    options.pop('type')
    return GANRestorer(**options)


def optimizers(model: GANRestorer, **options):
    parts = {name: dict(type='visionssm.OptimWrapper', optimizer=ADAM, **options)
             for name in ('generator', 'discriminator')}
    return build_optim_wrapper(model, dict(constructor='visionssm.GANOptimConstructor', **parts))


def batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(2, 3, 16, 16, generator=generator)
    return dict(inputs=torch.nn.functional.avg_pool2d(targets, 2), targets=targets)


@pytest.fixture
def at_step(monkeypatch):
    """A function that sets the number of the step, which the runner's hook tells elsewhere."""
    def set_step(step: int) -> None:
        monkeypatch.setattr(MessageHub, 'get_info', lambda self, key, default=None: step if key == 'iter' else default)

    set_step(0)
    return set_step


def watch_gradients(wrapper, model: GANRestorer) -> list[tuple[bool, bool]]:
    """For each update, whether the generator and whether the discriminator has gradients."""
    seen = []

    def look(*_):
        seen.append(tuple(any(param.grad is not None for param in network.parameters())
                          for network in model.players.values()))

    for part in wrapper.values():
        part.optimizer.register_step_pre_hook(look)
    return seen


def test_each_network_has_gradients_in_its_own_step_alone(at_step):
    model = build().train()
    wrapper = optimizers(model)
    seen = watch_gradients(wrapper, model)
    before = [{key: value.clone() for key, value in network.named_parameters()} for network in model.players.values()]
    logs = model.train_step(batch(), wrapper)
    assert seen == [(True, False), (False, True)]
    for network, old in zip(model.players.values(), before):
        assert any(not torch.equal(old[key], value) for key, value in network.named_parameters())
    assert set(logs) == {'loss', 'loss_pixel', 'loss_perceptual', 'loss_gan', 'loss_d', 'loss_d_real', 'loss_d_fake',
                         'd_real', 'd_fake'}
    parts = logs['loss_pixel'] + logs['loss_perceptual'] + logs['loss_gan']
    torch.testing.assert_close(logs['loss'], parts)
    torch.testing.assert_close(logs['loss_d'], logs['loss_d_real'] + logs['loss_d_fake'])
    assert all(param.requires_grad for param in model.discriminator.parameters())
    # the frozen network of the perceptual loss is no part of a checkpoint
    assert {key.partition('.')[0] for key in model.state_dict()} == {'model', 'discriminator'}


def test_the_generator_waits_and_takes_turns(at_step):
    model = build(net_d_iters=2, net_d_init_iters=3, perceptual=None).train()
    wrapper = optimizers(model)
    seen = watch_gradients(wrapper, model)
    learnt = []
    for step in range(6):
        at_step(step)
        learnt.append('loss_pixel' in model.train_step(batch(), wrapper))
    assert learnt == [False, False, False, True, False, True]
    assert seen.count((True, False)) == 2 and seen.count((False, True)) == 6


def test_the_discriminator_learns_to_tell_real_from_made(at_step):
    model = build(net_d_init_iters=99, discriminator=dict(num_feat=8)).train()
    wrapper = optimizers(model)
    wrapper['discriminator'].optimizer.param_groups[0]['lr'] = 2e-3
    logs = [model.train_step(batch(step % 2), wrapper) for step in range(10)]
    assert logs[-1]['loss_d'] < 0.5 * logs[0]['loss_d']
    assert logs[-1]['d_real'] > logs[-1]['d_fake']


def test_the_generator_wants_high_logits(at_step):
    model = build(gan=dict(weight=0.3)).train()
    data = batch()
    # two steps of the power method must not lie between the two looks at the discriminator
    model.discriminator.eval()
    losses = model(**data, mode='loss')
    restored = losses.pop('restored')
    assert restored.shape == data['targets'].shape
    wanted = torch.nn.functional.softplus(-model.discriminator(restored)).mean()
    torch.testing.assert_close(losses['loss_gan'], 0.3 * wanted)


def test_losses_are_in_float32_in_mixed_precision(at_step):
    model = build().train()
    wrapper = build_optim_wrapper(model, dict(
        constructor='visionssm.GANOptimConstructor', **{name: dict(
            type='visionssm.AmpOptimWrapper', dtype='bfloat16', optimizer=ADAM, clip_grad=dict(max_norm=1.0))
            for name in ('generator', 'discriminator')}))
    for step in range(2):
        logs = model.train_step(batch(step), wrapper)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in logs.values())
    assert {'train/generator_grad_norm', 'train/discriminator_grad_norm'} <= set(
        MessageHub.get_current_instance().log_scalars)
    with torch.autocast('cpu', dtype=torch.float16):
        found = model(**batch(), mode='loss')
        both = model(found['restored'].detach(), batch()['targets'], mode='discriminate')
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in {**found, **both}.values())


def run_config(root: Path, name: str, **overrides) -> Config:
    folder = root / 'pictures'
    if not folder.exists():
        folder.mkdir()
        rng = np.random.default_rng(0)
        for number in range(3):
            Image.fromarray(rng.integers(0, 255, (32, 36, 3), dtype=np.uint8)).save(folder / f'{number}.png')
    loader = dict(num_workers=0, collate_fn=dict(type='collate_pairs'))
    common = dict(type='PairedImages', gt='.', data_root=str(folder), scale=2, name='photos')
    step = dict(type='MultiStepLR', by_epoch=False, milestones=[1, 3], gamma=0.5)
    parts = {part: dict(optimizer=ADAM, clip_grad=dict(max_norm=norm))
             for part, norm in (('generator', 1.0), ('discriminator', 0.5))}
    return Config(dict(dict(
        default_scope='visionssm', work_dir=str(root / name), experiment_name=uuid.uuid4().hex, model=MODEL,
        train_dataloader=dict(loader, batch_size=2, sampler=dict(type='SeededSampler', infinite=True), dataset=dict(
            common, patch=16, augment=True, degrade=dict(type='SecondOrderFault', scale=2, sharpen=True, margin=4))),
        val_dataloader=dict(loader, batch_size=1, sampler=dict(type='SeededSampler', shuffle=False), dataset=dict(
            common, degrade=dict(type='BicubicFault', scale=2))),
        val_cfg=dict(), val_evaluator=dict(type='RestorationMetric', border=2),
        train_cfg=dict(by_epoch=False, max_iters=4, val_interval=2),
        optim_wrapper=dict(constructor='GANOptimConstructor', **parts),
        param_scheduler=dict(generator=[step], discriminator=[dict(step, gamma=0.1)]),
        custom_hooks=[dict(type='EMAHook', decay=0.9)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2, save_best='PSNR',
                                           rule='greater')),
        log_processor=dict(by_epoch=False), randomness=dict(seed=3), log_level='WARNING'), **overrides))


def flatten(value, place: str = '') -> dict:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {place: value}
    return {key: leaf for name, part in items for key, leaf in flatten(part, f'{place}.{name}').items()}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    cfg = run_config(tmp_path, 'run')
    check_config(cfg)
    VisionRunner.from_cfg(cfg).train()
    halfway = str(tmp_path / 'run' / 'iter_2.pth')
    VisionRunner.from_cfg(run_config(tmp_path, 'again', resume=True, load_from=halfway)).train()
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    checkpoints = [read_training_checkpoint(tmp_path / name / 'iter_4.pth') for name in ('run', 'again')]
    one, two = ({key: value for part in parts for key, value in flatten(checkpoint[part], part).items()}
                for checkpoint in checkpoints)
    assert one.keys() == two.keys()
    assert not [key for key in one if not (torch.equal(one[key], two[key]) if isinstance(one[key], torch.Tensor)
                                           else one[key] == two[key])]
    for part in ('ema_state_dict.module.discriminator', 'optimizer.discriminator.state', 'optimizer.generator.state'):
        assert any(key.startswith(part) for key in one)
    rates = {name: one[f'optimizer.{name}.param_groups.0.lr'] for name in ('generator', 'discriminator')}
    assert rates == pytest.approx({'generator': 1e-3 / 4, 'discriminator': 1e-5})
    # what is exported is the average of the generator, and stands for itself
    best = tmp_path / 'run/best/model.safetensors'
    net = visionssm.create_model('mambair_pico', checkpoint_path=best, depths=(1, 1), d_state=1)
    states = [read_training_checkpoint(tmp_path / f'run/iter_{step}.pth') for step in (2, 4)]
    weight = net.state_dict()['conv_first.weight']
    assert any(torch.equal(weight, state['state_dict']['model.conv_first.weight']) for state in states)
    assert not any(torch.equal(weight, state['ema_state_dict']['module.model.conv_first.weight']) for state in states)


def test_evaluation_and_second_stages_take_weights_of_the_generator_alone(tmp_path):
    torch.manual_seed(1)
    first = ImageRestorer(TINY)
    path = first.export(first.state_dict(), tmp_path, {})
    torch.save({'state_dict': first.state_dict()}, tmp_path / 'stage1.pth')
    for source in (path, tmp_path / 'stage1.pth'):
        model = build(init_from=str(source))
        model.init_weights()
        other = build()
        load_any_weights(other, source)
        for found in (model, other):
            assert all(torch.equal(value, first.state_dict()[key]) for key, value in found.state_dict().items()
                       if key.startswith('model.'))
    trained = tmp_path / 'stage2.pth'
    torch.save({'state_dict': model.state_dict()}, trained)
    load_any_weights(first, trained)
    # no weights of the perceptual loss are asked for where nothing is trained
    absent = build(perceptual=dict(weights='absent.pth'))
    load_any_weights(absent, trained)
    assert absent.val_step(batch())[0]['restored'].shape == (3, 16, 16)
    with pytest.raises(FileNotFoundError, match=r'absent.pth.*vgg19-dcbb9e9d.pth'):
        absent.init_weights()


@pytest.mark.parametrize(('network', 'message'), [('discriminator', r'loss_gan is nan.*discriminator.conv_last.bias'),
                                                  ('model', r'loss_pixel is nan.*model.conv_first.bias')])
def test_a_loss_that_is_not_finite_is_named(tmp_path, network, message):
    runner = VisionRunner.from_cfg(run_config(tmp_path, 'run', custom_hooks=[]))
    part = getattr(runner.bare_model, network)
    with torch.no_grad():
        (part.conv_last if network == 'discriminator' else part.conv_first).bias.fill_(float('nan'))
    with pytest.raises(NonFiniteError, match=message):
        runner.train()


def test_a_gradient_that_is_not_finite_stops_either_optimizer(tmp_path, monkeypatch):
    for name in ('generator', 'discriminator'):
        runner = VisionRunner.from_cfg(run_config(tmp_path, name, custom_hooks=[]))
        network = runner.bare_model.players[name]
        network.conv_first.weight.register_hook(lambda grad: grad * float('inf'))
        with pytest.raises(NonFiniteError, match='gradient is (nan|inf) at step 1'):
            runner.train()


def test_what_a_game_cannot_do_is_refused():
    with pytest.raises(ValueError, match='not mixed'):
        build(mixup=1.2)
    with pytest.raises(ValueError, match='net_d_iters is 0'):
        build(net_d_iters=0)
    model = build()
    with pytest.raises(ValueError, match='generator.accumulative_counts is 4'):
        optimizers(model, accumulative_counts=4)
    with pytest.raises(ValueError, match='takes constructor, generator'):
        GANOptimConstructor(dict(optimizer=ADAM))
    single = build_optim_wrapper(model, dict(type='visionssm.OptimWrapper', optimizer=ADAM))
    with pytest.raises(ValueError, match='needs two optimizers'):
        model.train_step(batch(), single)
    with pytest.raises(ValueError, match='GANRestorer, and the model is ImageRestorer'):
        GANOptimConstructor({name: dict(optimizer=ADAM) for name in ('generator', 'discriminator')})(
            ImageRestorer(TINY))
    with pytest.raises(ValueError, match='multiples of 8'):
        model(torch.rand(1, 3, 6, 6), torch.rand(1, 3, 12, 12), mode='loss')


def test_options_reach_both_optimizers(tmp_path):
    cfg = run_config(tmp_path, 'run')
    cfg.dump(tmp_path / 'gan.py')
    both = train_config(train.parse([str(tmp_path / 'gan.py'), '--amp', 'bf16'])).optim_wrapper
    assert [both[name].type for name in ('generator', 'discriminator')] == ['AmpOptimWrapper'] * 2
    cfg.optim_wrapper.discriminator.optimizer.learning_rate = 1.0
    with pytest.raises(ConfigError, match=r'optim_wrapper.discriminator.optimizer has no key .learning_rate.'):
        check_config(cfg)
