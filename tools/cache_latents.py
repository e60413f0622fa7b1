"""Encode pictures for trainings on latents: python tools/cache_latents.py IMAGES --vae NAME --out FOLDER."""
import sys

try:
    from visionssm.openmmlab.diffusion.latents import cache_latents
except ImportError as error:
    sys.exit(f'{error}\nLatents need the package and its extras: pip install -e .[mm,diffusion]')

if __name__ == '__main__':
    sys.exit(cache_latents())
