"""Tool calling on RLLA-4k under verl. Run: writes train.parquet and val.parquet into a folder. Given to verl: its reward function."""
import sys
from pathlib import Path

from rvpo_nb.data import load_rlla
from rvpo_nb.reward import format_reward, tool_correctness_reward
from rvpo_nb.verl import score_function, write_parquet

compute_score = score_function([format_reward, tool_correctness_reward])

if __name__ == '__main__':
    folder, *source = sys.argv[1:]  # the source: a file, by default the hub
    rows = load_rlla(*source).shuffle(seed=0).to_list()
    val = max(1, len(rows) // 40)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, part in dict(val=rows[:val], train=rows[val:]).items(): print(write_parquet(part, f'{folder}/{name}.parquet', 'rlla'), 'rows of', name)
