"""The staged pages are what the site is made of: every page, name, link, picture and equation is looked at without Quarto."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pypandoc
import pytest
import yaml
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.name for p in (ROOT / 'nbs').glob('*.ipynb'))


class Page:
    "A staged notebook: what a reader of the site sees of it."
    def __init__(self, path):
        self.name, cells = path.name, json.loads(path.read_text())['cells']
        self.front = yaml.safe_load(''.join(cells[0]['source']).strip().strip('-'))
        self.prose = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
        self.shown = [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
        self.code = [c for c in cells if c['cell_type'] == 'code']
        self.url = self.front.get('output-file', path.stem + '.html')

    def text(self): return '\n\n'.join(self.prose + self.shown)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "Stage the pages, as `make docs` does before it calls Quarto: that runs the import cells and looks up every name that the pages document. Once for all processes that run these tests."
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: root = root.parent
    project = root / 'site'
    with FileLock(root / 'site.lock'):
        if not (project / 'staged').exists():
            shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns('.*', '_proc', '_docs', 'rvpo-demo', 'runs', '*.egg-info'), symlinks=True)
            (project / 'stage.py').write_text('from nbdev.serve import proc_nbs\nif __name__ == "__main__": proc_nbs(force=True)\n')
            done = subprocess.run([sys.executable, 'stage.py'], cwd=project, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
            (project / 'staged').touch()
    return project / '_proc'


@pytest.fixture(scope='module')
def pages(site): return [Page(p) for p in sorted(site.glob('*.ipynb'))]


def test_every_chapter_is_a_page_with_a_title_of_its_own(pages):
    assert [p.name for p in pages] == NOTEBOOKS
    for p in pages: assert p.front['title'] and p.front.get('description'), p.name
    assert len({p.front['title'] for p in pages}) == len({p.url for p in pages}) == len(pages)


def public_names():
    "Read functions and classes from the source: two modules cannot be imported without the engine that they adapt."
    for path in sorted((ROOT / 'rvpo_nb').glob('[a-z]*.py')):
        tree = ast.parse(path.read_text())
        [names] = [ast.literal_eval(x.value) for x in tree.body if isinstance(x, ast.Assign) and getattr(x.targets[0], 'id', '') == '__all__']
        for x in ast.walk(tree):
            if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and x.col_offset == 0 and x.name in names: yield path.stem, x.name, ast.get_docstring(x)


def test_every_public_name_is_explained_on_a_page(pages):
    "By nbdev's table of its arguments; the source stands below it."
    headings = set(re.findall(r'^#+ (\w+)$', '\n'.join(p.text() for p in pages), re.M))
    lacking = [f'{module}.{name}' for module, name, _ in public_names() if name not in headings]
    assert not lacking, f'no page shows the API of {lacking}'


def test_every_public_name_has_a_docstring_of_a_sentence():
    bad = [f'{module}.{name}' for module, name, doc in public_names() if not re.match(r'[A-Z].*\.$', (doc or '').split('\n\n')[0], re.S)]
    assert not bad, bad


def test_links_between_pages_lead_somewhere(pages, site):
    urls, files = {p.url for p in pages}, {p.name for p in pages}
    for p in pages:
        for target in re.findall(r'\]\(([^)\s]+)[^)]*\)', p.text()) + re.findall(r'(?:src|href)="([^"]+)"', p.text()):
            target = target.removeprefix('https://rvpo-nb.github.io/rvpo_nb/').split('#')[0]
            if not target or re.match(r'https?://|mailto:', target): continue
            assert target in urls | files or (site / target).is_file(), f'{p.name} links to {target}, which is not there'


def test_names_link_to_entries_that_are_there(pages):
    "Methods stand under their class."
    there = {(p.url, h.lower()) for p in pages for h in re.findall(r'^#+ ([\w.]+)$', p.text(), re.M)}
    for p in pages:
        for url, anchor in re.findall(r'\]\(https://rvpo-nb\.github\.io/rvpo_nb/(\w+\.html)#([\w.]+)\)', p.text()):
            assert (url, anchor.split('.')[0]) in there, f'{p.name} links to {url}#{anchor}'


def test_pictures_say_in_words_what_they_show(pages, site):
    for p in pages:
        for alt, path in re.findall(r'!\[([^\]]*)\]\(([^)]+)\)', p.text()):
            assert len(alt) > 40 and (site / path).is_file(), f'{p.name}: {path}'
        for c in p.code:
            if any('image/png' in o.get('data', {}) for o in c['outputs']):
                alt = re.search(r'^#\| fig-alt: "(.+)"$', ''.join(c['source']), re.M)
                assert alt and len(alt[1]) > 40, f'{p.name}: a figure without words: {"".join(c["source"])[:200]}'


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_equations_parse(pages, name):
    "By pandoc, which turns them into MathML on the site; what it cannot read it would print as TeX."
    [page] = [p for p in pages if p.name == name]
    html = pypandoc.convert_text(page.text(), 'html', 'markdown', ['--mathml', '--fail-if-warnings'])
    assert html.count('<math') >= len(re.findall(r'^\$\$', page.text(), re.M)) // 2
    rest = re.sub(r'<(pre|code|math|annotation)\b.*?</\1>', '', html, flags=re.S)
    assert not re.search(r'\$[^$\n]*\\[a-z]+[^$\n]*\$', rest), 'TeX between dollars that was not read as an equation'


def test_an_equation_that_does_not_parse_is_noticed():
    with pytest.raises(RuntimeError): pypandoc.convert_text(r'$\frac{1}$', 'html', 'markdown', ['--mathml', '--fail-if-warnings'])


def test_the_site_has_what_its_settings_name(site):
    settings = yaml.safe_load((site / '_quarto.yml').read_text())
    html, website = settings['format']['html'], settings['website']
    named = [x for theme in html['theme'].values() for x in theme if x != 'default'] + [html['include-after-body'], website['open-graph']['image'], website['twitter-card']['image'], '404.md']
    for name in named: assert (site / name).is_file(), name
    assert website['search'] and website['page-navigation'] and set(html['theme']) == {'light', 'dark'}
    assert 'title:' in (site / '404.md').read_text()
