"""Write README.md from nbs/index.ipynb, which is also the first page of the site."""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]


def readme():
    "Return the README: the prose, the code that is shown, and its text output."
    parts = []
    for cell in nbformat.read(ROOT / 'nbs' / 'index.ipynb', as_version=4).cells:
        if re.search(r'^#\|\s*hide\s*$', cell.source, re.M): continue
        if cell.cell_type == 'markdown': parts.append(local(cell.source))
        elif cell.cell_type == 'code':
            parts.append(f'```python\n{cell.source}\n```')
            texts = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell.outputs]
            if text := ''.join(texts).rstrip(): parts.append(f'```\n{text}\n```')
    return '\n\n'.join(parts) + '\n'


def local(text):
    "Point links and images that are relative to nbs/ at nbs/."
    return re.sub(r'\]\((?!https?://|#|mailto:)([^)]+)\)', r'](nbs/\1)', text)


if __name__ == '__main__':
    (ROOT / 'README.md').write_text(readme())
