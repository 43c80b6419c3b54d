"""Models of transformers whose experts are spread over in-process ranks compute what unsharded ones do."""

import copy
import importlib
import sys
from importlib import metadata

import pytest
import torch
from hf_models import EXPERTS, NAMES, batch, model_of, unsharded, whole_gradients
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import commlib
from commlib.integrations.transformers import gather_state_dict, parallel, parallelize
from commlib.nn import ShardedExperts, expert_parameters

RANKS = 3


def on_ranks(model, main, ranks=RANKS, device="cpu"):
    """``main(rank, model)``, with a copy of the model for each rank."""
    models = [copy.deepcopy(model) for _ in range(ranks)]
    if device != "cpu":
        models = [model.to(device) for model in models]
    return commlib.run_ranks(lambda rank: main(rank, models[rank]), ranks, device=device)


def trained(rank, model, ids):
    """Loss, logits and gradients of one batch."""
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def check(got, wanted, gradients, tolerance=1e-5):
    close = dict(rtol=tolerance, atol=tolerance, check_device=False)
    for (loss, logits, _), (want_loss, want_logits) in zip(got, wanted, strict=True):
        torch.testing.assert_close(loss, want_loss, **close)
        torch.testing.assert_close(logits, want_logits, **close)
    for name, grad in whole_gradients([grads for *_, grads in got], gradients).items():
        scale = gradients[name].abs().max().item() + 1e-6
        torch.testing.assert_close(
            grad, gradients[name], rtol=0, atol=10 * tolerance * scale, check_device=False, msg=name
        )


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_losses_and_gradients_are_those_of_the_unsharded_model(name, implementation, device):
    model = model_of(name, implementation=implementation)
    batches = [batch(rank) for rank in range(RANKS)]
    wanted, gradients = unsharded(model, batches)

    def main(rank, model):
        return trained(rank, parallelize(model), batches[rank].to(device))

    check(on_ranks(model, main, device=device), wanted, gradients)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_bfloat16(name):
    """Experts see the same rows and weights as unsharded ones; only the sum over experts rounds elsewhere."""
    model = model_of(name, dtype=torch.bfloat16)
    batches = [batch(rank) for rank in range(RANKS)]
    wanted, gradients = unsharded(model, batches)
    got = on_ranks(model, lambda rank, model: trained(rank, parallelize(model), batches[rank]))
    check(got, wanted, gradients, tolerance=2**-6)


@pytest.mark.parametrize("recompute", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_experts_without_rows_and_ranks_with_one_token(recompute):
    """Experts that no token goes to have gradients, of zero: code that waits for them would wait for ever."""
    model = model_of("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:  # all tokens to experts 1 and 2, which are on rank 1
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[1:3] = 1.0
    model.model.embed_tokens.weight.data.abs_()
    batches = [batch(rank, tokens=2 if rank else 11) for rank in range(RANKS)]
    wanted, gradients = unsharded(model, batches)

    def main(rank, model):
        parallelize(model)
        if recompute is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recompute)
            model.enable_input_require_grads()
            model.train()
        return trained(rank, model, batches[rank])

    got = on_ranks(model, main)
    check(got, wanted, gradients)
    assert all(grad is not None for *_, grads in got for name, grad in grads.items() if "experts" in name)


def test_one_communicator_serves_all_layers_and_grows_with_the_batch(monkeypatch):
    monkeypatch.setattr("commlib.settings._FIRST_ROWS", 4)
    model = model_of("qwen3_moe")
    batches = [
        [batch(3 * step + rank, tokens=n) for n in (3, 40, 2)] for rank in range(RANKS) for step in [rank]
    ]

    def main(rank, model):
        parallelize(model)
        with torch.no_grad():
            logits = [model(input_ids=ids).logits for ids in batches[rank]]
        eps = [part.exchange._ep for part in model.modules() if isinstance(part, ShardedExperts)]
        assert len(eps) > 1
        (communicator,) = {ep._comm for ep in eps}
        return logits, communicator.growths

    for rank, (logits, growths) in enumerate(on_ranks(model, main)):
        assert growths >= 2  # beyond the rows of 3 tokens, but not at once to the most
        for got, ids in zip(logits, batches[rank], strict=True):
            torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model(name):
    """As one graph, which transformers' default implementation is unsharded; "eager" is not."""
    model = model_of(name).eval()
    ids = batch(0)

    def main(rank, model):
        parallelize(model)
        with torch.no_grad():
            model(input_ids=ids)  # the communicator is made outside of compiled code
            return torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids).logits

    torch._dynamo.reset()
    (got,) = on_ranks(model, main, ranks=1)
    torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_in_process_ranks_generate_texts_of_different_lengths():
    model = model_of("qwen3_moe")
    options = dict(do_sample=False, pad_token_id=0)
    limits = [2, 9, 5]
    wanted = [model.generate(batch(i, tokens=4), max_new_tokens=n, **options) for i, n in enumerate(limits)]

    def main(rank, model):
        return parallelize(model).generate(batch(rank, tokens=4), max_new_tokens=limits[rank], **options)

    for got, want in zip(on_ranks(model, main), wanted, strict=True):
        assert torch.equal(got, want)


def test_what_is_trained_stays_what_it_was():
    model = model_of("gpt_oss")
    model.model.layers[0].mlp.experts.requires_grad_(False)

    def main(rank, model):
        parallelize(model)
        first, second = (part for part in model.modules() if isinstance(part, ShardedExperts))
        count = second.num_experts
        assert second.gate_up_proj.shape[0] == count == len(second.down_proj_bias)
        assert not any(p.requires_grad for p in first.parameters())
        assert all(p.requires_grad for p in second.parameters())
        assert len(list(expert_parameters(model))) == 8
        # No rank keeps the memory of all experts.
        assert second.down_proj.untyped_storage().nbytes() == second.down_proj.nbytes
        return count

    assert sum(on_ranks(model, main)) == EXPERTS


def refused(model, text, kind=ValueError, ranks=2):
    before = {name: p.shape for name, p in model.named_parameters()}

    def main(rank, model):
        with pytest.raises(kind, match=text):
            parallelize(model)
        assert {name: p.shape for name, p in model.named_parameters()} == before

    on_ranks(model, main, ranks)


def test_models_that_cannot_be_spread_are_refused():
    small = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    refused(AutoModelForCausalLM.from_config(LlamaConfig(**small)), "LlamaForCausalLM has no experts")
    refused(nn.Linear(2, 2), "takes a model of transformers, got Linear", TypeError)
    refused(model_of("mixtral", experts=2), "has 2 experts, fewer than there are ranks, 3", ranks=3)

    quantised = model_of("mixtral")
    quantised.is_quantized = True
    refused(quantised, "is quantised: load it in bfloat16")
    whole = model_of("mixtral")
    layer = whole.model.layers[0].mlp.experts
    layer.down_proj = nn.Parameter(layer.down_proj.to(torch.int8), requires_grad=False)
    refused(whole, r"layers\.0\.mlp\.experts\.down_proj is torch\.int8: load the model in")
    tied = model_of("mixtral")
    tied.model.layers[1].mlp.experts.down_proj = tied.model.layers[0].mlp.experts.down_proj
    refused(tied, "have a parameter in common")
    shared = model_of("mixtral")
    shared.model.layers[0].mlp.experts.norm = nn.LayerNorm(64)
    refused(shared, r"experts\.norm\.weight \[64\] is not one of the experts' own parameters")
    with torch.device("meta"):
        empty = model_of("mixtral")
    refused(empty, r"has no memory \(meta device\)")


@pytest.mark.parametrize(
    "version, text", [("5.23.1", "is installed, but commlib is tested with"), (None, "is not installed: pip")]
)
def test_importing_it_says_which_transformers_it_is_tested_with(version, text, monkeypatch):
    def found(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.delitem(sys.modules, "commlib.integrations.transformers")
    with pytest.raises(ImportError, match=rf"transformers .*{text}.*transformers>=5\.24,<5\.25"):
        importlib.import_module("commlib.integrations.transformers")


def test_a_second_time_is_refused():
    def main(rank, model):
        parallelize(model)
        with pytest.raises(ValueError, match="have been spread already"):
            parallelize(model)

    on_ranks(model_of("mixtral"), main)


def test_ranks_with_different_models_are_refused_on_all():
    models = [model_of("mixtral"), model_of("mixtral", experts=6)]

    def main(rank):
        with pytest.raises(ValueError, match=r"ranks have different models: rank 0 has .*, rank 1 has "):
            parallelize(models[rank])

    commlib.run_ranks(main, 2)


@pytest.mark.parametrize("wrong", ["is quantised", "takes a model of transformers, got Linear"])
def test_a_model_that_one_rank_refuses_is_refused_on_all(wrong, monkeypatch):
    monkeypatch.setattr(parallel, "START_SECONDS", 20.0)  # a reported error needs no deadline
    models = [model_of("mixtral"), nn.Linear(2, 2) if "Linear" in wrong else model_of("mixtral")]
    models[1].is_quantized = True

    def main(rank):
        told = (TypeError, ValueError) if rank == 1 else commlib.CommError
        with pytest.raises(told, match=wrong) as caught:
            parallelize(models[rank])
        assert not isinstance(caught.value, commlib.PeerTimeout)

    commlib.run_ranks(main, 2)


def test_without_torch_distributed_nothing_is_saved_in_parts(tmp_path):
    def main(rank, model):
        parallelize(model)
        for call in (lambda: gather_state_dict(model), lambda: model.save_pretrained(tmp_path / "saved")):
            with pytest.raises(RuntimeError, match=r"torch\.distributed does not know the ranks"):
                call()
        with pytest.raises(
            ValueError, match=r"experts\.gate_up_proj'\] is one rank's part: leave state_dict"
        ):
            model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())

    on_ranks(model_of("mixtral"), main)
    assert not (tmp_path / "saved").exists()
