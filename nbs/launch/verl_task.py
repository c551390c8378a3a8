"""The task of train.py under verl. Run: writes train.parquet and val.parquet into a folder. Given to verl: its reward function."""
import sys
from pathlib import Path

from rvpo_nb.patients import rubric_prompts
from rvpo_nb.verl import score_function, write_parquet

sys.path.insert(0, str(Path(__file__).parent))  # verl loads this file by its path alone
from rewards import REWARDS

compute_score = score_function(REWARDS)

if __name__ == '__main__':
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in dict(train=rubric_prompts(64, criteria=(5, 9)), val=rubric_prompts(64, seed=1, criteria=(5, 9))).items():
        print(write_parquet(rows, f'{folder}/{name}.parquet', 'task', answer='closing'), 'rows of', name)
