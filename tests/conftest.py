"""No test reaches a hub, and none shows a progress bar."""
import os

for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY', 'HF_HUB_DISABLE_PROGRESS_BARS'): os.environ[name] = '1'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
