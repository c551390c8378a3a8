"""Three rewards of the embedded task, written once for every engine."""
from rvpo_nb.reward import completion_text


def advice(completions, points, **columns):
    "Measure which share of the treatments asked for an answer mentions."
    texts = [completion_text(c).lower() for c in completions]
    return [sum(p in text for p in asked) / len(asked) for text, asked in zip(texts, points)]


def short(completions, limit, **columns):
    "Reward answers within the question's limit of words."
    words = [len(completion_text(c).split()) for c in completions]
    return [float(n <= most) for n, most in zip(words, limit)]


def notice(completions, criteria, **columns):
    "Reward telling the patient to see a doctor, where the question asks for it."
    said = [float('doctor' in completion_text(c)) for c in completions]
    return [x if 'notice' in asked else None for x, asked in zip(said, criteria)]


for reward in (advice, short, notice): reward.bounds = (0, 1)
advice.threshold = 1.0
REWARDS = [advice, short, notice]
