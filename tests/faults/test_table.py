"""The committed log of the fault table is of these tests, and of their long forms."""
import json
import re
from pathlib import Path

LOG = Path(__file__).resolve().parents[2] / 'nbs/logs/faults.jsonl'


def test_the_committed_table_is_made_by_the_tests_that_are_here():
    "Regenerate it with `make faults`."
    rows = [json.loads(line) for line in LOG.read_text().splitlines()]
    written = {re.search(r'::(\w+)', row['test'])[1] for row in rows}
    here = {name for p in Path(__file__).parent.glob('test_*.py') for name, args in re.findall(r'^def (test_\w+)\(([^)]*)\)', p.read_text(), re.M) if 'fault_row' in args}
    assert written == here
    kills = [row for row in rows if row.get('hits')]
    assert len(kills) == 3 and all(row['tried'] >= 50 and row['survived'] == row['tried'] and row['rows_lost'] == 0 for row in kills)
