"""Scan kernels of visionssm."""
