"""Reading the arguments that a registered function builds its class with, without building anything."""
import threading

from torch import nn

from visionssm.models._detect import _arguments


class Toy(nn.Module):
    def __init__(self, size: int, drop_rate: float = 0.) -> None:
        super().__init__()
        self.size = size


def test_arguments_are_read_and_defaults_filled_in():
    assert _arguments(Toy, lambda: Toy(5)) == {'size': 5, 'drop_rate': 0.}


def test_other_threads_build_models_meanwhile():
    built: list[nn.Module] = []

    def build() -> nn.Module:
        thread = threading.Thread(target=lambda: built.append(Toy(3)))
        thread.start()
        thread.join()
        return Toy(5)

    assert _arguments(Toy, build)['size'] == 5
    assert [model.size for model in built] == [3]
