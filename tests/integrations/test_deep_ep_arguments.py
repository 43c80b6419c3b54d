"""commlib.compat.deep_ep: the calls that it refuses, the options of its buffers, and its installation."""

import subprocess
import sys

import pytest
import torch
from deep_ep_reference import laid_out, made, on_ranks, rows_for, top_k
from reference import expected_rank_layout, make_world

import commlib
import commlib.compat.deep_ep as deep_ep
from commlib.compat.deep_ep import Buffer, Config, Refused

WORLD = make_world([5, 5], 4, 2, 8, torch.bfloat16)


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


def ids(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


def outside():
    wrong = ids(5, 2)
    wrong[3, 1] = 4
    return wrong


DISPATCH = {
    "num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert are needed": dict(is_token_in_rank=None),
    r"num_tokens_per_rank must be \[2\] int32, got \[3\]": dict(num_tokens_per_rank=int32(3)),
    r"num_tokens_per_rank must be \[2\] int32, got \[2\] torch.int64": dict(num_tokens_per_rank=ids(2)),
    r"num_tokens_per_expert must be \[experts\] int32, got \[4\] torch.int64": dict(
        num_tokens_per_expert=ids(4)
    ),
    "num_experts must be a positive multiple of the 2 ranks, got 5": dict(num_tokens_per_expert=int32(5)),
    r"is_token_in_rank must be \[5, 2\] bool, got \[4, 2\]": dict(is_token_in_rank=torch.zeros(4, 2).bool()),
    r"is_token_in_rank must be \[5, 2\] bool, got \[5, 2\] torch.int32": dict(is_token_in_rank=int32(5, 2)),
    "num_tokens_per_rank must be on cpu, as x is, got meta": dict(
        num_tokens_per_rank=torch.zeros(2, dtype=torch.int32, device="meta")
    ),
    "topk_idx must be on cpu, as x is, got meta": dict(topk_idx=torch.zeros(5, 2).long().to("meta")),
    "topk_weights must be on cpu, as x is, got meta": dict(topk_weights=torch.zeros(5, 2, device="meta")),
    "topk_idx and topk_weights are needed both": dict(topk_weights=None),
    r"topk_idx must be \[tokens, topk\], got \[5\]": dict(topk_idx=ids(5)),
    "topk_idx must be deep_ep.topk_idx_t, torch.int64, got torch.int32": dict(topk_idx=int32(5, 2)),
    "topk_idx has 4 tokens, but x has 5": dict(topk_idx=ids(4, 2)),
    r"topk_weights must be \[5, 2\] float32, got \[5, 2\] torch.float64": dict(
        topk_weights=torch.zeros(5, 2, dtype=torch.float64)
    ),
    r"topk_weights must be \[5, 2\] float32, got \[5, 1\]": dict(topk_weights=torch.zeros(5, 1)),
    "expert_alignment must be at least 1, got 0": dict(expert_alignment=0),
    "num_worst_tokens must be at least 0, got -1": dict(num_worst_tokens=-1),
    "num_worst_tokens needs topk_idx": dict(num_worst_tokens=10, topk_idx=None, topk_weights=None),
    "allocate_on_comm_stream needs previous_event and async_finish": dict(
        allocate_on_comm_stream=True, async_finish=True
    ),
    "needs previous_event and async_finish": dict(
        allocate_on_comm_stream=True, previous_event=Buffer.capture()
    ),
    r"x must be \[tokens, hidden\], got \[5\]": dict(x=torch.zeros(5).bfloat16()),
    "must be a multiple of 16 bytes, but 7 elements of torch.bfloat16 are 14": dict(
        x=torch.zeros(5, 7).bfloat16()
    ),
    "must be a tensor or a pair": dict(x=(torch.zeros(5, 16),) * 3),
    r"x\[0\] with scales must have elements of one byte": dict(x=(torch.zeros(5, 8), torch.zeros(5, 1))),
    "the scales, must be float32 or int32, got torch.float64": dict(
        x=(torch.zeros(5, 16).to(torch.float8_e4m3fn), torch.zeros(5, 1, dtype=torch.float64))
    ),
    r"x\[1\] must be on cpu, as x is, got meta": dict(
        x=(torch.zeros(5, 16).to(torch.float8_e4m3fn), torch.zeros(5, 1, device="meta"))
    ),
    r"the scales, must be \[5, S\], got \[4, 1\]": dict(
        x=(torch.zeros(5, 16).to(torch.float8_e4m3fn), torch.zeros(4, 1))
    ),
}
OTHERWISE = {
    "x must be a tensor, got str": (TypeError, dict(x="rows")),
    "expert_alignment must be an int, got 1.5": (TypeError, dict(expert_alignment=1.5)),
    "async_finish must be True or False, got 'yes'": (TypeError, dict(async_finish="yes")),
    "config must be a Config of this module, got dict": (TypeError, dict(config={})),
    "num_tokens_per_expert must be a tensor, got list": (TypeError, dict(num_tokens_per_expert=[1, 2])),
    "topk_idx must be a tensor, got list": (TypeError, dict(topk_idx=[[0, 1]])),
    r"topk_idx\[3, 1\] is 4, outside \[-1, 4\)": (ValueError, dict(topk_idx=outside())),
    "topk_idx has 33 places for each token; commlib takes 1 to 32": (
        ValueError,
        dict(topk_idx=ids(5, 33), topk_weights=torch.zeros(5, 33), num_tokens_per_expert=int32(64)),
    ),
    r"is_token_in_rank\[0\] is \[False, False\], but topk_idx\[0\] is": (
        ValueError,
        dict(is_token_in_rank=torch.zeros(5, 2).bool()),
    ),
}


@pytest.mark.parametrize("text", [*DISPATCH, *OTHERWISE])
def test_dispatch_refuses_before_anything_is_sent(text):
    kind, wrong = OTHERWISE[text] if text in OTHERWISE else (Refused, DISPATCH[text])

    def call(buffer, rank):
        good = dict(x=WORLD.x[rank]) | laid_out(buffer, WORLD, rank) | top_k(WORLD, rank)
        with pytest.raises(kind, match=text):
            buffer.dispatch(**(good | wrong))
        return buffer.dispatch(**good)[0]  # goes on as if nothing had happened

    for rank, x in enumerate(on_ranks(WORLD, call)):
        assert torch.equal(x, expected_rank_layout(WORLD, rank).x)


def test_a_refusal_is_what_deepep_and_what_commlib_raises():
    assert issubclass(Refused, AssertionError) and issubclass(Refused, ValueError)


def test_the_layout_refuses():
    def call(buffer, rank):
        good = WORLD.topk_idx[rank]
        for text, kind, arguments in [
            ("num_experts must be a positive multiple of the 2 ranks, got 3", Refused, (good, 3)),
            ("num_experts must be a positive multiple of the 2 ranks, got 0", Refused, (good, 0)),
            ("topk_idx must be deep_ep.topk_idx_t", Refused, (good.int(), 4)),
            (r"topk_idx\[\d+, \d+\] is \d, outside \[-1, 2\)", ValueError, (good, 2)),
            ("allocate_on_comm_stream needs", Refused, (good, 4, None, True, True)),
            ("topk_idx must be a tensor", TypeError, (good.tolist(), 4)),
        ]:
            with pytest.raises(kind, match=text):
                buffer.get_dispatch_layout(*arguments)

    on_ranks(WORLD, call)


def test_calls_with_a_handle_refuse():
    def call(buffer, rank):
        x, args = WORLD.x[rank], laid_out(buffer, WORLD, rank) | top_k(WORLD, rank)
        handle = buffer.dispatch(x, **args)[4]
        y = rows_for(WORLD, rank)
        for text, kind, refused in [
            ("topk_idx and topk_weights must be None", Refused, lambda: buffer.dispatch(x, handle, **args)),
            (
                "x has 4 tokens, but the handle's dispatch had 5",
                Refused,
                lambda: buffer.dispatch(x[:4], handle),
            ),
            (
                "handle must be the DispatchHandle that dispatch returned",
                TypeError,
                lambda: buffer.dispatch(x, tuple(handle)),
            ),
            (
                "handle must be the DispatchHandle that dispatch returned",
                TypeError,
                lambda: buffer.combine(y, None),
            ),
            ("x must have a row for each of the", Refused, lambda: buffer.combine(y[:-1], handle)),
            ("x must be a tensor, got tuple", TypeError, lambda: buffer.combine((y, y), handle)),
            ("x must be bfloat16", Refused, lambda: buffer.combine(y.double(), handle)),
            ("bias must be one or two, got 3", Refused, lambda: buffer.combine(y, handle, bias=(x, x, x))),
            ("bias must be a tensor or a pair", TypeError, lambda: buffer.combine(y, handle, bias=1.0)),
            (r"bias must be \[5, 8\]", Refused, lambda: buffer.combine(y, handle, bias=x[:4])),
            ("bias must be .* torch.bfloat16", Refused, lambda: buffer.combine(y, handle, bias=x.float())),
            ("x must be on cpu, as .*, got meta", Refused, lambda: buffer.combine(y.to("meta"), handle)),
            ("bias must be on cpu", Refused, lambda: buffer.combine(y, handle, bias=(x, x.to("meta")))),
            (
                "topk_weights must be on cpu",
                Refused,
                lambda: buffer.combine(y, handle, torch.zeros(len(y), 2, device="meta")),
            ),
            ("topk_weights must be", Refused, lambda: buffer.combine(y, handle, torch.zeros(len(y) + 1, 2))),
            (
                "topk_weights must be",
                Refused,
                lambda: buffer.combine(y, handle, torch.zeros(len(y), 2).half()),
            ),
            (
                "allocate_on_comm_stream",
                Refused,
                lambda: buffer.combine(y, handle, allocate_on_comm_stream=True),
            ),
            ("internode_dispatch needs a config", Refused, lambda: buffer.internode_dispatch(x, handle)),
            ("internode_combine needs a config", Refused, lambda: buffer.internode_combine(y, handle)),
        ]:
            with pytest.raises(kind, match=text):
                refused()
        return buffer.combine(y, handle)[0].shape

    assert on_ranks(WORLD, call) == [(5, 8)] * 2


def test_tokens_of_more_than_32_ranks_need_top_k():
    mask = torch.ones(2, 40, dtype=torch.bool)
    with pytest.raises(ValueError, match="a token goes to 40 ranks; commlib sends to 32 at most"):
        deep_ep.layout.ranks_as_ids(mask)
    mask[:, 30:] = False
    assert sorted(deep_ep.layout.ranks_as_ids(mask)[1].tolist()) == [-1, -1, *range(30)]


NOT_HERE = {
    "low_latency_update_mask_buffer": (0,),
    "low_latency_query_mask_buffer": (torch.zeros(1),),
    "low_latency_clean_mask_buffer": (),
    "get_local_buffer_tensor": (torch.int8,),
}


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_not_here_says_what_to_do(name):
    def call(buffer, rank):
        with pytest.raises(NotImplementedError, match=rf"{name}\): .{{20}}"):
            getattr(buffer, name)(*NOT_HERE[name])

    on_ranks(make_world([1]), call)


def test_a_buffer_knows_its_ranks_and_what_it_was_made_with():
    def call(buffer, rank):
        assert (buffer.rank, buffer.group_size, buffer.group.size) == (rank, 2, 2)
        assert buffer.explicitly_destroy and not buffer.low_latency_mode and not buffer.enable_shrink
        other = Buffer(buffer.group, 1 << 20, 2, low_latency_mode=True, num_qps_per_rank=4, allow_mnnvl=True)
        assert (other.num_nvl_bytes, other.num_rdma_bytes, other.low_latency_mode) == (1 << 20, 2, True)
        with pytest.raises(Refused, match="destroy needs a buffer made with explicitly_destroy=True"):
            other.destroy()
        with pytest.raises(NotImplementedError, match="no enable_shrink"):
            Buffer(None, enable_shrink=True)

    on_ranks(WORLD, call)


def test_a_destroyed_buffer_is_of_no_more_use():
    def rank_main(rank):
        with made() as buffer:
            args = laid_out(buffer, WORLD, rank) | top_k(WORLD, rank)
            x, *_, handle, _ = buffer.dispatch(WORLD.x[rank], **args)
            buffer.destroy()
            assert buffer.runtime is None
            with pytest.raises(Refused, match="the buffer has been destroyed"):
                buffer.dispatch(WORLD.x[rank], **args)
            with pytest.raises(Refused, match="the buffer has been destroyed"):
                buffer.combine(x, handle)
        return x

    for rank, x in enumerate(commlib.run_ranks(rank_main, 2)):  # results outlive it
        assert torch.equal(x, expected_rank_layout(WORLD, rank).x)


def test_there_must_be_a_group():
    with pytest.raises(ValueError, match="Either 'group' or 'comm' must be provided"):
        Buffer(None)
    with pytest.raises(TypeError, match=r"group must be a commlib\.Group"):
        Buffer("all")


def test_class_methods():
    assert Buffer.num_sms == 20
    try:
        Buffer.set_num_sms(24)
        assert Buffer.num_sms == 24
        for wrong in (23, 0, -2):
            with pytest.raises(Refused, match=f"must be even and positive, got {wrong}"):
                Buffer.set_num_sms(wrong)
    finally:
        Buffer.num_sms = 20
    for ranks in (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160):
        for config in (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)):
            size = config.get_nvl_buffer_size_hint(7168 * 2, ranks)
            assert size % 128 == 0 and size > 7168 * 2
            assert (config.get_rdma_buffer_size_hint(7168 * 2, ranks) > 0) == (ranks > 8)
    for ranks in (1, 3, 6, 7, 256):
        with pytest.raises(Refused, match=f"Unsupported number of EP ranks: {ranks}"):
            Buffer.get_dispatch_config(ranks)
    hint = Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=128, hidden=4096, num_ranks=8, num_experts=64
    )
    assert hint >= 128 * 64 * 4096 * 2
    assert Buffer.is_sm90_compiled() in (False, True)


@pytest.mark.parametrize(
    "wrong", [(-1,), (20, 6, 6), (20, 0), (20, 7, 6), (20, 6, 256, 0), (20, 6, 256, 6, 0), (20, 6, 256, 6, 6)]
)
def test_configs_are_checked_as_deepep_does(wrong):
    with pytest.raises(Refused):
        Config(*wrong)


def test_configs_may_be_given():
    Config(24, 8, 256)
    Config(20, 6, 256, 100, 150)  # the last is rounded up to 200
    with pytest.raises(Refused, match="num_ranks must be less than 8 or a multiple of it, got 12"):
        Config().get_nvl_buffer_size_hint(1024, 12)
    with pytest.raises(Refused, match="hidden_bytes must be positive"):
        Config().get_nvl_buffer_size_hint(0, 8)


def test_domains():
    def call(buffer, rank):
        return deep_ep.get_logical_domain_size(buffer.group), deep_ep.get_physical_domain_size(buffer.group)

    assert on_ranks(WORLD, call) == [((1, 2), (1, 2))] * 2


def test_processes_of_torch_distributed(torch_ranks):
    def main(rank):
        import torch.distributed as dist

        buffer = Buffer(dist.group.WORLD, 0, 0, explicitly_destroy=True)
        got = buffer.dispatch(WORLD.x[rank], **laid_out(buffer, WORLD, rank), **top_k(WORLD, rank))
        sums = buffer.combine(got[0], got[4])[0]
        elastic = deep_ep.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=8, explicitly_destroy=True)
        rows = elastic.dispatch(WORLD.x[rank], **top_k(WORLD, rank), num_experts=4, do_expand=True)[0]
        elastic.barrier()
        elastic.destroy()
        buffer.destroy()
        assert (buffer.rank, buffer.group_size, buffer.group) == (rank, 2, dist.group.WORLD)
        assert deep_ep.get_logical_domain_size(dist.group.WORLD) == (1, 2)
        return got[0].float().tolist(), len(sums), len(rows)

    for rank, (x, tokens, rows) in enumerate(torch_ranks(main, 2)):
        want = expected_rank_layout(WORLD, rank)
        assert x == want.x.float().tolist()
        assert (tokens, rows) == (5, sum(want.tokens_per_expert))


def test_some_of_the_ranks_make_a_group(torch_ranks):
    def main(rank):
        import torch.distributed as dist

        group = dist.new_group([0, 2])
        if rank == 1:
            return None
        buffer, mine = Buffer(group, explicitly_destroy=True), rank // 2
        got = buffer.dispatch(WORLD.x[mine], **laid_out(buffer, WORLD, mine), **top_k(WORLD, mine))
        buffer.destroy()
        return buffer.rank, got[0].float().tolist()

    first, nothing, second = torch_ranks(main, 3)
    assert nothing is None
    for rank, got in enumerate((first, second)):
        assert got == (rank, expected_rank_layout(WORLD, rank).x.float().tolist())


def test_buffers_may_be_dropped_and_their_handles_used_with_others():
    def rank_main(rank):
        for _ in range(5):
            buffer = Buffer(None)
            got = buffer.dispatch(WORLD.x[rank], **laid_out(buffer, WORLD, rank), **top_k(WORLD, rank))
            del buffer
            other = Buffer(None)  # as when a larger one is made, with calls of the other under way
            sums = other.combine(got[0], got[4], got[2])[0]
            again = other.dispatch(WORLD.x[rank].float(), got[4])[0]
        assert torch.equal(again, got[0].float())
        return got[0], sums

    for rank, (x, sums) in enumerate(commlib.run_ranks(rank_main, 2)):
        assert torch.equal(x, expected_rank_layout(WORLD, rank).x)
        assert sums.shape == (5, 8)


MPI = """
import torch
from mpi4py import MPI

from commlib.compat import install

install()
from deep_ep import Buffer

buffer = Buffer(None, comm=MPI.COMM_WORLD, explicitly_destroy=True)
ids = torch.tensor([[0], [1]])
per_rank, _, per_expert, mask, _ = buffer.get_dispatch_layout(ids, 2)
x = torch.full((2, 8), 1.0 + buffer.rank).bfloat16()
got = buffer.dispatch(x, None, per_rank, None, mask, per_expert, ids, torch.ones(2, 1))
assert got[0][:, 0].tolist() == [1.0, 2.0] and buffer.group == MPI.COMM_WORLD
assert torch.equal(buffer.combine(got[0], got[4])[0], x)
buffer.destroy()
"""


def test_processes_of_mpi(launch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(MPI)
    done = launch(str(program), 2)
    assert done.returncode == 0, done.stdout + done.stderr


def python(program, cwd):
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_installed_it_is_deep_ep(tmp_path):
    done = python(
        """
import importlib.util
from commlib.compat import install

module = install()
assert install() is module  # twice is fine
import deep_ep, deep_ep.utils
from deep_ep import Buffer, Config, ElasticBuffer, EPHandle, EventOverlap, EventHandle, topk_idx_t
from deep_ep import get_logical_domain_size, get_physical_domain_size
from deep_ep.utils import EventHandle, EventOverlap

assert deep_ep is module and deep_ep.__version__ == "2.1.0"
assert importlib.util.find_spec("deep_ep") is not None
from commlib.compat.deep_ep import Buffer as ours
assert Buffer is ours
from deep_ep.buffer import Buffer  # where DeepEP 1 has it
assert Buffer is ours
assert install() is module  # still
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("imported", ["deep_ep", "deep_ep.utils"])
def test_it_refuses_where_another_deep_ep_is_in_use(tmp_path, imported):
    (tmp_path / "deep_ep").mkdir()
    for name in ("__init__.py", "utils.py"):
        (tmp_path / "deep_ep" / name).touch()
    done = python(f"import {imported}; from commlib.compat import install; install()", tmp_path)
    assert "deep_ep/__init__.py: call commlib.compat.install() before whatever imports DeepEP" in done.stderr
    assert "RuntimeError: deep_ep has been imported already" in done.stderr


def test_it_goes_before_another_deep_ep_that_nothing_has_imported(tmp_path):
    (tmp_path / "deep_ep.py").write_text("raise ImportError('needs a GPU')")
    done = python("from commlib.compat import install; install(); import deep_ep; deep_ep.Buffer", tmp_path)
    assert done.returncode == 0, done.stderr
