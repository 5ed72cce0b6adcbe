"""The evaluation of examples/evaluate.py; of each checkpoint a line of JSON says the loss and digests of all tensors.

Needs the folder of the examples among those that modules are imported from, as demo.py gives it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from evaluate import Evaluation, evaluations, make_parser
from witness import digest


def line(evaluation: Evaluation) -> str:
    """What record.py reads."""
    tensors = {f"model.{name}": digest(tensor) for name, tensor in evaluation.weights.items()}
    told = {"checkpoint": evaluation.path, "loss": evaluation.loss, "read_seconds": evaluation.read_seconds}
    return json.dumps({"time": time.time(), **told, "tensors": tensors})


def main() -> None:
    """Read the command line and follow."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", required=True, help="append the lines to this file")
    given = vars(parser.parse_args())
    out = Path(given.pop("out"))
    for evaluation in evaluations(**given):
        with out.open("a") as file:
            file.write(f"{line(evaluation)}\n")


if __name__ == "__main__":
    main()
