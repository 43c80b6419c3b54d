"""Ranks on several nodes, over UCX: everything as on one node, and the text of each error."""

import gc
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exchange import check, expert_layer, nonlinear_experts
from reference import expected_combine, expected_expert_layout, expected_rank_layout, make_world, tolerance

import commlib
from commlib import ExpertParallel, cli
from commlib.cli import topo
from commlib.errors import CommError, ConfigMismatch
from commlib.startup import ucx
from commlib.startup.connect import _topology
from commlib.startup.topology import Topology, find_topology, node_size

# Ranks, ranks of a node, routing. The last node may be smaller.
SPREADS = [(4, 2, "hierarchical"), (4, 2, "direct"), (5, 2, "hierarchical"), (6, 3, "auto"), (3, 1, "auto")]
spread = pytest.mark.parametrize(("ranks", "node", "routing"), SPREADS)


def load_no_ucx(paths):
    raise RuntimeError("no UCX library:\n  /nowhere/libucp.so.0: cannot open shared object file")


def need_ucx(device):
    """A GPU machine may lack it, and commlib is then built without UCX's headers."""
    if device == "cuda":
        try:
            ucx.load()
        except CommError as error:
            pytest.skip(str(error))


def world_on(ranks, **options):
    return make_world([23, 0, 40, 17, 5, 31][:ranks], num_experts=12, topk=4, hidden=96, **options)


@spread
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dispatch_gives_the_bytes_of_one_node(device, ranks, node, routing, dtype):
    need_ucx(device)
    world = world_on(ranks, dtype=dtype, device=device)

    def rank_main(rank):
        inputs = (world.x[rank], world.topk_idx[rank], world.topk_weights[rank])
        with ExpertParallel(num_sms=2, ranks_per_node=node, routing=routing, **world.config()) as ep:
            unique = ep.dispatch(*inputs)
            grouped = ep.dispatch(*inputs, layout="expert", align=4)
            again = ep.dispatch(inputs[0], None, inputs[2], handle=grouped.handle)
            check(unique, expected_rank_layout(world, rank))
            check(grouped, expected_expert_layout(world, rank, 4))
            check(again, expected_expert_layout(world, rank, 4))

    commlib.run_ranks(rank_main, ranks, device=device)


@spread
def test_combine_is_the_weighted_sum_and_the_same_every_time(device, ranks, node, routing):
    need_ucx(device)
    world = world_on(ranks, dtype=torch.bfloat16, device=device)

    def rank_main(rank):
        with ExpertParallel(ranks_per_node=node, routing=routing, **world.config()) as ep:
            first = expert_layer(world, rank, ep)
            expected = expected_combine(world, rank)
            torch.testing.assert_close(
                first.double().cpu(), expected, **tolerance(world.dtype, 2 * world.topk)
            )
            for _ in range(5):
                assert torch.equal(expert_layer(world, rank, ep), first)

    commlib.run_ranks(rank_main, ranks, device=device)


@spread
def test_bounded_dispatches_give_the_same_bytes_and_sums(device, ranks, node, routing):
    need_ucx(device)
    world = world_on(ranks, dtype=torch.bfloat16, device=device)

    def rank_main(rank):
        inputs = (world.x[rank], world.topk_idx[rank], world.topk_weights[rank])
        with ExpertParallel(num_sms=2, ranks_per_node=node, routing=routing, **world.config()) as ep:
            for layout in ("rank", "expert"):
                exact = ep.dispatch(*inputs, layout=layout)
                d = ep.dispatch(*inputs, layout=layout, bounded=True)
                ep.synchronize()
                rows = int(d.num_rows)
                assert torch.equal(d.x[:rows], exact.x)
                assert torch.equal(d.source[:rows], exact.source)
                assert torch.equal(d.topk_weights[:rows], exact.topk_weights)
                assert torch.equal(ep.combine(d.x, d.handle), ep.combine(exact.x, exact.handle))

    commlib.run_ranks(rank_main, ranks, device=device)


def test_bounded_dispatches_leave_out_what_has_no_room_and_bad_ids(device):
    need_ucx(device)
    world = world_on(4, dtype=torch.bfloat16, device=device)
    world.topk_idx[0][0, 0] = 12

    def rank_main(rank):
        inputs = (world.x[rank], world.topk_idx[rank], world.topk_weights[rank])
        with ExpertParallel(capacity=30, ranks_per_node=2, **world.config()) as ep:
            told = pytest.raises(ValueError, match="is 12; expert ids") if rank == 0 else nullcontext()
            with told:
                ep.dispatch(*inputs, overflow="drop", bounded=True)
                ep.synchronize()
            clean = (inputs[0], inputs[1].clone().clamp_(max=11), inputs[2])
            exact = ep.dispatch(*clean, overflow="drop")
            d = ep.dispatch(*clean, overflow="drop", bounded=True)
            ep.synchronize()
            rows = int(d.num_rows)
            assert torch.equal(d.x[:rows], exact.x)
            assert torch.equal(d.tokens_per_expert, exact.tokens_per_expert)
            assert torch.equal(ep.combine(d.x, d.handle), ep.combine(exact.x, exact.handle))
            return int(d.dropped)

    assert sum(commlib.run_ranks(rank_main, 4, device=device)) > 0


def test_direct_routing_gives_the_bits_of_one_node():
    world = world_on(4, dtype=torch.bfloat16)

    def sums(**options):
        def rank_main(rank):
            with ExpertParallel(**options, **world.config()) as ep:
                return expert_layer(world, rank, ep)

        return commlib.run_ranks(rank_main, 4)

    for one, several in zip(sums(), sums(ranks_per_node=2, routing="direct"), strict=True):
        assert torch.equal(one, several)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_gradients_are_those_of_one_node(layout):
    world = world_on(4, dtype=torch.float64)

    def gradients(**options):
        def rank_main(rank):
            x = world.x[rank].clone().requires_grad_()
            weights = world.topk_weights[rank].clone().requires_grad_()
            with ExpertParallel(**options, **world.config()) as ep:
                d = ep.dispatch(x, world.topk_idx[rank], weights, layout=layout)
                if layout == "expert":
                    y = nonlinear_experts(d.x, d.offsets.tolist(), world.experts_of(rank))
                    out = ep.combine(y, d.handle, weights=d.topk_weights)
                else:
                    out = ep.combine(d.x.sin() * d.topk_weights.sum(1, keepdim=True), d.handle)
                out.square().sum().backward()
                return x.grad, weights.grad

        return commlib.run_ranks(rank_main, 4)

    for one, several in zip(gradients(), gradients(ranks_per_node=2, routing="hierarchical"), strict=True):
        for a, b in zip(one, several, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rows_cross_the_network_once_for_each_node():
    """Bytes sent, against the least: unique (token, node) rows, with at most 3 % beside them."""
    world = make_world([256] * 4, num_experts=32, topk=8, hidden=4096, dtype=torch.bfloat16, holes=0.0)

    def rank_main(rank):
        owners = world.topk_idx[rank] // 8
        far = owners // 2 != rank // 2
        least = {"hierarchical": int(far.any(1).sum())}
        least["direct"] = sum(int((owners == r).any(1).sum()) for r in range(4) if r // 2 != rank // 2)
        for routing, rows in least.items():
            with ExpertParallel(ranks_per_node=2, routing=routing, **world.config()) as ep:
                ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank])
                ep.group.barrier()  # all have received what all have sent
                sent = ep.stats()["network_bytes"]
                assert rows * 8192 < sent < 1.03 * rows * 8192
                assert ep.stats()["network_messages"] < rows

    commlib.run_ranks(rank_main, 4)


def test_asynchronous_operations_in_flight_together():
    worlds = [make_world([30, 17, 4, 22], hidden=256, seed=s) for s in range(3)]

    def rank_main(rank):
        with ExpertParallel(num_sms=2, ranks_per_node=2, **worlds[0].config()) as ep:
            for _ in range(10):
                under_way = []
                for w in worlds:
                    d = ep.dispatch(w.x[rank], w.topk_idx[rank], w.topk_weights[rank], async_op=True)
                    under_way.append((d, *ep.combine(d.x, d.handle, previous_event=d.event, async_op=True)))
                for w, (d, _, event) in zip(worlds, under_way, strict=True):
                    event.wait()
                    check(d, expected_rank_layout(w, rank))

    commlib.run_ranks(rank_main, 4)


def test_rows_past_capacity_are_refused_everywhere_and_dropped_where_asked():
    x, idx = torch.ones(8, 32), torch.zeros(8, 1, dtype=torch.int64)
    config = dict(num_experts=4, hidden=32, topk=1, max_tokens=8, dtype=torch.float32, capacity=10)

    def rank_main(rank):
        with ExpertParallel(ranks_per_node=2, timeout=20.0, **config) as ep:
            with pytest.raises(commlib.CapacityExceeded, match="rank 0 would receive 32 rows"):
                ep.dispatch(x, idx)
            d = ep.dispatch(x, idx, overflow="drop")
            assert len(d.x) == (10 if rank == 0 else 0)
            return ep.combine(d.x, d.handle)

    kept = torch.cat(commlib.run_ranks(rank_main, 4))
    assert kept.sum() == 10 * 32 and kept[:10].all()


# -- faults


def test_a_rank_that_never_comes_is_named_across_nodes():
    x, idx = torch.ones(4, 64), torch.tensor([[0, 7]] * 4)
    config = dict(num_experts=8, hidden=64, topk=2, max_tokens=8, dtype=torch.float32)

    def rank_main(rank):
        with ExpertParallel(timeout=1.0, startup_timeout=60.0, ranks_per_node=2, **config) as ep:
            ep.dispatch(x, idx)
            try:
                if rank != 3:
                    with pytest.raises(commlib.PeerTimeout) as caught:
                        ep.dispatch(x, idx)
                    assert caught.value.peers == [3] and "dispatch" in str(caught.value)
            finally:
                ep.group.barrier()

    commlib.run_ranks(rank_main, 4)


def test_a_different_order_of_calls_is_an_error_across_nodes():
    x, idx = torch.ones(4, 64), torch.tensor([[0, 7]] * 4)
    config = dict(num_experts=8, hidden=64, topk=2, max_tokens=8, dtype=torch.float32)

    def rank_main(rank):
        with ExpertParallel(timeout=20.0, ranks_per_node=1, **config) as ep:
            d = ep.dispatch(x, idx)
            with pytest.raises(commlib.CallMismatch, match="called"):
                if rank == 0:
                    ep.dispatch(x, idx)
                else:
                    ep.combine(d.x, d.handle)
            ep.group.barrier()

    commlib.run_ranks(rank_main, 2)


# -- trust


def listening():
    """Where this process listens for TCP: (address, port) in the kernel's notation."""
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_socket(fd)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add(tuple(fields[1].split(":")))
    return found


def _is_socket(fd):
    path = f"/proc/self/fd/{fd}"
    return os.path.exists(path) and os.readlink(path).startswith("socket:")


def test_ranks_of_one_node_open_no_port_and_those_of_one_host_only_the_loopback():
    world = world_on(2)
    gc.collect()  # what errors of earlier tests still hold
    ports = listening()

    def rank_main(rank):
        with ExpertParallel(num_sms=1, **world.config()) as ep:
            ep.group.barrier()
            beside = listening()
            ep.group.barrier()
        with ExpertParallel(ranks_per_node=1, **world.config()) as ep:
            ep.group.barrier()
            across = listening()
            ep.group.barrier()
        return beside, across

    beside, across = commlib.run_ranks(rank_main, 2)[0]
    assert beside == ports
    assert across > ports and {address for address, _ in across - ports} == {"0100007F"}


def test_every_ordered_pair_of_ranks_has_a_key_of_its_own():
    keys = [ucx.message_keys("ab" * 32, rank, 4) for rank in range(4)]
    shown = {(a, b): keys[a][b][0] for a in range(4) for b in range(4)}
    assert len(set(shown.values())) == 16
    assert all(keys[b][a][1] == key for (a, b), key in shown.items())
    assert shown[0, 1] != ucx.message_keys("cd" * 32, 0, 4)[1][0]


def test_a_rank_with_another_secret_is_ignored(monkeypatch):
    x, idx = torch.ones(4, 64), torch.tensor([[0, 7]] * 4)
    config = dict(num_experts=8, hidden=64, topk=2, max_tokens=8, dtype=torch.float32, timeout=1.0)
    right = ucx.message_keys
    monkeypatch.setattr(
        ucx, "message_keys", lambda secret, rank, size: right(secret if rank else "00" * 32, rank, size)
    )

    def rank_main(rank):
        with ExpertParallel(ranks_per_node=1, **config) as ep:
            with pytest.raises(commlib.PeerTimeout) as caught:
                ep.dispatch(x, idx)
            ep.group.barrier()
            return caught.value.peers, ep.stats()["network_refused"]

    for rank, (peers, refused) in enumerate(commlib.run_ranks(rank_main, 2)):
        assert peers == [1 - rank] and refused > 0


# -- topology


def test_ranks_with_one_host_are_a_node():
    t = find_topology(["a", "b", "a", "b"], ["n1", "n2", "n1", "n2"], None)
    assert t.node_of == (0, 1, 0, 1) and t.hosts == ("n1", "n2") and t.nodes == [[0, 2], [1, 3]]
    assert t.gateway(0, 1) == 1 and t.gateway(2, 1) == 3 and t.gateway(3, 0) == 2


@pytest.mark.parametrize(
    ("domains", "nodes"),
    [
        (["rack/1"] * 4, [[0, 1, 2, 3]]),
        (["rack/1", "rack/1", "rack/2", "rack/2"], [[0, 1], [2, 3]]),
        (["rack/1", "rack/2", "rack/1", "rack/2"], [[0, 1], [2, 3]]),  # hosts stay whole
        (["rack/1"] * 3 + [""], [[0, 1], [2, 3]]),
        ([""] * 4, [[0, 1], [2, 3]]),
        ([None] * 4, [[0, 1], [2, 3]]),  # on the CPU
    ],
)
def test_gpus_of_one_nvlink_domain_are_a_node(domains, nodes):
    infos = [{"host": rank // 2, "host_name": f"n{rank // 2}"} for rank in range(4)]
    for info, domain in zip(infos, domains, strict=True):
        info.update({} if domain is None else {"domain": domain})
    assert _topology(infos, SimpleNamespace(ranks_per_node=None)).nodes == nodes


def test_nodes_may_be_set_but_not_across_hosts(monkeypatch):
    assert find_topology(["a"] * 5, ["n"] * 5, 2).nodes == [[0, 1], [2, 3], [4]]
    with pytest.raises(ConfigMismatch, match=r"ranks 0 \(n1\) and 1 \(n2\) cannot map"):
        find_topology(["a", "b"], ["n1", "n2"], 2)
    assert node_size(None) is None
    monkeypatch.setenv("COMMLIB_NODE_SIZE", "3")
    assert node_size(None) == 3 and node_size(2) == 2
    for wrong in ("0", "many"):
        monkeypatch.setenv("COMMLIB_NODE_SIZE", wrong)
        with pytest.raises(ValueError, match="COMMLIB_NODE_SIZE"):
            node_size(None)


def test_the_environment_makes_nodes(monkeypatch):
    monkeypatch.setenv("COMMLIB_NODE_SIZE", "1")
    world = world_on(2)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            assert ep.topology.nodes == [[0], [1]]
            check(
                ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank]),
                expected_rank_layout(world, rank),
            )

    commlib.run_ranks(rank_main, 2)


def test_the_rule_for_routing():
    """Expected rows on the network, against a count over random routings."""
    t = Topology((0, 0, 0, 0, 1, 1, 1, 1), ("a", "b"))
    direct, hops = t.far_rows(experts=32, topk=8)
    g = torch.Generator().manual_seed(0)
    owners = torch.rand(20000, 32, generator=g).topk(8).indices // 4
    far = owners >= 4  # of a token of node 0
    ranks = torch.zeros(20000, 8, dtype=torch.bool).scatter_(1, owners, True)[:, 4:]
    assert direct / 8 == pytest.approx(ranks.sum().item() / 20000, rel=0.02)
    assert hops / 8 == pytest.approx(far.any(1).sum().item() / 20000, rel=0.02)
    assert t.choose("auto", 32, 8) == "hierarchical" and t.choose("direct", 32, 8) == "direct"
    # With one rank on each node a second hop gains nothing.
    assert Topology((0, 1), ("a", "b")).choose("auto", 32, 8) == "direct"


def test_without_ucx_every_rank_says_what_to_do(monkeypatch):
    monkeypatch.setattr(ucx._core, "load_ucx", load_no_ucx)
    world = world_on(2)

    def rank_main(rank):
        with pytest.raises(CommError, match=r"(?s)through UCX.*nowhere.*pip install 'commlib-ep\[nodes\]'"):
            ExpertParallel(ranks_per_node=1, **world.config())

    commlib.run_ranks(rank_main, 2)


def test_arguments_that_do_not_fit_are_refused():
    world = world_on(2)

    def rank_main(rank):
        with pytest.raises(ValueError, match="routing must be one of auto, direct, hierarchical"):
            ExpertParallel(routing="nvlink", **world.config())
        with pytest.raises(ValueError, match="ranks_per_node must be at least 1"):
            ExpertParallel(ranks_per_node=0, **world.config())
        with pytest.raises(ValueError, match="link_gbps"):
            ExpertParallel(ranks_per_node=1, link_gbps=1.0, **world.config())
        with pytest.raises(ConfigMismatch, match="ranks_per_node is 1 on rank 0"):
            ExpertParallel(ranks_per_node=1 + rank, **world.config())

    commlib.run_ranks(rank_main, 2)


def test_topo_prints_the_nodes_and_ucx(capsys, monkeypatch):
    monkeypatch.setenv("COMMLIB_NODE_SIZE", "2")
    assert cli.main(["topo"]) == 0
    assert "1 rank on 1 node" in (out := capsys.readouterr().out) and "UCX 1." in out


def test_topo_on_one_node_says_that_ucx_is_not_needed_and_how_it_would_come(capsys, monkeypatch):
    monkeypatch.setattr(topo._core, "load_ucx", load_no_ucx)
    assert cli.main(["topo"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "UCX is not needed. Between nodes it would be, but no UCX library: /nowhere" in out
    assert "pip install 'commlib-ep[nodes]'" in out and "several nodes" not in out


def test_topo_on_two_nodes_says_that_ucx_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(topo._core, "load_ucx", load_no_ucx)
    nodes = find_topology(["a", "b"], ["host a", "host b"], None)
    topo._print(nodes, [{"ucx": (True, "UCX 1.22.0")}, {"ucx": topo._ucx()}], None)
    out = capsys.readouterr().out
    assert "ranks 0: UCX 1.22.0\nranks 1: Rows go between nodes through UCX, but no UCX library" in out
    assert "not needed" not in out
