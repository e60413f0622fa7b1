"""Names of the bidirectional Mamba mixer in official state dicts."""

__all__ = ['bimamba_keys']


def bimamba_keys(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Return rows of (official key, our key) for a `BiMamba`.

    Args:
        theirs: Official prefix with its dot, for example 'layers.{}.mixer.'.
        ours: Our prefix with its dot.
    """
    rows = [
        (f'{theirs}in_proj.{{}}', f'{ours}in_proj.{{}}'),
        (f'{theirs}out_proj.{{}}', f'{ours}out_proj.{{}}'),
        (f'{theirs}gamma', f'{ours}gamma'),
        (f'{theirs}A_log', f'{ours}ssm.A_log'),
        (f'{theirs}A_b_log', f'{ours}ssm_b.A_log'),
    ]
    for suffix in ('', '_b'):
        rows += [
            (f'{theirs}D{suffix}', f'{ours}ssm{suffix}.D'),
            (f'{theirs}conv1d{suffix}.{{}}', f'{ours}ssm{suffix}.conv.{{}}'),
            (f'{theirs}x_proj{suffix}.{{}}', f'{ours}ssm{suffix}.x_proj.{{}}'),
            (f'{theirs}dt_proj{suffix}.weight', f'{ours}ssm{suffix}.dt_proj.weight'),
            (f'{theirs}dt_proj{suffix}.bias', f'{ours}ssm{suffix}.dt_bias'),
        ]
    return rows
