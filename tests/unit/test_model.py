"""The performance model: against simulation, sums by hand, brute force, and published tables."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from bench import validate_model
from commlib.cli import main
from commlib.model import (
    DOCUMENTED,
    FITTED,
    PRESETS,
    Compute,
    Config,
    Hardware,
    UniformRouting,
    default_num_sms,
    find_hardware,
    predict,
    preset,
    presets,
    propose,
    saturating_sms,
)
from commlib.model.routing import missed, missed_within_nodes

BENCH = Path(__file__).parents[2] / "bench"
SAMPLE = Config(ranks=8, tokens=4096, hidden=7168, topk=8, experts=256)
TWO_NODES = dataclasses.replace(SAMPLE, ranks=16, ranks_per_node=8)


def machine(**values) -> Hardware:
    """Round numbers: a row of 1000 bytes takes 1 us at 1 GB/s."""
    base = dict(sms=10, memory_gbps=100.0, link_gbps=10.0, network_gbps=1.0, dispatch_sm_gbps=2.0)
    base |= dict(combine_sm_gbps=4.0, latency_us=0.0, tflops=1.0)
    return Hardware("round", **(base | values))


def chosen_experts(routing: UniformRouting, tokens: int) -> np.ndarray:
    """[tokens, E] bool: the experts that tokens with uniform scores choose."""
    scores = np.random.default_rng(0).random((tokens, routing.experts))
    if routing.node_limit is not None:
        best = scores.reshape(tokens, routing.nodes, -1).max(2)
        worst_allowed = np.sort(best, axis=1)[:, -routing.node_limit]
        allowed = best >= worst_allowed[:, None]
        scores = np.where(np.repeat(allowed, routing.experts // routing.nodes, axis=1), scores, -1.0)
    worst_chosen = np.sort(scores, axis=1)[:, -routing.topk]
    return scores >= worst_chosen[:, None]


@pytest.mark.parametrize(
    "routing",
    [
        UniformRouting(256, 8, 8),
        UniformRouting(64, 8, 64),
        UniformRouting(10, 3, 4),  # ranks own 2, 3, 2, 3
        UniformRouting(5, 2, 8),  # some own none
        UniformRouting(30, 6, 8, nodes=4),
        UniformRouting(256, 8, 64, nodes=8, node_limit=4),
        UniformRouting(24, 5, 12, nodes=4, node_limit=2),
        UniformRouting(20, 4, 8, nodes=4, node_limit=1),  # uneven within a node
    ],
    ids=repr,
)
def test_closed_form_agrees_with_simulation(routing):
    tokens = 20_000
    chosen = chosen_experts(routing, tokens)
    owner = np.repeat(np.arange(routing.ranks), [routing.experts_on(r) for r in range(routing.ranks)])
    at_rank = np.stack([chosen[:, owner == r].any(1) for r in range(routing.ranks)], 1)
    at_node = at_rank.reshape(tokens, routing.nodes, -1).any(2)
    assert chosen.sum(1).tolist() == [routing.topk] * tokens
    deviation = 5 * 0.5 / math.sqrt(tokens)  # five standard deviations of a share near 1/2
    np.testing.assert_allclose(at_rank.mean(0), routing.rank_share, atol=deviation)
    np.testing.assert_allclose(at_node.mean(0), routing.node_share, atol=deviation)
    assert routing.unique_ranks == pytest.approx(at_rank.sum(1).mean(), rel=0.02)
    assert routing.unique_nodes == pytest.approx(at_node.sum(1).mean(), rel=0.02)


def test_placement_is_that_of_the_library():
    for experts, ranks in ((10, 4), (5, 8), (256, 8), (7, 3)):
        routing = UniformRouting(experts, 1, ranks)
        owned = [(r + 1) * experts // ranks - r * experts // ranks for r in range(ranks)]
        assert [routing.experts_on(r) for r in range(ranks)] == owned and sum(owned) == experts


def test_known_expectations():
    # 2 of 4 experts on 2 ranks: one of the 6 pairs misses a rank.
    assert UniformRouting(4, 2, 2).rank_share == pytest.approx((5 / 6, 5 / 6))
    assert UniformRouting(8, 8, 4).rank_share == (1.0,) * 4  # K = E
    assert UniformRouting(8, 2, 1).unique_ranks == 1.0  # R = 1
    assert UniformRouting(8, 1, 4).unique_ranks == pytest.approx(1.0)
    assert UniformRouting(32, 4, 8, nodes=4, node_limit=1).unique_nodes == pytest.approx(1.0)
    # DESIGN.md and issue 4: at R = 8, K = 8, K rows are 1.5 times the unique ones.
    assert 8 / UniformRouting(256, 8, 8).unique_ranks == pytest.approx(1.5, abs=0.02)


def test_a_limit_of_all_nodes_limits_nothing():
    for owned in (1, 3, 8):
        assert missed_within_nodes(32, 5, owned, 4, 4) == pytest.approx(missed(32, 5, owned))


def test_traffic_by_hand():
    # 2 ranks, both experts chosen: every token goes to both, half of the rows stay.
    config = Config(ranks=2, tokens=100, hidden=500, topk=2, experts=2)
    assert config.row_bytes == (1000, 1000)
    traffic = config.traffic
    assert (traffic.received, traffic.link, traffic.stores, traffic.loads) == (200, 100, 200, 200)
    assert (traffic.network, traffic.memory, traffic.node_rows) == (0, 300, 100)
    got = predict(machine(latency_us=5.0), config, num_sms=10)
    # link: 100 rows at 10 GB/s. SMs: 200 at 20, at 40. memory: 300 at 100.
    parts = {"link": 10e-6, "network": 0, "SMs": 10e-6, "memory": 3e-6, "latency": 5e-6}
    assert got.dispatch.parts == pytest.approx(parts)
    assert got.combine.limit == "link" and got.combine.parts["SMs"] == pytest.approx(5e-6)
    assert got.dispatch.seconds == pytest.approx(15e-6)
    assert got.dispatch.nvlink_gbps == pytest.approx(200 / 15)
    assert got.dispatch.link_gbps == pytest.approx(100 / 15)
    assert predict(machine(latency_us=50.0), config, 10).dispatch.limit == "latency"


def test_two_hops_by_hand():
    # 2 nodes of 2 ranks, a token goes to all 4 ranks: once over the network, from its gateway to the other
    # rank of each node.
    config = Config(ranks=4, tokens=100, hidden=500, topk=4, experts=4, ranks_per_node=2)
    traffic = config.traffic
    assert (traffic.received, traffic.node_rows, traffic.network, traffic.link) == (400, 200, 100, 200)
    assert traffic.stores == 400 + 100  # rows passed on as gateway, and one copy to send from
    assert traffic.loads == 400 + 200  # sums as gateway, and over nodes at home
    direct = dataclasses.replace(config, direct=True).traffic
    assert (direct.network, direct.link, direct.stores) == (200, 100, 400)
    assert predict(machine(), config, 10).dispatch.limit == "network"


def test_rows_for_each_expert():
    config = dataclasses.replace(SAMPLE, direct=True, dedup=False)
    assert config.traffic.received == pytest.approx(4096 * 8)
    assert config.traffic.link == pytest.approx(4096 * 8 * 7 / 8)
    op = predict(PRESETS["H100"], config, 132).dispatch
    assert op.selection_gbps == pytest.approx(op.nvlink_gbps)


def test_ranks_that_share_a_device_share_its_memory_and_use_no_link():
    config = dataclasses.replace(SAMPLE, ranks_per_device=8)
    assert config.traffic.link == 0
    assert config.traffic.memory == pytest.approx(8 * (4096 + config.traffic.received))
    got = predict(machine(link_gbps=None, network_gbps=None, sms=64), config, 8)
    assert got.dispatch.limit == "memory"
    half = dataclasses.replace(SAMPLE, ranks_per_device=4).traffic
    assert half.link == pytest.approx(4 * SAMPLE.traffic.received / 2)


def test_uneven_placement_is_bound_by_the_busiest_rank():
    even, uneven = (Config(ranks=4, tokens=64, hidden=8, topk=2, experts=e) for e in (12, 13))
    assert uneven.routing.experts_on(3) == 4
    assert uneven.traffic.received == pytest.approx(64 * 4 * max(uneven.routing.rank_share))
    assert uneven.traffic.received > even.traffic.received
    assert dataclasses.replace(even, imbalance=1.5).traffic.link == pytest.approx(1.5 * even.traffic.link)


def test_fp8_rows_have_a_scale_for_128_elements():
    assert dataclasses.replace(SAMPLE, dispatch_dtype="fp8").row_bytes == (7168 + 4 * 56, 2 * 7168)


@pytest.mark.parametrize("config", [SAMPLE, TWO_NODES, dataclasses.replace(TWO_NODES, direct=True)])
@pytest.mark.parametrize("name", PRESETS)
def test_more_never_makes_it_slower(config, name):
    hardware = PRESETS[name]
    times = [predict(hardware, config, n).seconds for n in range(1, hardware.sms + 1)]
    assert times == sorted(times, reverse=True)
    for rate in ("link", "network", "memory", "dispatch_sm", "combine_sm"):
        field = f"{rate}_gbps"
        faster = dataclasses.replace(hardware, **{field: 2 * getattr(hardware, field)})
        for n in (1, 8, 64):
            assert predict(faster, config, n).seconds <= predict(hardware, config, n).seconds


def brute_force(hardware, config, compute):
    best = None
    for n in range(1, hardware.sms):
        communication = (
            predict(hardware, config, n).dispatch.seconds + predict(hardware, config, n).combine.seconds
        )
        computing = compute.flops / (hardware.tflops * 1e12 * compute.efficiency * (1 - n / hardware.sms))
        if best is None or max(communication, computing) < best[1] * (1 - 1e-12):
            best = n, max(communication, computing)
    return best


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("ffn_hidden", [16, 256, 1024, 2048, 16384])
@pytest.mark.parametrize("config", [SAMPLE, TWO_NODES], ids=["one node", "two nodes"])
def test_proposal_agrees_with_brute_force(name, ffn_hidden, config):
    compute = Compute.swiglu(config, ffn_hidden, efficiency=0.6)
    got = propose(PRESETS[name], config, compute)
    assert (got.num_sms, got.seconds) == pytest.approx(brute_force(PRESETS[name], config, compute))
    assert got.seconds <= got.sequential_seconds and 0 < got.efficiency <= 1
    assert got.seconds == pytest.approx(max(got.prediction.seconds, got.compute_seconds))


def test_proposal_without_overlap_takes_what_saturates():
    compute = Compute(1e12, 0.5)
    got = propose(PRESETS["H100"], SAMPLE, compute, overlap=False)
    alone = propose(PRESETS["H100"], SAMPLE)
    assert got.num_sms == alone.num_sms == saturating_sms(PRESETS["H100"], SAMPLE)
    assert got.seconds == pytest.approx(got.sequential_seconds) and got.efficiency == pytest.approx(1)
    assert alone.compute_seconds == 0
    fewer = predict(PRESETS["H100"], SAMPLE, got.num_sms - 1)
    assert "SMs" in (fewer.dispatch.limit, fewer.combine.limit)


@pytest.mark.parametrize(
    ("flops", "says"),
    [(1e14, "Compute is the longer part"), (1e9, "The link binds"), (None, "The link binds")],
)
def test_proposal_explains_what_binds(flops, says):
    text = str(propose(PRESETS["H100"], SAMPLE, flops and Compute(flops, 0.6)))
    assert says in text and "SMs of H100 for communication" in text


def test_proposal_for_little_says_latency():
    assert "SMs do not help" in str(propose(PRESETS["H100"], dataclasses.replace(SAMPLE, tokens=1)))


FACTS = dict(sms=132, ranks=8, max_tokens=4096, hidden=7168, itemsize=2, topk=8, experts=256)


def test_default_num_sms(monkeypatch, tmp_path):
    monkeypatch.setattr(presets, "MEASURED_FOLDER", tmp_path)
    known = default_num_sms(name="NVIDIA H100 80GB HBM3", **FACTS)
    assert known == saturating_sms(PRESETS["H100"], SAMPLE)
    assert default_num_sms(name="Some GPU", **FACTS) == 8
    assert default_num_sms(name="NVIDIA H100 PCIe", **FACTS) == 8
    assert default_num_sms(name="NVIDIA GH200 480GB", **FACTS) == 8
    assert default_num_sms(name="NVIDIA H100 80GB HBM3", **FACTS | {"sms": 20}) == 10
    assert default_num_sms(name="NVIDIA H100 80GB HBM3", **FACTS, ranks_on_device=8) == 8
    assert default_num_sms(name="NVIDIA H100 80GB HBM3", **FACTS, ranks_on_device=8) <= 132 // 16
    assert default_num_sms(name="NVIDIA H100 80GB HBM3", **FACTS | {"ranks": 1}) == 8
    slow = dataclasses.replace(PRESETS["H100"], dispatch_sm_gbps=14.0, combine_sm_gbps=14.0)
    slow.save(presets.measured_path("NVIDIA H100 80GB HBM3"))
    assert default_num_sms(name="NVIDIA H100 80GB HBM3", **FACTS) == saturating_sms(slow, SAMPLE) > known


def test_hardware_survives_a_file(tmp_path):
    path = tmp_path / "deep" / "b200.json"
    PRESETS["B200"].save(path, {"samples": [1.0]})
    assert Hardware.load(path) == PRESETS["B200"]
    assert json.loads(path.read_text())["calibration"] == {"samples": [1.0]}


def test_every_constant_of_a_preset_has_a_source():
    for name in PRESETS:
        for hardware in (preset(name, FITTED), preset(name, DOCUMENTED)):
            fields = {f.name for f in dataclasses.fields(hardware)} - {"name", "sources"}
            assert hardware.sources.keys() == fields and all(hardware.sources.values())
            assert "ASSUMED until measured" in hardware.sources["dispatch_sm_gbps"]


def test_numpys_integers_are_kept_as_integers(tmp_path):
    ours = machine(sms=np.int64(10))
    ours.save(tmp_path / "machine.json")
    assert Hardware.load(tmp_path / "machine.json") == machine(sms=10)
    sizes = dict(ranks=8, tokens=64, hidden=128, topk=2, experts=16, ranks_per_node=4, node_limit=1)
    config = Config(**{name: np.int32(n) for name, n in sizes.items()})
    assert hash(config) == hash(Config(**sizes))
    assert all(type(getattr(config, name)) is int for name in sizes)


def test_names_of_devices():
    assert find_hardware("NVIDIA B200") is PRESETS["B200"]
    assert find_hardware("NVIDIA GB200") is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: UniformRouting(8, 9, 2), r"topk must lie in \[1, 8\], got 9"),
        (lambda: UniformRouting(0, 1, 2), "experts must be at least 1, got 0"),
        (lambda: UniformRouting(8, 2, 6, nodes=4), "4 nodes for 6 ranks"),
        (
            lambda: UniformRouting(9, 2, 4, nodes=2, node_limit=1),
            "equally many experts on each node, got 9 on 2",
        ),
        (lambda: UniformRouting(8, 5, 4, nodes=2, node_limit=1), "leaves 4 experts, topk is 5"),
        (lambda: Config(0, 1, 1, 1, 1), "ranks must be at least 1, got 0"),
        (lambda: Config(8, 1, 1, 1, 8, "int4"), "dispatch_dtype must be one of .* got 'int4'"),
        (lambda: Config(8, 1, 1, 1, 8, ranks_per_node=3), "ranks_per_node=3 does not divide ranks=8"),
        (lambda: Config(8, 1, 1, 1, 8, ranks_per_node=4, ranks_per_device=2), "ranks_per_device=2"),
        (lambda: Config(8, 1, 1, 1, 8, imbalance=0.5), "imbalance must be .* got 0.5"),
        (lambda: machine(memory_gbps=-1.0), "memory_gbps must be .* got -1.0"),
        (lambda: machine(link_gbps=math.nan), "link_gbps must be .* got nan"),
        (lambda: predict(machine(), SAMPLE, 11), r"num_sms must lie in \[1, 10\], got 11"),
        (lambda: predict(machine(link_gbps=None), SAMPLE, 1), "round has no link"),
        (lambda: predict(machine(network_gbps=None), TWO_NODES, 1), "round has no network"),
        (lambda: Compute(1e9, 1.5), "efficiency must be .* got 1.5"),
        (lambda: propose(machine(tflops=None), SAMPLE, Compute(1e9, 0.5)), "tflops is not known"),
        (lambda: propose(machine(sms=1), SAMPLE, Compute(1e9, 0.5)), "nothing is left for compute"),
        (lambda: preset("H20"), "no preset 'H20'"),
        (lambda: default_num_sms(name="NVIDIA H100", **FACTS | {"itemsize": 3}), "itemsize .* got 3"),
    ],
)
def test_errors_name_the_value(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match=r"topk must be an int, got 2\.0"):
        UniformRouting(8, 2.0, 2)
    with pytest.raises(TypeError, match="flops must be a number, got 'many'"):
        Compute("many", 0.5)


@pytest.mark.parametrize("content", ["", "{}", '{"hardware": {"name": "x"}}', '{"hardware": {"names": 1}}'])
def test_a_file_that_is_not_hardware_is_named(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.json does not describe hardware"):
        Hardware.load(path)


def test_fitted_rows_are_met_and_the_others_do_not_drift():
    rows, left_out = validate_model.read()
    assert len(rows) == 44 and not left_out
    for row in rows:
        if row.fitted:
            assert abs(row.error(FITTED)) < 0.01, row
    others = [abs(row.error(FITTED)) for row in rows if not row.fitted]
    assert statistics.median(others) < 0.06
    assert sum(error > 0.15 for error in others) == 5  # UCCL over EFA (3), pplx-kernels (2)


def test_rows_that_cannot_be_predicted_are_told_apart(tmp_path):
    lines = validate_model.PUBLISHED.read_text().splitlines()
    path = tmp_path / "published.csv"
    path.write_text("\n".join([lines[0], lines[1], lines[2].replace("H800", "MI300X"), lines[3]]))
    rows, left_out = validate_model.read(path)
    assert [row.number for row in rows] == [1, 3]
    assert left_out == {2: "DeepEP combine, EP 8: no constants for MI300X"}


def test_calibration_writes_a_file_that_loads(tmp_path, capsys):
    path = tmp_path / "here.json"
    sizes = "--tokens 6144 --hidden 4096 --experts 8 --topk 2 --iters 7 --copy-mib 4 --matmul 64"
    command = ["bench", "--calibrate", "--device", "cpu", "--ranks", "2", "--out", str(path), *sizes.split()]
    assert main(command) == 0
    hardware = Hardware.load(path)
    assert hardware.link_gbps is None and hardware.dispatch_sm_gbps > 0 and hardware.latency_us > 0
    assert "commlib bench --calibrate" in hardware.sources["memory_gbps"]
    record = json.loads(path.read_text())["calibration"]
    assert record["plan"]["ranks"] == 2 and record["samples_s"]["rows"] <= 2 * 6144
    config = Config(2, 6144, 4096, 2, 8, ranks_per_device=2)
    assert predict(hardware, config, 1).dispatch.seconds > 0
    assert str(path) in capsys.readouterr().out


def test_calibration_refuses_nonsense(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--calibrate", "--device", "cpu", "--tokens", "0"])
    assert exit_.value.code == 1 and "tokens must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--calibrate", "--device", "cpu", "--num-sms", "0"])
    assert "--num-sms must lie in [1, 1024] for 4 ranks, got [0]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench"])
