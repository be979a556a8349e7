"""Judge the clips that an export generates for the demo captions. See `python launch/evaluate.py --help`."""

from megacog.commands import evaluate

if __name__ == "__main__":
    evaluate()
