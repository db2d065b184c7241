"""Prints how many tests of a JUnit log passed, failed and were skipped, suite by suite."""
import sys
import xml.etree.ElementTree as ElementTree


def counts(suite):
    number = lambda key: int(suite.get(key, 0))
    skipped = sum(1 for case in suite.iter("testcase") if case.find("skipped") is not None)
    failed = number("failures") + number("errors")
    return number("tests") - failed - skipped, failed, skipped


def main(path):
    total = [0, 0, 0]
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        row = counts(suite)
        total = [a + b for a, b in zip(total, row)]
        print(f"{suite.get('name', '?'):48} {row[0]:6} passed {row[1]:4} failed {row[2]:5} skipped")
    print(f"{'all tests':48} {total[0]:6} passed {total[1]:4} failed {total[2]:5} skipped")
    return 1 if total[1] or not total[0] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
