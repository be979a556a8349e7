"""Turn a prompt file into clips. See `bash launch/infer.sh --help`."""

from __future__ import annotations

if __name__ == "__main__":
    # Imported here: the processes that decode image and video prompts import this file again, without torch.
    from megacog.generation.infer import main
    from megacog.runtime.cli import run

    run(main)
