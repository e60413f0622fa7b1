"""Build entry: setup.cfg holds the metadata; this file finds both packages and the optional native library."""
from setuptools import find_packages, setup

setup(packages=find_packages(include=['visionssm*']) + find_packages('kernels'),
      package_dir={'visionssm_kernels': 'kernels/visionssm_kernels'})
