"""No test reaches a hub or shows a progress bar; one thread each, because threads of tiny models spend their time waiting for each other."""
import os
from pathlib import Path

for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY', 'HF_HUB_DISABLE_PROGRESS_BARS'): os.environ[name] = '1'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
os.environ['OMP_NUM_THREADS'] = '1'


def pytest_addoption(parser): parser.addoption('--faults-log', help='append the rows of the fault table to this JSONL file (see tests/faults/conftest.py)')


def pytest_configure(config):
    if (path := config.getoption('--faults-log')) and not hasattr(config, 'workerinput'): Path(path).unlink(missing_ok=True)  # workers append to one file
