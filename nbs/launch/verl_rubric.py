"""Rubrics under verl: RaR-Medicine, a reward for each criterion. Run: writes the data into a folder. Given to verl: its reward function."""
import os
import sys
from pathlib import Path

from rvpo_nb.ask import Endpoint
from rvpo_nb.data import load_rar
from rvpo_nb.judge import Judge, criterion_rewards
from rvpo_nb.verl import score_function, write_parquet

CRITERIA = 17  # rewards; prompts with more criteria are left out

if __name__ == '__main__':
    folder, *sources = sys.argv[1:]  # the sources of train and val: files, by default the hub
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in dict(train=load_rar(*sources[:1]), val=load_rar(*sources[1:] or ['ScaleAI/RaR-Medicine', 'val'])).items():
        few = [row for row in rows if len(row['rubric']) <= CRITERIA]
        print(write_parquet(few, f'{folder}/{name}.parquet', 'rar', answer='reference_answer'), 'of', len(rows), 'rows of', name)
else:
    judge = Judge(Endpoint(os.environ['JUDGE_MODEL'], os.environ.get('JUDGE_URL')))  # the key comes from OPENAI_API_KEY
    compute_score = score_function(criterion_rewards(judge, CRITERIA))
