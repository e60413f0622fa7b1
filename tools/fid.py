"""Compare drawn pictures with real ones: python tools/fid.py DRAWN REAL --extractor vim_pico --checkpoint FILE."""
import sys

try:
    from visionssm.openmmlab.diffusion.fidelity import run_fid
except ImportError as error:
    sys.exit(f'{error}\nMeasuring pictures needs the package and its extras: pip install -e .[mm,diffusion]')

if __name__ == '__main__':
    sys.exit(run_fid())
