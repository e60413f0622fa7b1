"""What mmcv's environment report prints about the build."""
import torchvision

__all__ = ['get_compiler_version', 'get_compiling_cuda_version']


def get_compiler_version() -> str:
    """The compiler of mmcv's operators."""
    return f'none (visionssm, torchvision {torchvision.__version__})'


def get_compiling_cuda_version() -> str:
    """The CUDA version of mmcv's operators; mmcv's own word for a build without."""
    return 'not available'
