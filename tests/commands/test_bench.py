"""`visionssm bench` and the timing behind it: what is run, how often, and what is said about it. No time is tested."""
import functools
import multiprocessing
import os
import signal
import threading
import time
import types

import pytest
import torch

from visionssm.analysis.timing import (
    Timing,
    alternate,
    check_threads,
    describe_machine,
    peak_memory,
    run_apart,
    runs_for,
    timed,
)
from visionssm.commands.bench import Case, build_run, compare_models

CPU = torch.device('cpu')


def test_contestants_run_in_alternation_after_the_warmup():
    order: list[str] = []
    times = alternate({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, CPU, 2, 1, {'a': 1, 'b': 2})
    assert ''.join(order) == 'ab' 'abb' 'abb'
    assert len(times['a'].rounds) == 2 and 0 <= times['b'].least <= times['b'].median
    with pytest.raises(ValueError, match='rounds is 0'):
        alternate({'a': int}, CPU, 0)


def test_speeds_are_medians_of_ratios_within_rounds():
    # the machine is slower in the second half, for both
    first, other = Timing([10, 10, 30, 30, 30], 10), Timing([5, 5, 15, 10, 15], 5)
    assert first.median == 30 and first.speed_of(other) == (2, 2, 2)
    assert Timing([8], 8).speed_of(Timing([2], 2)) == (4, 4, 4)


def test_the_peak_of_memory_is_what_tensors_hold_at_once_to_the_byte():
    kept = []

    def work() -> None:
        first = torch.ones(4_000)
        del first
        kept.append(torch.ones(1_000))
        torch.ones(8_000)
        kept.clear()

    assert peak_memory(work, CPU) == 36_000
    assert peak_memory(work, CPU) == 36_000, 'memory that was freed counts again'


def test_an_accelerator_is_timed_by_events_on_its_stream(monkeypatch):
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: str) -> None:
            order.append(f'record on {stream}')

        def elapsed_time(self, end: 'Event') -> float:
            assert end is not self and order[-1] == 'wait'
            return 2.5

    device = torch.device('xpu')
    stream = types.SimpleNamespace(Event=Event, current_stream=lambda device: 'stream')
    monkeypatch.setattr(torch, 'get_device_module', lambda device: stream)
    monkeypatch.setattr(torch.accelerator, 'synchronize', lambda device: order.append('wait'))
    assert timed(lambda: order.append('run'), device) == 2.5
    assert order == ['wait', 'record on stream', 'run', 'record on stream', 'wait']
    monkeypatch.setattr(torch, 'get_device_module', lambda device: types.SimpleNamespace())
    order.clear()
    assert timed(lambda: order.append('run'), device) > 0 and order == ['wait', 'run', 'wait']


def test_quick_contestants_run_more_often():
    assert runs_for({'quick': int, 'slow': lambda: time.sleep(.02)}, CPU, .01)['slow'] == 1
    assert runs_for({'quick': int}, CPU, .01)['quick'] > 10


def test_a_process_that_ends_early_does_not_end_this_one():
    with pytest.raises(ChildProcessError, match='memory ran out'):
        run_apart(os._exit, 3)


@pytest.fixture
def hears_interrupts():
    """Listen to interrupts: a shell without a terminal starts what runs in its background deaf to them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, 'pthread_sigmask'), reason='needs signals of POSIX')
def test_an_interrupt_ends_a_process_apart_which_does_not_see_it_itself(hears_interrupts):
    assert signal.SIGINT in run_apart(signal.pthread_sigmask, signal.SIG_BLOCK, ())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    main = threading.main_thread().ident
    threading.Timer(.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_apart(time.sleep, 60)
    assert not multiprocessing.active_children() and time.monotonic() - begin < 55, 'it waited for the process'


def test_a_machine_is_described():
    about = describe_machine(CPU)
    assert about['torch'] == torch.__version__ and about['threads'] == torch.get_num_threads()


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='cores are counted otherwise')
def test_more_threads_than_cores_are_told_and_absurdly_many_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 2, 5})
    check_threads(3)
    assert capsys.readouterr().err == ''
    check_threads(24)
    assert capsys.readouterr().err.startswith('warning: --threads 24 is more than the 3 core(s) that this process')
    done = run('bench', 'vmamba_pico', '--threads', 1000)
    assert done.code == 1 and done.out == ''
    assert done.err.startswith('error: --threads 1000 is more than the 3 core(s)')
    assert done.err.endswith('give --threads 3 or fewer\n')


@pytest.mark.parametrize('case', [Case('vmamba_pico', 2, 64), Case('vim_pico', dtype='bfloat16'),
                                  Case('mamba_yolo_pico', train=True), Case('dis_pico'), Case('mhs_vm_unet_pico'),
                                  Case('test_vit', size=64),
                                  Case('vssd_pico', 2, train=True, channels_last=True, update=True)],
                         ids=lambda case: case.model)
def test_models_of_every_task_and_of_timm_run(case):
    run, side = build_run(case)
    run()
    assert side == case.size or case.size is None


def test_rows_say_what_was_measured():
    first, second = compare_models([Case('vmamba_pico', 2, 32), Case('vssd_pico', 2, 32)], 3, 0, progress=False)
    assert (first['model'], first['batch_size'], first['size'], first['speed']) == ('vmamba_pico', 2, 32, 1)
    assert len(second['rounds_ms']) == 3 and second['peak_memory'] is None
    assert second['images_per_s'] == pytest.approx(2000 / second['ms'])
    low, high = second['speed_quartiles']
    assert low <= second['speed'] <= high


def test_a_model_that_does_not_run_leaves_the_others_their_rows():
    cases = [Case('mamba_yolo_pico', 1, 65), Case('vmamba_pico', 1, 32)]
    failed, ran = compare_models(cases, 2, 0, progress=False, keep_going=True)
    assert 'does not run with inputs of (1, 3, 65, 65)' in failed['error'] and 'ms' not in failed
    assert ran['speed'] == 1 and 'error' not in ran
    with pytest.raises(ValueError, match='does not run'):
        compare_models(cases, 2, 0, progress=False)


def test_each_model_is_compiled_for_its_own_size(monkeypatch):
    graphs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor | torch.SymInt]):
        graphs.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph

    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=1):  # beyond which models would run uncompiled
        for size in (32, 64):
            cases = [Case('test_convnext', batch, size, compiled=True) for batch in (1, 2, 3)]
            compare_models(cases, 1, 0, progress=False)
    assert graphs == [False] * 6


def test_json_holds_all_combinations_alone_on_standard_output(run):
    threads = torch.get_num_threads()
    done = run('bench', 'vmamba_pico', '--batch-size', 1, 2, '--size', 32, 64, '--rounds', 1, '--warmup', 0,
               '--threads', 1, '--json')
    assert done.code == 0 and done.json['environment']['threads'] == 1 and torch.get_num_threads() == threads
    assert [(row['size'], row['batch_size']) for row in done.json['results']] == [(32, 1), (32, 2), (64, 1), (64, 2)]


def test_the_peak_of_memory_is_the_last_column(run):
    done = run('bench', 'vmamba_pico', '--batch-size', 1, 16, '--size', 64, '--rounds', 1, '--warmup', 0, '--memory')
    small, large = (float(line.split()[-1]) for line in done.out.splitlines()[-2:])
    assert done.code == 0 and .05 < small < 1 and 8 * small < large < 32 * small


def test_what_cannot_be_measured_ends_in_one_line(run):
    for arguments, text in ((('vmamba_pcio',), "Did you mean 'vmamba_pico'"),
                            (('mamba_yolo_pico', '--size', 65), 'mamba_yolo_pico does not run with inputs of'),
                            (('vmamba_pico', '--device', 'nonsense'), 'nonsense')):
        done = run('bench', *arguments)
        assert done.code == 1 and done.out == '' and text in done.err and done.err.startswith('error: ')
    assert run('bench', 'vmamba_pico', '--rounds', 0).code == 2
