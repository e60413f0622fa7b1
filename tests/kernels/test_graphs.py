"""What graphs of the scans hold for named routes, and that no graph outlives the version of the package it is of."""
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from visionssm_kernels import get_routes, selective_scan_2d
from visionssm_kernels._cache_tag import digest_sources, tag_compiler_caches

CPU = torch.device('cpu')


def test_a_graph_holds_the_table_of_named_routes_as_one_node():
    graph = make_fx(lambda x: torch.ops.visionssm.cross_scan(x, 'mhs_4'), tracing_mode='symbolic')(
        torch.randn(2, 3, 5, 6))
    targets = [node.target for node in graph.graph.nodes if node.op == 'call_function']
    assert targets.count(torch.ops.visionssm.route_table.default) == 1
    assert not {torch.ops.aten.sort.default, torch.ops.aten.argsort.default} & set(targets)
    x = torch.randn(4, 5, 4, 7)
    torch.testing.assert_close(graph(x), torch.ops.visionssm.cross_scan(x, 'mhs_4'))


@pytest.mark.parametrize('name', ['cross', 'mhs_s'])
def test_opcheck_of_the_table(name):
    torch.library.opcheck(torch.ops.visionssm.route_table.default, (name, 3, 4, CPU))


def test_the_table_of_a_graph_is_a_copy_that_scans_trust_until_it_is_written_to():
    with torch.inference_mode():
        table = torch.ops.visionssm.route_table('cross', 3, 4, CPU)
    assert torch.equal(table, get_routes('cross').table(3, 4)) and not table.is_inference()
    inputs = (torch.randn(1, 2, 3, 4), torch.randn(1, 4, 2, 3, 4), -torch.rand(8, 1), torch.randn(1, 4, 1, 3, 4),
              torch.randn(1, 4, 1, 3, 4))
    torch.testing.assert_close(
        torch.ops.visionssm.selective_scan_2d(*inputs, table=table), selective_scan_2d(*inputs, routes='cross'))
    table.zero_()
    with pytest.raises(ValueError, match='each of the numbers 0..11 once'):
        torch.ops.visionssm.selective_scan_2d(*inputs, table=table)
    assert get_routes('cross').table(3, 4).max() == 11


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown name 'zigzag'"):
        torch.ops.visionssm.route_table('zigzag', 3, 4, CPU)


def test_cached_graphs_belong_to_the_sources_they_were_made_of(tmp_path):
    (tmp_path / 'op.py').write_text('a = 1\n')
    first = digest_sources(tmp_path)
    assert digest_sources(tmp_path) == first
    (tmp_path / 'op.py').write_text('a = 2\n')
    assert digest_sources(tmp_path) != first


@pytest.mark.skipif(not hasattr(torch.compiler.config, 'cache_key_tag'), reason='this PyTorch has no tag')
def test_the_tag_of_a_user_stays(monkeypatch):
    monkeypatch.setattr(torch.compiler.config, 'cache_key_tag', 'mine')
    tag_compiler_caches()
    tag_compiler_caches()
    mine, *others = torch.compiler.config.cache_key_tag.split()
    assert mine == 'mine' and [tag.partition('-')[0] for tag in others] == ['visionssm_kernels']
