"""What commands tell: text for people, or JSON alone on the standard output."""
import json

from visionssm.utils.reporting import Report


def test_text_is_text_and_failures_stay_in_the_log(capsys):
    with Report() as report:
        report.say({'path': 'a'}, 'a: good')
        report.fail('b', 'is empty')
    assert capsys.readouterr().out == 'a: good\n'


def test_as_json_nothing_else_reaches_the_standard_output(capsys):
    with Report(as_json=True) as report:
        report.say({'path': 'a', 'score': 0.5}, 'a: good')
        print('a library talks')
        report.fail('b', 'is empty')
    print('afterwards')
    out, err = capsys.readouterr()
    *rows, last = out.splitlines()
    assert [json.loads(row) for row in rows] == [{'path': 'a', 'score': 0.5}, {'path': 'b', 'error': 'is empty'}]
    assert last == 'afterwards' and err == 'a library talks\n'
