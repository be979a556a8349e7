"""What a run needs on a cluster: `python launch/plan.py --config configs/cogvideo-9b.yaml --gpus 8x80 --nodes 13`.

`python launch/plan.py check` compares planned with measured memory on small models.
"""

from megacog.commands import plan

if __name__ == "__main__":
    plan()
