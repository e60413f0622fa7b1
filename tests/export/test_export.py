"""Files that the export writes, run beside the models."""
import json
from pathlib import Path

import pytest
import torch

import visionssm
from visionssm.checkpoints import load_state_dict
from visionssm.export import compare_onnx, example_inputs, export_archive, export_onnx
from visionssm.export.tool import export

pytestmark = pytest.mark.export
pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

# one of every kind of scan
ONE_OF_EACH = ('vim_pico', 'vmamba_pico', 'vssd_pico', 'spatial_mamba_pico', 'mamba2d_pico')


def build(name: str, **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return visionssm.create_model(name, **kwargs).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_onnx_runtime_gives_what_the_model_gives_for_any_number_of_pictures(name: str, tmp_path: Path):
    model = build(name)
    inputs = example_inputs(model)
    path = export_onnx(model, tmp_path / 'model.onnx', inputs, dynamic_batch=True)
    assert compare_onnx(model, path, inputs, 0).error < 1e-4
    assert compare_onnx(model, path, example_inputs(model, batch=3, seed=1), 0).error < 1e-4


@pytest.fixture(scope='module')
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp('onnx')
    path = folder / 'vssd.onnx'
    out = folder / 'out.txt'
    with pytest.MonkeyPatch.context() as patch:
        stream = out.open('w')
        patch.setattr('sys.stdout', stream)
        code = export(['vssd_pico', '--num-classes', '7', '--size', '40', '56', '-o', str(path), '--json',
                       '--runs', '1'])
        stream.close()
    assert code == 0
    return path, json.loads(out.read_text())


def test_the_tool_reports_the_difference_and_the_times(exported: tuple[Path, dict]):
    path, result = exported
    assert result['relative_error'] < 1e-4 and result['onnxruntime_ms'] > 0 and result['pytorch_ms'] > 0
    assert result['inputs'] == {'input': [1, 3, 40, 56]} and result['file'] == str(path)


def test_a_graph_has_standard_operators_alone_and_says_what_it_is(exported: tuple[Path, dict]):
    import onnx
    model = onnx.load(exported[0])
    onnx.checker.check_model(model)
    assert {entry.domain for entry in model.opset_import} <= {'', 'ai.onnx', 'pkg.onnxscript.torch_lib.common'}
    assert {node.domain for node in model.graph.node} == {''}
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert notes['architecture'] == 'vssd_pico' and json.loads(notes['mean'])


def test_nothing_but_the_file_is_left_in_the_folder(exported: tuple[Path, dict]):
    assert sorted(file.name for file in exported[0].parent.iterdir()) == ['out.txt', 'vssd.onnx']


@pytest.mark.parametrize('keep_ops', [False, True])
def test_an_archive_gives_what_the_model_gives(keep_ops: bool, tmp_path: Path):
    model = build('vssd_pico')
    inputs = example_inputs(model)
    path = export_archive(model, tmp_path / 'model.pt2', inputs, keep_ops=keep_ops)
    program = torch.export.load(path)
    ours = [node for node in program.graph.nodes if str(node.target).startswith('visionssm')]
    assert bool(ours) == keep_ops
    torch.testing.assert_close(program.module()(*inputs.tensors), model(*inputs.tensors), rtol=1e-4, atol=1e-5)


def test_exported_weights_load_again(tmp_path: Path):
    path = tmp_path / 'weights.safetensors'
    assert export(['vim_pico', '--format', 'safetensors', '--num-classes', '3', '-o', str(path)]) == 0
    assert load_state_dict(path)['head.weight'].shape[0] == 3


@pytest.mark.parametrize(('arguments', 'message'), [
    (['vim_picc'], 'vim_pico'),
    (['vssd_pico', '-o', 'model.txt'], 'ends in .onnx'),
    (['vssd_pico', '--format', 'torch-export', '-o', 'model.onnx'], 'ends in .pt2'),
    (['vssd_pico', '--size', '0'], 'size is 0'),
    (['vssd_pico', '--size', '1', '2', '3'], 'a height and a width'),
    (['vssd_pico', '--checkpoint', 'missing.pth'], 'missing.pth'),
])
def test_bad_input_ends_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture,
                                    tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert export(arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith('error: ') and message in lines[-1]
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_mode_is_refused(tmp_path: Path):
    model = build('vssd_pico')
    inputs = example_inputs(model)
    with pytest.raises(ValueError, match='training mode'):
        export_onnx(model.train(), tmp_path / 'model.onnx', inputs)
