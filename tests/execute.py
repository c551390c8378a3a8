"""Run notebooks and keep their outputs: `python tests/execute.py nbs/00_softmin.ipynb ...` (all of them by default).

nbdev tests notebooks without saving what they print, and Jupyter's own runner knows nothing of nbdev's flags. This one
skips the cells that the tests skip (`#| eval: false`, and the flags in settings.ini), keeps their stored output, drops
what goes to stderr (progress bars, warnings), and cleans the result, so that a second run changes nothing.
"""
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault('DS_ACCELERATOR', 'cpu')  # DeepSpeed, where it is installed, would print that it looks for one


class Runner(NotebookClient):
    skipped = re.compile(r'^#\|\s*(eval:\s*false|' + '|'.join(get_config(path=ROOT).tst_flags.split()) + r')\s*$', re.M)

    async def async_execute_cell(self, cell, index, **kwargs):
        if cell.cell_type == 'code' and self.skipped.search(cell.source): return cell
        return await super().async_execute_cell(cell, index, **kwargs)


def run(path):
    "Execute one notebook in place."
    nb = nbformat.read(path, as_version=4)
    Runner(nb, timeout=1200, coalesce_streams=True, resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in nb.cells:
        if cell.cell_type == 'code':
            cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    nbformat.write(nb, path)
    nbdev_clean(str(path))


if __name__ == '__main__':
    for name in sys.argv[1:] or sorted((ROOT / 'nbs').glob('*.ipynb')):
        print(name, flush=True)
        run(Path(name).resolve())
