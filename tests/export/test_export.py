"""Files that the export writes, run beside the models."""
import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import visionssm
from visionssm.checkpoints import load_state_dict
from visionssm.export import compare, compare_onnx, example_inputs, export_archive, export_onnx, tool
from visionssm.export.inputs import Inputs

pytestmark = pytest.mark.export
pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

# what export takes follows the number of layers; two scans suffice where the format is looked at
ONE_LAYER = {'depth': 1, 'embed_dim': 16, 'd_state': 2}
SMALLEST = [name for name in visionssm.list_models() if name.endswith('_pico')]


def build(name: str, **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return visionssm.create_model(name, **kwargs).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted({*SMALLEST} - {'mhs_vm_unet_pico'}))  # that has the layers of two others
def test_onnx_runtime_gives_what_each_model_gives_for_any_number_of_pictures(
        name: str, shallow: Callable[[str], dict], tmp_path: Path):
    model = build(name, **shallow(name))
    inputs = example_inputs(model)
    path = export_onnx(model, tmp_path / 'model.onnx', inputs, dynamic_batch=True)
    assert compare_onnx(model, path, inputs, 0).error < 1e-4
    assert compare_onnx(model, path, example_inputs(model, batch=3, seed=1), 0).error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mamba2d_pico', 'mambair_pico', 'vim2_pico', 'vmamba_pico'])
def test_an_archive_of_a_model_needs_none_of_our_ops(name: str, shallow: Callable[[str], dict], tmp_path: Path):
    model = build(name, **shallow(name))
    inputs = example_inputs(model)
    program = torch.export.load(export_archive(model, tmp_path / 'model.pt2', inputs))
    assert not [node for node in program.graph.nodes if str(node.target).startswith('visionssm')]
    torch.testing.assert_close(program.module()(*inputs.tensors), model(*inputs.tensors), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp('onnx')
    path = folder / 'vim.onnx'
    out = folder / 'out.txt'
    torch.manual_seed(1)  # `build` begins at 0
    with pytest.MonkeyPatch.context() as patch, out.open('w') as stream:
        patch.setattr('sys.stdout', stream)
        patch.setattr(tool, 'create_model', functools.partial(visionssm.create_model, **ONE_LAYER))
        code = tool.export(['vim_pico', '--num-classes', '7', '--size', '40', '56', '-o', str(path), '--json',
                            '--runs', '1'])
    assert code == 0
    return path, json.loads(out.read_text())


def test_the_tool_reports_the_difference_and_the_times(exported: tuple[Path, dict]):
    path, result = exported
    assert result['relative_error'] < 1e-4 and result['onnxruntime_ms'] > 0 and result['pytorch_ms'] > 0
    assert result['inputs'] == {'input': [1, 3, 40, 56]} and result['file'] == str(path)
    assert result['pictures'] == [1] and result['nodes'] > 50


def test_a_graph_has_standard_operators_alone_and_says_what_it_is(exported: tuple[Path, dict]):
    import onnx
    model = onnx.load(exported[0])
    onnx.checker.check_model(model)
    assert {entry.domain for entry in model.opset_import} <= {'', 'ai.onnx', 'pkg.onnxscript.torch_lib.common'}
    assert {node.domain for node in model.graph.node} == {''}
    assert 'Scan' in {node.op_type for node in model.graph.node}
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert notes['architecture'] == 'vim_pico' and json.loads(notes['mean'])


def test_nothing_but_the_file_is_left_in_the_folder(exported: tuple[Path, dict]):
    assert sorted(file.name for file in exported[0].parent.iterdir()) == ['out.txt', 'vim.onnx']


def test_the_comparison_sees_other_weights(exported: tuple[Path, dict]):
    other = build('vim_pico', num_classes=7, img_size=(40, 56), **ONE_LAYER)
    assert compare_onnx(other, exported[0], example_inputs(other), 0).error > 1e-2


def test_the_comparison_refuses_other_outputs(exported: tuple[Path, dict]):
    other = build('vim_pico', num_classes=3, img_size=(40, 56), **ONE_LAYER)
    with pytest.raises(ValueError, match=r'outputs of the shapes \[.1, 7.\] and the model \[\(1, 3\)\]'):
        compare_onnx(other, exported[0], example_inputs(other), 0)


class Restless(torch.nn.Linear):
    """Multiplies rounding errors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1e5 * super().forward(x.mean((2, 3)))).sin()


def test_a_model_that_multiplies_rounding_errors_may_differ_as_much_as_from_itself(monkeypatch, tmp_path, capsys):
    model = Restless(3, 4).eval().requires_grad_(False)
    inputs = Inputs(('x',), (torch.randn(1, 3, 8, 8),))
    rounding = compare.own_rounding(model, inputs)
    assert 1e-4 < rounding < 1 and compare.own_rounding(torch.nn.Conv2d(3, 4, 1), inputs) < 1e-6
    args = argparse.Namespace(name='restless', runs=0, dynamic=False, size=None)
    for factor, fits in ((1.5, True), (2.5, False)):
        found = compare.Comparison(factor * rounding, 0., 0.)
        monkeypatch.setattr(tool, 'compare_onnx', lambda *_, found=found: found)
        if fits:
            assert tool._check(args, model, tmp_path / 'x.onnx', inputs)['own_rounding'] == pytest.approx(rounding)
            assert 'from itself in float64' in capsys.readouterr().err
        else:
            with pytest.raises(ValueError, match='do not use it'):
                tool._check(args, model, tmp_path / 'x.onnx', inputs)


def test_feature_maps_of_any_number_of_pictures_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture):
    import onnx
    monkeypatch.setattr(tool, 'create_model', functools.partial(visionssm.create_model, out_indices=[0], **ONE_LAYER))
    path = tmp_path / 'model.onnx'
    assert tool.export(['vim_pico', '--features', '--dynamic', '--runs', '0', '--json', '-o', str(path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['pictures'] == [1, 3] and result['relative_error'] < 1e-5 and 'pytorch_ms' not in result
    output, = onnx.load(path).graph.output
    batch, *shape = output.type.tensor_type.shape.dim
    assert batch.dim_param and [side.dim_value for side in shape] == [16, 7, 7]


def test_an_archive_keeps_our_ops_when_told_to(tmp_path: Path):
    model = build('vim_pico', **ONE_LAYER)
    inputs = example_inputs(model)
    program = torch.export.load(export_archive(model, tmp_path / 'model.pt2', inputs, keep_ops=True))
    assert [node for node in program.graph.nodes if str(node.target).startswith('visionssm')]
    torch.testing.assert_close(program.module()(*inputs.tensors), model(*inputs.tensors), rtol=1e-4, atol=1e-5)


def test_an_archive_runs_in_a_process_without_the_package(run_python: Callable, tmp_path: Path):
    model = build('vim_pico', **ONE_LAYER)
    export_archive(model, tmp_path / 'model.pt2', example_inputs(model), dynamic_batch=True)
    x = example_inputs(model, batch=3).tensors[0]
    torch.save({'x': x, 'y': model(x)}, tmp_path / 'example.pt')
    script = ('import sys, torch\n'
              'sys.modules["visionssm"] = sys.modules["visionssm_kernels"] = None\n'
              'example = torch.load("example.pt", weights_only=True)\n'
              'found = torch.export.load("model.pt2").module()(example["x"])\n'
              'torch.testing.assert_close(found, example["y"], rtol=1e-4, atol=1e-5)\n')
    done = run_python('-c', script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_exported_weights_load_again(tmp_path: Path):
    path = tmp_path / 'weights.safetensors'
    assert tool.export(['vim_pico', '--format', 'safetensors', '--num-classes', '3', '-o', str(path)]) == 0
    assert load_state_dict(path)['head.weight'].shape[0] == 3


def test_examples_are_what_a_model_was_built_for():
    assert example_inputs(build('dis_pico', img_size=16)).tensors[0].shape == (1, 1, 16, 16)
    assert example_inputs(build('vim_pico', img_size=(40, 56))).tensors[0].shape == (1, 3, 40, 56)
    pictures, steps, classes = example_inputs(build('dis_pico'), batch=2).tensors
    assert pictures.shape == (2, 1, 28, 28) and steps.shape == classes.shape == (2,)


@pytest.mark.parametrize(('arguments', 'message'), [
    (['vim_picc'], 'vim_pico'),
    (['vssd_pico', '-o', 'model.txt'], 'ends in .onnx'),
    (['vssd_pico', '--format', 'torch-export', '-o', 'model.onnx'], 'ends in .pt2'),
    (['vssd_pico', '-o', 'file/model.onnx'], 'is a file, and is no folder'),
    (['vim_pico', '--size', '2'], 'smaller than a patch'),
    (['dis_pico', '--size', '24', '32'], 'one number, a multiple of patch_size'),
    (['mamba_yolo_pico', '--size', '20'], 'does not run on an input of 1 x 3 x 20 x 20: '),
    (['mambair_pico', '--features'], 'is no backbone'),
    (['vssd_pico', '--checkpoint', 'missing.pth'], 'missing.pth'),
])
def test_bad_input_ends_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture,
                                    tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path('file').touch()
    assert tool.export(arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: ') and message in lines[0]
    assert [file.name for file in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('package', ['onnx', 'onnxscript', 'onnxruntime'])
def test_a_missing_extra_is_told_before_the_work(package: str, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture):
    find = tool.need.__globals__['importlib'].util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *rest: None if name == package else find(name, *rest))
    monkeypatch.setattr(tool, '_build', lambda args: pytest.fail('the model was built'))
    assert tool.export(['vssd_pico']) == 1
    error = capsys.readouterr().err
    assert f'needs {package}' in error and 'visionssm[export]' in error and len(error.strip().splitlines()) == 1


class Untraceable(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_failing_export_ends_in_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture):
    monkeypatch.setattr(tool, '_build', lambda args: Untraceable().eval())
    monkeypatch.setattr(tool, 'example_inputs', lambda *args: Inputs(('input',), (torch.ones(1, 3, 4, 4),)))
    assert tool.export(['vssd_pico', '-o', str(tmp_path / 'model.onnx')]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('error: vssd_pico could not be exported with torch') and '--debug' in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('options', 'message'), [
    (['--size', '0'], '--size 0: give'), (['--size', '1', '2', '3'], 'one number or two'),
    (['--num-classes', '-1'], '--num-classes is -1'), (['--runs', '-1'], '--runs is -1'),
    (['--pretrained', '--checkpoint', 'w.pth'], 'exclude each other')])
def test_wrong_options_end_with_code_2(options: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        tool.export(['vssd_pico', *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_model_in_training_mode_is_refused(tmp_path: Path):
    model = build('vim_pico', **ONE_LAYER)
    inputs = example_inputs(model)
    with pytest.raises(ValueError, match='training mode'):
        export_onnx(model.train(), tmp_path / 'model.onnx', inputs)
