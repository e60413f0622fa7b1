"""The code strings that the official VMamba code names the forms of its mixer by."""

from typing import Any

__all__ = ['ss2d_options']

_ROUTES = {
    'v01': 'cross', 'v02': 'cross', 'v03': 'cross', 'v04': 'cross', 'v05': 'cross', 'v2': 'cross', 'v3': 'cross',
    'm0': 'cross', 'v051d': 'unidirectional', 'v052d': 'bidirectional', 'v052d3': 'rot90', 'v052dc': 'cascade'}
_OUT_NORMS = {
    'onnone': 'none', 'ondwconv3': 'dwconv', 'oncnorm': 'layernorm_dwconv', 'onsoftmax': 'softmax',
    'onsigmoid': 'sigmoid'}
# The official code looks for suffixes at the end of what is left, once each, in this order.
_SUFFIXES = ('no32', 'oact', 'noz', 'nozact', *_OUT_NORMS)


def ss2d_options(forward_type: str) -> dict[str, Any]:
    """Translate an official code string to arguments of `SS2D`.

    The grammar is `<base>[_on...][_nozact|_noz][_oact][_no32]`. Bases: `v0` and `v0seq`, the vanilla mixer, take no
    suffix and fix more than the form; `v01` to `v05`, `v2`, `v3` scan in the four cross directions and differ in
    kernels only; `v051d`, `v052d`, `v052d3`, `v052dc` scan along other routes; `m0` is Mamba-2's scan. Suffixes:
    `_noz`, no gate; `_nozact`, a gate without activation; `_oact`, GELU in front of the gate; `_onnone`, `_ondwconv3`,
    `_oncnorm`, `_onsoftmax`, `_onsigmoid`, other normalisations than LayerNorm; `_no32`, which only spares casts that
    are not made here.

    Args:
        forward_type: For example 'v05_noz'.

    Returns:
        The arguments `gate`, `out_norm`, `out_act`, `routes`, `ssm`, and for the vanilla mixer also those that it does
        not leave to the caller: `d_conv`, `conv_bias`, `act`, `init`.

    Raises:
        ValueError: The string has an unknown base, or an unknown suffix, or suffixes in an order that the official
            code does not read; the message names them.
    """
    if not isinstance(forward_type, str):
        raise ValueError(f"forward_type is {forward_type!r}; it must be a string such as 'v05_noz'.")
    if forward_type in ('v0', 'v0seq'):
        return {
            'gate': 'act', 'out_norm': 'layernorm', 'out_act': False, 'routes': 'cross', 'ssm': 'mamba1', 'd_conv': 3,
            'conv_bias': True, 'act': 'silu', 'init': 'v0'}
    base, found = forward_type, []
    for suffix in _SUFFIXES:
        if base.endswith(f'_{suffix}'):
            base = base.removesuffix(f'_{suffix}')
            found.append(suffix)
    norms = [suffix for suffix in found if suffix in _OUT_NORMS]
    if base not in _ROUTES or len(norms) > 1:
        raise ValueError(_explain(forward_type, base, norms))
    if base == 'm0' and 'noz' not in found:
        raise ValueError(f"forward_type is {forward_type!r}; the official Mamba-2 form has no gate: write 'm0_noz'.")
    return {
        'gate': 'none' if 'noz' in found else 'linear' if 'nozact' in found else 'act',
        'out_norm': _OUT_NORMS[norms[0]] if norms else 'layernorm',
        'out_act': 'oact' in found,
        'routes': _ROUTES[base],
        'ssm': 'mamba2' if base == 'm0' else 'mamba1',
    }


def _explain(forward_type: str, base: str, norms: list[str]) -> str:
    name, *suffixes = base.split('_')
    faults = []
    unknown = [f'_{suffix}' for suffix in suffixes if suffix not in _SUFFIXES]
    misplaced = [f'_{suffix}' for suffix in suffixes if suffix in _SUFFIXES]
    if name not in _ROUTES:
        note = ' (which takes no suffix)' if name in ('v0', 'v0seq') else ''
        note = ' (which the official code itself cannot run)' if name.startswith('xv') else note
        faults.append(f'base {name!r}{note}')
    if unknown:
        faults.append(f'unknown suffix {", ".join(unknown)}')
    if misplaced:
        faults.append(f'suffix in the wrong place or repeated {", ".join(misplaced)}')
    if len(norms) > 1:
        faults.append(f'more than one normalisation {", ".join("_" + norm for norm in norms)}')
    known = ', '.join('_' + norm for norm in _OUT_NORMS)
    return (
        f'forward_type {forward_type!r} has {"; ".join(faults)}. Bases are v0, v0seq, {", ".join(_ROUTES)}; suffixes '
        f'come in the order {known} (one of them), _nozact or _noz, _oact, _no32.')
