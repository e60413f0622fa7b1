"""Which backend computes gradients: accelerators compute them in threads that see no context of the caller."""
import threading

import pytest
import torch

from visionssm.commands.doctor import OPS
from visionssm_kernels import _dispatch, nc_ssd, use_backend
from visionssm_kernels._testing import nc_ssd_inputs


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The names that were asked for whenever an op chose its backend."""
    names: list[str] = []
    original = _dispatch.requested_backend

    def note() -> str:
        names.append(original())
        return names[-1]

    monkeypatch.setattr(_dispatch, 'requested_backend', note)
    return names


def backward_in_a_thread(out: torch.Tensor) -> None:
    thread = threading.Thread(target=out.float().sum().backward)
    thread.start()
    thread.join()


def run(op: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    function, make = OPS[op]
    inputs = {name: x.requires_grad_() for name, x in make(dtype=torch.float32, device=torch.device('cpu')).items()}
    with use_backend('reference'):
        return function(**inputs), list(inputs.values())


@pytest.mark.parametrize('op', OPS)
def test_a_gradient_in_another_thread_is_computed_by_the_backend_of_its_forward_pass(op: str, asked):
    out, inputs = run(op)
    forward = len(asked)
    backward_in_a_thread(out)
    assert len(asked) > forward and set(asked) == {'reference'}
    assert all(x.grad is not None for x in inputs)


def test_a_backend_named_for_the_gradient_comes_first(asked):
    out, _ = run('nc_ssd')
    with use_backend('chunked'):
        out.sum().backward()
    assert asked == ['reference', 'chunked']


def test_without_a_name_the_gradient_chooses_for_itself(asked, monkeypatch):
    monkeypatch.delenv(_dispatch.ENV_BACKEND, raising=False)
    inputs = {name: x.requires_grad_() for name, x in nc_ssd_inputs(1, 4, 2, 3, 1, 2).items()}
    backward_in_a_thread(nc_ssd(**inputs))
    assert asked == ['auto', 'auto']
