"""The commands of the package that need no extra: `visionssm download` and others; see `visionssm.cli`."""
