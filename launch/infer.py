"""Turn a prompt file into clips. See `bash launch/infer.sh --help`."""

from megacog.commands import infer

# The processes that decode image and video prompts import this file again; it stays light.
if __name__ == "__main__":
    infer()
