"""Encode pictures for trainings on latents: python tools/cache_latents.py IMAGES --vae NAME --out FOLDER."""
import sys

try:
    from visionssm_launcher import run_tool
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .')

if __name__ == '__main__':
    sys.exit(run_tool('cache-latents'))
