"""What every fault test shares: the marker, the long form, and the log that the chapter "What can go wrong" reads."""
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def long_form(config): return config.getoption('markexpr') == 'faults'


def pytest_collection_modifyitems(config, items):
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine: item.add_marker(pytest.mark.faults)
    if not long_form(config): items[:] = [item for item in items if item not in mine or not item.get_closest_marker('long')]


@pytest.fixture(scope='session')
def kills(pytestconfig):
    "Return how many kills one test tries: 60 in the long form, 20 in the short one."
    return 60 if long_form(pytestconfig) else 20


@pytest.fixture
def fault_row(pytestconfig, request):
    """Return a function that writes one row of the fault table, where `--faults-log FILE` asks for the table.

    area: the table's heading (`stops`, `disk`, `rewards`, `data`, `policy`, `numbers`, `load`, `security`); fault: what happens, in a few
    words; tried, survived: counts of runs or inputs; sees: what the user sees, taken from the run (its error's sentence);
    lost: what is lost; remedy: what to do.
    """
    def row(area, fault, tried, survived, sees, lost, remedy, **more):
        assert tried > 0 and 0 <= survived <= tried
        if path := pytestconfig.getoption('--faults-log'):
            with open(path, 'a') as f:
                f.write(json.dumps(dict(area=area, fault=fault, tried=tried, survived=survived, sees=' '.join(str(sees).split())[:400], lost=lost,
                                        remedy=remedy, test=request.node.nodeid, **more)) + '\n')
    return row
