"""Stand-ins for packages that cannot be installed without a compiler, put in place by an explicit call."""
from .stand_in import StandIn, mamba_ssm

__all__ = ['StandIn', 'mamba_ssm']
