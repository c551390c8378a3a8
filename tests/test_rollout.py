"""Sharing prompts changes no number, for any model, length or layout; what cannot share is found out."""
import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from rvpo_nb.loss import completion_logps
from rvpo_nb.rollout import completion_hidden, filters, join, plain_logits, sample, share_prompts, shareable

TINY = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)


def model(kind, **changes):
    torch.manual_seed(0)
    m = getattr(tf, f'{kind}ForCausalLM')(getattr(tf, f'{kind}Config')(**TINY | changes)).eval()
    for p in m.parameters(): p.data.mul_(3)  # far from uniform, so that a wrong context shows
    return m


QWEN = model('Qwen2')


def draw(m, prompts, g=4, length=12, seed=0, **kw):
    return sample(m, prompts, num_generations=g, max_completion_length=length, eos_token_id=kw.pop('eos', list(range(2, 8))), pad_token_id=0,
                  generator=torch.Generator().manual_seed(seed), **kw)


@pytest.mark.parametrize('kind', ['Llama', 'Qwen2', 'Qwen3', 'Mistral', 'Phi3', 'GPTNeoX', 'OPT', 'Olmo2'])
def test_models_with_plain_attention_share_and_sample_the_same(kind):
    m = model(kind, **dict(sliding_window=None) if kind in ('Mistral', 'Phi3') else dict(ffn_dim=64, word_embed_proj_dim=32) if kind == 'OPT' else {})
    assert shareable(m)
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12]]
    plain = draw(m, prompts)
    with share_prompts(m): shared = draw(m, prompts)
    assert torch.equal(plain.completion_ids, shared.completion_ids) and torch.equal(plain.ended, shared.ended)
    assert (plain.logps - shared.logps).abs().max() < 1e-4


@pytest.mark.parametrize('kind, changes', [
    ('Gemma2', dict(head_dim=8)), ('Mistral', dict(sliding_window=4)), ('Bloom', dict(n_head=4, n_layer=2)), ('Cohere', dict(logit_scale=0.1)), ('Mamba', dict(state_size=4))])
def test_models_with_other_attention_or_outputs_are_told_apart_and_still_sampled_right(kind, changes):
    m = model(kind, **changes)
    assert kind == 'Cohere' or not shareable(m)
    if kind == 'Mamba': return
    with share_prompts(m, shareable(m)):
        r = draw(m, [[5, 6, 7, 8, 9], [10]], length=8)
        with torch.no_grad(): logps, _ = completion_logps(m, r)
    assert ((logps - r.logps) * r.completion_mask).abs().max() < 1e-4


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 12), st.integers(0, 10 ** 6))
@settings(max_examples=40, deadline=None)
def test_any_lengths_any_group(lengths, g, length, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 50, (n,), generator=generator).tolist() for n in lengths]
    with share_prompts(QWEN):
        r = draw(QWEN, prompts, g, length, seed, temperature=0.7)
        with torch.no_grad(): logps, entropy = completion_logps(QWEN, r, 0.7)
    with torch.no_grad(): plain = (plain_logits(QWEN, r) / 0.7).log_softmax(-1)
    on = r.completion_mask.bool()
    assert ((plain.gather(-1, r.completion_ids[..., None]).squeeze(-1) - logps)[on]).abs().max() < 1e-4
    assert (logps - r.logps).abs().max() < 1e-4
    assert (-(plain.exp() * plain).sum(-1) - entropy)[on].abs().max() < 1e-4
    assert torch.equal(r.ended, (torch.isin(r.completion_ids, torch.arange(2, 8)) & on).any(-1))


def test_rows_that_have_ended_are_no_longer_computed():
    seen = []
    hook = QWEN.get_decoder().layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    with share_prompts(QWEN): r = draw(QWEN, [[5, 6, 7], [8, 9]], g=32, length=24)
    hook.remove()
    assert seen[0] == 5 and seen[1] == 64 and seen[-1] < 16 and sum(seen) < 2 / 3 * 64 * len(seen)


def test_any_rows_in_any_order_make_a_batch_with_the_same_log_probs():
    with share_prompts(QWEN):
        r = draw(QWEN, [[5, 6, 7], [8, 9], [10]])
        index = torch.tensor([9, 1, 2])
        with torch.no_grad(): logps, part = completion_logps(QWEN, r)[0], completion_logps(QWEN, r.rows(index))[0]
    assert torch.allclose(logps[index, :part.shape[1]], part, atol=1e-5) and r.rows(index).prompts == [[5, 6, 7], [10]]
    assert r.rows(index[:0]).completion_ids.shape == (0, 1) and len(join([r, r.rows(index)]).group) == 15


def test_gradients_are_those_of_the_plain_way():
    r = draw(QWEN, [[5, 6, 7, 8], [9, 10]])
    on, grads = r.completion_mask.bool(), []
    weight = torch.randn(on.shape, generator=torch.Generator().manual_seed(1))
    for shared in (False, True):
        QWEN.zero_grad()
        with share_prompts(QWEN, shared): (completion_logps(QWEN, r)[0] * weight * on).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in QWEN.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm()


def test_a_filter_keeps_the_log_probs_of_the_whole_distribution():
    with share_prompts(QWEN):
        r = draw(QWEN, [[5, 6, 7]], g=32, eos=0, warp=filters(top_k=2))
        with torch.no_grad(): whole = QWEN.get_output_embeddings()(completion_hidden(QWEN, r)).log_softmax(-1)
    drawn = whole.gather(-1, r.completion_ids[r.completion_mask.bool()][:, None]).squeeze(-1)
    assert (drawn >= whole.topk(2).values[:, 1] - 1e-6).all() and torch.allclose(drawn, r.logps[r.completion_mask.bool()], atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_graphs_sample_what_the_plain_way_samples():
    m = model('Qwen2', max_position_embeddings=256).cuda()
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12]]
    plain = draw(m, prompts, g=32, length=160, eos=[2])
    with share_prompts(m): shared = draw(m, prompts, g=32, length=160, eos=[2])
    assert torch.equal(plain.completion_ids, shared.completion_ids) and (plain.logps - shared.logps).abs().max() < 1e-3
