"""Run a command until it is done: `python launch/supervise.py [options] deepspeed launch/pretrain.py --config ...`."""

from megacog.runtime.cli import run
from megacog.runtime.supervise import main

if __name__ == "__main__":
    run(main)
