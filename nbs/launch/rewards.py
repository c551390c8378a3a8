"""Three rewards of the embedded task, written once for every engine; `notice` does not apply to most questions."""
from rvpo_nb.reward import completion_text


def advice(completions, points, **columns):
    "Measure which share of the treatments asked for an answer mentions."
    return [sum(p in completion_text(c).lower() for p in asked) / len(asked) for c, asked in zip(completions, points)]


def short(completions, limit, **columns):
    "Reward answers within the question's limit of words."
    return [float(len(completion_text(c).split()) <= most) for c, most in zip(completions, limit)]


def notice(completions, criteria, **columns):
    "Reward telling the patient to see a doctor, where the question asks for it."
    return [float('doctor' in completion_text(c)) if 'notice' in asked else None for c, asked in zip(completions, criteria)]


for reward in (advice, short, notice): reward.bounds = (0, 1)
advice.threshold = 1.0
REWARDS = [advice, short, notice]
