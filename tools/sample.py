"""Draw pictures with a diffusion model: python tools/sample.py CONFIG CHECKPOINT --num 8 --out grid.png."""
import sys

try:
    from visionssm.openmmlab.diffusion.sample import sample
except ImportError as error:
    sys.exit(f'{error}\nSampling needs the package and its extras: pip install -e .[mm,diffusion]')

if __name__ == '__main__':
    sys.exit(sample())
