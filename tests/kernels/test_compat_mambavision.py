"""A published package that needs mamba_ssm, on a machine without it: MambaVision on our scan."""
import importlib.util
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec('mambavision') is None,
        reason='mambavision is not installed; pip install --no-deps mambavision einops (its weights and code are for '
               'non-commercial use)'),
    pytest.mark.skipif(
        importlib.util.find_spec('mamba_ssm') is not None, reason='mamba_ssm is installed, nothing stands in for it'),
]


@pytest.fixture
def words_of(run_python):
    """Runs code after making `model` and `x`, and returns the words that it prints.

    In a process of its own, because mambavision adds names to timm's registry.
    """
    setup = f"""
        import sys
        sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]}
        import torch
        import visionssm_kernels
        visionssm_kernels.compat.mamba_ssm()
        from mambavision import create_model
        torch.manual_seed(0)
        model = create_model('mamba_vision_T', pretrained=False)
        x = torch.randn(1, 3, 224, 224)
    """

    def run(code: str) -> list[str]:
        result = run_python('-c', textwrap.dedent(setup) + textwrap.dedent(code))
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    return run


def test_forward_and_backward_give_every_parameter_a_finite_gradient(words_of):
    words = words_of("""
        out = model(x)
        out.square().mean().backward()
        broken = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        print(*out.shape, len(broken), sum(p.numel() for p in model.parameters()))
    """)
    assert words == ['1', '1000', '0', '31794248']


def test_output_is_that_of_the_reference_scan(words_of):
    (error,) = words_of("""
        with torch.no_grad():
            out = model.eval()(x)
            with visionssm_kernels.use_backend('reference'):
                expected = model(x)
        print(float((out - expected).norm() / expected.norm()))
    """)
    assert float(error) < 1e-5
