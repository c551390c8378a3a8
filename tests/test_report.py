"""The report as a browser would read it: hostile names, balanced tags, no address, and logs with little in them."""
import base64
import hashlib
import re
import warnings
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest

from rvpo_nb.audit import audit
from rvpo_nb.report import CSS, page, text, write_html
from rvpo_nb.softmin import InputError

NAMES = ['<script>alert(1)</script>', '" onload="alert(2)" x=\'', '$x_1$ \\frac{', 'long_' * 100, '🙂 日本語', 'two\nlines', '-->]]></title></svg><img src=x>', '_hidden', '&lt;b&gt;', '$hash ${css} {0} %s', 'rtl \u202e']


class Page(HTMLParser):
    "Check that tags nest, and collect tags, attributes, ids, and the text that is shown."
    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.attrs, self.shown, self.cells = [], [], [], [], '', []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != 'meta': self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += [(tag, *a) for a in attrs]
        self.ids += [v for k, v in attrs if k == 'id']
        assert len({k for k, _ in attrs}) == len(attrs), f'an attribute of {tag} twice'

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' not in self.open: self.shown += data


def check(html):
    "Assert what holds for every report, and return it parsed."
    seen = Page(html)
    assert set(seen.tags) <= {'html', 'head', 'meta', 'title', 'style', 'body', 'header', 'main', 'section', 'footer', 'h1', 'h2', 'p', 'ul', 'li', 'dl', 'dt', 'dd', 'div', 'bdi', 'abbr', 'figure', 'figcaption',
                              'table', 'caption', 'thead', 'tbody', 'tr', 'th', 'td', 'svg', 'g', 'defs', 'path', 'use', 'rect', 'clippath'}
    assert not [a for a in seen.attrs if a[1].startswith('on') or a[1] in ('src', 'style', 'srcset', 'data') or a[1].endswith('href') and not a[2].startswith('#')]
    assert 'http://' not in html and 'https://' not in html and '@import' not in html and 'url(' not in html.replace('url(#', '')
    assert len(set(seen.ids)) == len(seen.ids)
    refers = {v.split('#')[1].rstrip(')') for _, k, v in seen.attrs if k == 'href' or k == 'clip-path'} | {v for _, k, v in seen.attrs if k == 'aria-labelledby'}
    assert refers <= set(seen.ids)
    assert all(re.search(r'scope="(row|col)"', th) for th in re.findall('<th[ >].*?>', html))
    figures = re.findall('<svg.*?</svg>', html, re.S)
    assert all('aria-hidden="true"' in f or 'role="img"' in f and '<title' in f for f in figures)
    return seen


def log(names, steps=20, seed=0, fall=False):
    "Draw rewards of 0 and 1; with `fall`, the second takes over from the first."
    rng, n = np.random.default_rng(seed), steps * 64
    t = np.arange(n) // 64
    table = {'step': t + 1, 'group': np.arange(n) // 8}
    for i, name in enumerate(names): table[name] = (rng.random(n) < 0.3 + 0.4 * (i % 3) / 2).astype(float)
    if fall:
        bold = rng.random(n) < np.where(t < steps // 2, 0.2, 0.9)
        table[names[0]], table[names[1]] = (rng.random(n) < 0.9 - 0.85 * bold).astype(float), (rng.random(n) < 0.2 + 0.75 * bold).astype(float)
    return pd.DataFrame(table)


@pytest.mark.parametrize('lost, gain', [(0, 1), (1, 2), (2, 6), (9, 4), (6, 0)])
def test_hostile_names_are_text(lost, gain):
    names = [NAMES[lost], NAMES[gain], *(n for i, n in enumerate(NAMES) if i not in (lost, gain))]
    result = audit(log(names, fall=True))
    assert [n.reward for n in result.neglected] == [names[0]]
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # a glyph that matplotlib lacks would warn
        html = page(result)
    seen = check(html)
    clean = lambda s: ''.join(c if c not in '\n\u202e' else '\ufffd' for c in s)
    for name in NAMES: assert (clean(name) if len(name) < 60 else name[:59] + '…') in seen.shown
    assert NAMES[3] in [v for tag, k, v in seen.attrs if (tag, k) == ('bdi', 'title')]
    assert seen.shown.index('is neglected since step') < seen.shown.index('Pass rates and onset')
    assert f'{clean(names[0])} is neglected since step {result.neglected[0].onset_step}, bought off by {clean(names[1])}' in seen.shown


def test_figures_say_their_names_in_a_title():
    html = page(audit(log(NAMES[:2], fall=True)))
    assert html.count('<title id=') == 3 and html.count('&lt;script&gt;alert(1)&lt;/script&gt;') > 5 and NAMES[0] not in html


def test_policy_allows_this_sheet_and_nothing_else():
    html = page(audit(log(['a', 'b'])))
    sheet = re.search('<style>(.*?)</style>', html, re.S)[1]
    policy = re.search('http-equiv="Content-Security-Policy" content="(.*?)"', html)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-" + base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode())
    assert 'unsafe' not in policy and sheet == CSS and html.count('<style') == 1
    assert html.index('Content-Security-Policy') < html.index('<style') and 'name="viewport"' in html and '@media print' in sheet and 'prefers-color-scheme: dark' in sheet


def test_every_class_is_styled():
    html = page(audit(log(['a', 'b', 'c'], fall=True)))
    used = {c for v in re.findall('class="(.*?)"', html) for c in v.split()}
    assert used and all(f'.{c}' in CSS for c in used)


def test_nothing_neglected():
    seen = check(page(audit(log(['a', 'b', 'c']))))
    assert 'No reward is neglected.' in seen.shown and 'No onset to show' in seen.shown and 'Nothing is neglected' in seen.shown


@pytest.mark.parametrize('steps', [1, 2])
def test_one_reward_in_a_short_log(steps):
    seen = check(page(audit(log(['only'], steps))))
    assert 'too short to tell' in seen.shown and seen.shown.count('only') > 4


def test_thirty_rewards():
    html = page(audit(log([f'r{i}' for i in range(30)])))
    seen = check(html)
    assert '8 of 30 rewards are shown' in seen.shown and 'The first 20 of 30 rewards' in seen.shown
    assert seen.tags.count('figure') == 21 and html.count('<abbr') == 30


def test_columns_without_values():
    table = log(['a', 'b', 'c', 'd'], fall=True)
    table['b2'], table.loc[table.step > 15, 'c'], table['d'] = np.nan, np.nan, 1.0
    seen = check(page(audit(table)))
    assert 'b2 has no value in any row' in seen.shown and 'nan' not in seen.shown.lower()


def test_numbers_in_the_table_are_those_of_the_audit():
    result = audit(log(['a', 'b', 'c'], fall=True), weights=dict(c=2))
    html = page(result)
    [row] = re.findall('<tr><th scope="row"><bdi>b</bdi></th><td class="">kept</td>(.*?)</tr>', html)
    x = result.rewards['b']
    shown = [float(v) for v in re.findall('<td>(.*?)</td>', row)]
    expected = [x[c] for c in ('first', 'best', 'last', 'dead', 'share_grpo', 'share_gdpo', 'share_dvao', 'share_rvpo', 'masked_gdpo', 'masked_rvpo', 'threshold')]
    assert shown == pytest.approx(expected, abs=0.0051)
    n = result.neglected[0]
    said = Page(html).shown
    assert f'from step {n.onset_range[0]} to {n.onset_range[1]}' in said and f'in the last {n.rate_after:.0%}' in said and '1, 1, 2' in said
    heat = re.search('Mean correlation inside groups</caption>.*?</table>', html, re.S)[0]
    assert f'{result.correlation["a"]["b"]:+.2f}'.replace('-', '−') in heat and 'class="n' in heat


def test_bytes_are_reproducible_whatever_the_style(tmp_path):
    table = log(['a', 'b', 'c'], fall=True)
    write_html(audit(table), tmp_path / 'one.html')
    with matplotlib.rc_context({'font.size': 20, 'svg.fonttype': 'none', 'axes.facecolor': 'black'}): write_html(audit(table), str(tmp_path / 'two.html'))
    assert (tmp_path / 'one.html').read_bytes() == (tmp_path / 'two.html').read_bytes()
    check((tmp_path / 'one.html').read_text(encoding='utf-8'))


def test_a_file_that_cannot_be_written_gets_a_sentence(tmp_path):
    with pytest.raises(InputError, match='no/such.html: cannot be written'): write_html(audit(log(['a', 'b'])), tmp_path / 'no' / 'such.html')


def test_text_hides_what_cannot_be_seen():
    assert text('a\x00\u200b\u2028\ud83db') == 'a\ufffd\ufffd\ufffd\ufffdb' and text('👩\u200d👧') == '👩\u200d👧' and text('<&>"\'') == '&lt;&amp;&gt;&quot;&#x27;'
