"""Pretrain a model: `deepspeed launch/pretrain.py --config configs/x.yaml [key=value ...]`.

torchrun, srun and plain python work as well, with the same result.
"""

from megacog.commands import pretrain

if __name__ == "__main__":
    pretrain()
