"""The Triton kernels compile for real targets; the compiler needs no device, so this runs on any machine."""
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip('triton', reason='triton is not installed')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('TRITON_INTERPRET=1 replaces the compiler', allow_module_level=True)

if tuple(int(part) for part in triton.__version__.split('.')[:2]) < (3, 6):
    pytest.skip(f'written for the compiler interface of Triton 3.6 and newer, this is {triton.__version__}',
                allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from visionssm_kernels.nc_ssd import triton_impl as nc_ssd  # noqa: E402
from visionssm_kernels.selective_scan import triton_impl  # noqa: E402
from visionssm_kernels.ssd import triton_impl as ssd  # noqa: E402
from visionssm_kernels.wavefront_scan_2d import triton_impl as wavefront  # noqa: E402

HOPPER, MI300 = ('cuda', 90, 32), ('hip', 'gfx942', 64)
POINTERS = {torch.float64: '*fp64', torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16',
            torch.int32: '*i32'}


@pytest.fixture(autouse=True, scope='module')
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this run's own: what a test has compiled, the next need not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_CACHE_DIR', str(tmp_path_factory.mktemp('triton')))
        yield


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launch = {}

    def __getitem__(self, grid):
        return lambda **kwargs: self.launch.update(kwargs)

    def source(self):
        """The launch as Triton specialises it: None, constexprs and integers of 1 are part of the kernel.

        What is divisible by 16, as the address of a tensor is, is known to be so.
        """
        signature, constants, hints = {}, {}, {}
        for i, param in enumerate(self.kernel.params):
            value = self.launch[param.name]
            known = param.is_constexpr or value is None
            if known or (isinstance(value, int) and value == 1 and not param.annotation_type):
                signature[param.name], constants[(i,)] = 'constexpr', value
            elif isinstance(value, torch.Tensor):
                signature[param.name] = POINTERS[value.dtype]
            else:
                signature[param.name] = param.annotation_type or 'i32'
            if not known and (isinstance(value, torch.Tensor) or value % 16 == 0):
                hints[(i,)] = [['tt.divisibility', 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=hints)

    def options(self):
        return {name: self.launch[name] for name in ('num_warps', 'num_stages')}


def record(monkeypatch, dtype, batch=2, routes=1, dim=96, length=200, state=16, constant=False, full=True, index=False,
           innermost='positions'):
    """Runs both launchers with recorders in place of the kernels."""
    recorders = [Recorder(triton_impl._scan_forward_kernel), Recorder(triton_impl._scan_backward_kernel)]
    monkeypatch.setattr(triton_impl, '_scan_forward_kernel', recorders[0])
    monkeypatch.setattr(triton_impl, '_scan_backward_kernel', recorders[1])
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    u, delta = torch.ones(batch, 1, dim, length, dtype=dtype), torch.ones(batch, routes, dim, length, dtype=dtype)
    if innermost == 'channels':
        u, delta = (x.mT.contiguous().mT for x in (u, delta))
    A, D = -torch.ones(routes, dim, state, dtype=parameter), torch.ones(routes, dim, dtype=parameter) if full else None
    B = A.to(dtype) if constant else torch.ones(batch, routes, 1, state, length, dtype=dtype)
    z = torch.ones_like(delta) if full else None
    table = torch.arange(length, dtype=torch.int32).repeat(routes, 1) if index else None
    args, flags = (u, delta, A, B, B, D, z, D, table), (full, not index, routes > 1)
    out, last_state, checkpoints = triton_impl.forward(*args, *flags)
    triton_impl.backward(torch.ones_like(out), None, *args, checkpoints, *flags)
    return recorders


def spills(built, folder: Path) -> str:
    """Bytes that a compiled kernel spills from registers, as the assembler reports them."""
    (folder / 'kernel.ptx').write_text(built.asm['ptx'])
    report = subprocess.run(
        [get_ptxas(90).path, '-v', '--gpu-name=sm_90a', 'kernel.ptx', '-o', 'kernel.cubin'],
        cwd=folder, capture_output=True, text=True, check=False).stderr
    found = re.search(r'(\d+) bytes spill stores', report)
    assert found, report
    return found.group(1)


@pytest.mark.parametrize(('target', 'options'), [
    pytest.param(HOPPER, {'dtype': torch.float32}, id='sm90-float32'),
    pytest.param(HOPPER, {'dtype': torch.bfloat16, 'routes': 4, 'state': 1, 'index': True, 'full': False},
                 id='sm90-bfloat16-routes'),
    pytest.param(HOPPER, {'dtype': torch.float64, 'constant': True}, id='sm90-float64-constant'),
    pytest.param(HOPPER, {'dtype': torch.float16, 'batch': 1, 'dim': 1, 'length': 1, 'state': 1}, id='sm90-ones'),
    pytest.param(MI300, {'dtype': torch.float32, 'routes': 2, 'index': True, 'full': False}, id='gfx942-routes'),
])
def test_both_kernels_compile_to_machine_code(monkeypatch, target, options):
    for recorder in record(monkeypatch, **options):
        built = triton.compile(recorder.source(), target=GPUTarget(*target), options=recorder.options())
        assert len(built.asm['cubin' if target is HOPPER else 'hsaco']) > 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
def test_full_tiles_stay_in_registers(monkeypatch, tmp_path: Path, dtype):
    for recorder in record(monkeypatch, dtype):
        built = triton.compile(recorder.source(), target=GPUTarget(*HOPPER), options=recorder.options())
        assert spills(built, tmp_path) == '0'


@pytest.mark.parametrize('options', [{}, {'routes': 4, 'index': True}], ids=['natural', 'routes'])
def test_innermost_channels_are_read_and_written_in_vectors(monkeypatch, options):
    recorders = record(monkeypatch, torch.float32, innermost='channels', **options)
    for recorder, loads, stores in zip(recorders, (3, 5), (1, 3), strict=True):
        built = triton.compile(recorder.source(), target=GPUTarget(*HOPPER), options=recorder.options())
        # u, delta, z, and in the backward pass the next steps and dout; out, or du, ddelta and dz
        assert len(re.findall(r'ld\.global\S*\.v4\.b32', built.asm['ptx'])) >= loads
        assert len(re.findall(r'st\.global\S*\.v4\.b32', built.asm['ptx'])) == stores


def record_wavefront(monkeypatch, dtype, dim=96, size=(28, 28), state=16, full=True):
    """Runs both launchers of the wavefront scan with recorders in place of the kernels."""
    recorders = [Recorder(wavefront._wavefront_forward_kernel), Recorder(wavefront._wavefront_backward_kernel)]
    monkeypatch.setattr(wavefront, '_wavefront_forward_kernel', recorders[0])
    monkeypatch.setattr(wavefront, '_wavefront_backward_kernel', recorders[1])
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    u, B = torch.ones(2, dim, *size, dtype=dtype), torch.ones(2, state, *size, dtype=dtype)
    A, D = -torch.ones(dim, state, dtype=parameter), torch.ones(dim, dtype=parameter) if full else None
    args = (u, u, u, A, A, B, B, B, D, D, D)
    out, checkpoints = wavefront.forward(*args, full, not full)
    wavefront.backward(torch.ones_like(out), *args, checkpoints, full, not full)
    return recorders


@pytest.mark.parametrize(('target', 'options'), [
    pytest.param(HOPPER, {'dtype': torch.float32}, id='sm90-float32'),
    pytest.param(HOPPER, {'dtype': torch.bfloat16, 'dim': 1, 'size': (1, 1), 'state': 1, 'full': False},
                 id='sm90-ones'),
    pytest.param(HOPPER, {'dtype': torch.float64, 'size': (3, 200), 'dim': 17}, id='sm90-float64-parts'),
    pytest.param(MI300, {'dtype': torch.float16, 'full': False}, id='gfx942-float16'),
])
def test_both_wavefront_kernels_compile_to_machine_code(monkeypatch, target, options):
    for recorder in record_wavefront(monkeypatch, **options):
        built = triton.compile(recorder.source(), target=GPUTarget(*target), options=recorder.options())
        assert len(built.asm['cubin' if target is HOPPER else 'hsaco']) > 0


def test_full_tiles_of_the_wavefront_stay_in_registers(monkeypatch, tmp_path: Path):
    for recorder in record_wavefront(monkeypatch, torch.float32, size=(56, 56)):
        built = triton.compile(recorder.source(), target=GPUTarget(*HOPPER), options=recorder.options())
        assert spills(built, tmp_path) == '0'


def record_nc_ssd(monkeypatch, stage, dtype, length=3136, heads=2, size=64, groups=1, state=64, skip=True):
    """Runs one launcher of the non-causal SSD with recorders in place of the kernels."""
    names = ('_sum_kernel', '_read_kernel', *(('_contract_kernel',) if stage == 'backward' else ()))
    recorders = {name: Recorder(getattr(nc_ssd, name)) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(nc_ssd, name, recorder)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    x, B = torch.ones(2, length, heads, size, dtype=dtype), torch.ones(2, length, groups, state, dtype=dtype)
    A, dt = torch.ones(heads, dtype=parameter), torch.ones(2, length, heads, dtype=parameter)
    args, state = (x, dt, A, B, B, A if skip else None), A.new_ones(2, heads, state, size)
    if stage == 'forward':
        nc_ssd.forward(*args, True)
    else:
        nc_ssd.backward(x, *args, state, True)
    return recorders.values()


@pytest.mark.parametrize('stage', ['forward', 'backward'])
@pytest.mark.parametrize(('target', 'options'), [
    pytest.param(HOPPER, {'dtype': torch.float32}, id='sm90-float32'),
    pytest.param(HOPPER, {'dtype': torch.bfloat16, 'length': 1, 'heads': 1, 'size': 1, 'state': 1, 'skip': False},
                 id='sm90-ones'),
    pytest.param(HOPPER, {'dtype': torch.float64, 'groups': 2, 'size': 24}, id='sm90-float64-groups'),
    pytest.param(MI300, {'dtype': torch.float16, 'state': 200}, id='gfx942-float16'),
])
def test_kernels_of_the_non_causal_ssd_compile_to_machine_code(monkeypatch, stage, target, options):
    for recorder in record_nc_ssd(monkeypatch, stage, **options):
        built = triton.compile(recorder.source(), target=GPUTarget(*target), options=recorder.options())
        assert len(built.asm['cubin' if target is HOPPER else 'hsaco']) > 0


def test_tiles_of_the_non_causal_ssd_stay_in_registers(monkeypatch, tmp_path: Path):
    for recorder in record_nc_ssd(monkeypatch, 'backward', torch.float32):
        built = triton.compile(recorder.source(), target=GPUTarget(*HOPPER), options=recorder.options())
        assert spills(built, tmp_path) == '0'


def record_ssd(monkeypatch, stage, dtype, length=197, heads=4, size=64, groups=1, state=64, full=True):
    """Runs one launcher of the scan of Mamba-2 with recorders in place of the kernels."""
    names = ('_chunk_states_kernel', '_pass_states_kernel',
             '_output_kernel' if stage == 'forward' else '_gradient_kernel')
    recorders = {name: Recorder(getattr(ssd, name)) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(ssd, name, recorder)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    x, B = torch.ones(2, length, heads, size, dtype=dtype), torch.ones(2, length, groups, state, dtype=dtype)
    A, states = -torch.ones(heads, dtype=parameter), torch.ones(2, heads, size, state, dtype=parameter)
    D = torch.ones(heads, size, dtype=parameter) if full else None
    args = (x, x[..., 0], A, B, B, D, x if full else None, A if full else None, states if full else None)
    flags = (full, 0., float('inf'), not full)
    if stage == 'forward':
        ssd.forward(*args, *flags)
    else:
        ssd.backward(x, states if full else None, *args, torch.ones(2, heads, 4, size, state, dtype=parameter), *flags)
    return recorders.values()


@pytest.mark.parametrize('stage', ['forward', 'backward'])
@pytest.mark.parametrize(('target', 'options'), [
    pytest.param(HOPPER, {'dtype': torch.float32}, id='sm90-float32'),
    pytest.param(HOPPER, {'dtype': torch.bfloat16, 'size': 128, 'state': 128}, id='sm90-bfloat16-wide'),
    pytest.param(HOPPER, {'dtype': torch.float16, 'length': 1, 'heads': 1, 'size': 1, 'state': 1, 'full': False},
                 id='sm90-ones'),
    pytest.param(HOPPER, {'dtype': torch.float64, 'groups': 2, 'size': 24}, id='sm90-float64-groups'),
    pytest.param(MI300, {'dtype': torch.float16, 'state': 200, 'full': False}, id='gfx942-float16'),
])
def test_kernels_of_mamba2_compile_to_machine_code(monkeypatch, stage, target, options):
    for recorder in record_ssd(monkeypatch, stage, **options):
        built = triton.compile(recorder.source(), target=GPUTarget(*target), options=recorder.options())
        assert len(built.asm['cubin' if target is HOPPER else 'hsaco']) > 0


@pytest.mark.parametrize('stage', ['forward', 'backward'])
def test_tiles_of_mamba2_hardly_leave_the_registers(monkeypatch, tmp_path: Path, stage):
    for recorder in record_ssd(monkeypatch, stage, torch.float32):
        built = triton.compile(recorder.source(), target=GPUTarget(*HOPPER), options=recorder.options())
        assert int(spills(built, tmp_path)) <= 1024 and built.metadata.shared <= 96 << 10
