"""The bandits' exact flows against long sampled averages, and runs that depend on their seed alone."""
import pytest
import torch

from rvpo_nb.advantage import advantages
from rvpo_nb.bandit import Arms, Flow, SentenceFlow, Sentences, gradient, needed_pass_rate, pick, train

MEANS = torch.tensor([[1.0] * 7 + [0], [0.7] * 7 + [1], [0.2] * 7 + [1], [0.4] * 8])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sampled(bandit, x, method, k, prompts, group):
    "Compute the gradient of one enormous batch."
    gen, pi = torch.Generator().manual_seed(1), x.softmax(-1)
    choice = pick(pi, torch.rand(1, prompts, group, len(x), generator=gen, dtype=torch.float64))
    return gradient(advantages(bandit.rewards(choice, bandit.draw(gen, prompts, group)), method, k=k), choice, pi)[0]


@pytest.mark.parametrize('method', ['grpo', 'ac', 'gdpo', 'dvao', 'rvpo', 'rvpo_explicit'])
@pytest.mark.parametrize('group', [4, 16])
def test_flow_is_the_mean_of_the_sampled_gradient(method, group):
    bandit, x = Arms(MEANS, noise=0), torch.tensor([0.8, 0.0, -0.7, 0.1], dtype=torch.float64)
    big = sampled(bandit, x[None], method, 2.0, 160_000 // group, group)
    assert torch.allclose(Flow(bandit, method, group=group).drift(x), big[0], atol=4e-3)  # about 4 standard errors


def test_noisy_flow():
    bandit, x = Arms(MEANS), torch.tensor([0.8, 0.0, -0.7, 0.1], dtype=torch.float64)
    big = sampled(bandit, x[None], 'rvpo', 2.0, 10_000, 16)
    assert torch.allclose(Flow(bandit, draws=8).drift(x), big[0], atol=6e-3)


def test_sentence_flow_is_the_limit_of_large_groups():
    bandit = Sentences(12)
    x = bandit.start + torch.tensor([0.3, 0.0, -0.3])
    big = sampled(bandit, x, 'rvpo', 2.0, 20, 4000)
    path, _ = SentenceFlow(bandit).run(2.0, steps=1, lr=1.0, start=x[-2:])
    push = path[1] - path[0]
    assert torch.allclose(push[0], big[:-1].mean(0), atol=3e-3) and torch.allclose(push[1, :2], big[-1, :2], atol=6e-3)


@pytest.mark.parametrize('bandit', [Arms(MEANS), Sentences(16)])
def test_a_run_depends_on_its_seed_alone(bandit):
    runs = [train(bandit, steps=5, seeds=n).logits for n in (3, 3, 2)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0][:, :2], runs[2]) and not torch.equal(runs[0][:, 0], runs[0][:, 1])


def test_settings_run_side_by_side_as_they_run_alone():
    both, alone = train(Sentences(torch.tensor([16, 10])), steps=5), train(Sentences(10), steps=5)
    assert torch.equal(both.logits[:, 1], alone.logits) and torch.equal(both.spread[:, 1], alone.spread)


def test_needed_pass_rate_falls_with_k_and_rises_with_the_rewards_against_it():
    k = [needed_pass_rate(k) for k in (0.5, 1.0, 2.0, 5.0, 50.0)]
    m = [needed_pass_rate(2.0, m) for m in (2, 5, 9, 17)]
    assert k == sorted(k, reverse=True) and m == sorted(m) and 0.5 < k[-1] < 0.55 and m[0] == pytest.approx(0.5)
