"""The training of examples/train.py with a witness beside it, who writes down what happens and may kill this rank.

Needs the folder of the examples among those that modules are imported from, as demo.py gives it.
"""

from __future__ import annotations

from train import Options, Training, join_ranks, leave_ranks, make_parser
from witness import Witness, Witnessed

import distckpt


def train(options: Options, witnessed: Witnessed) -> None:
    """The same as ``train.train``, step by step. All ranks call it."""
    training = Training(options)
    progress, loader = training.progress, training.loader
    values = {"scheduler": training.scheduler, "progress": progress}
    witness = Witness(witnessed, training.model, training.optimizer, values)
    with distckpt.CheckpointManager(training.checkpoint(), options.directory, max_to_keep=options.keep) as manager:
        restored = manager.restore_or_initialize()
        witness.started(restored, progress["step"])
        for tokens, targets in loader:
            if progress["step"] >= options.steps:
                break
            loss = training.step(tokens, targets)
            witness.stepped(progress["step"], loss, loader.start + training.world_size * loader.taken)
            if progress["step"] % options.save_every == 0:
                witness.saving(progress["step"])
                pending = manager.save(progress["step"])
                witness.saved(progress["step"], pending)
    witness.ended()


def main() -> None:
    """One rank of torchrun, or the only process there is."""
    parser = make_parser(__doc__)
    Witnessed.add_arguments(parser)
    given = vars(parser.parse_args())
    witnessed = Witnessed.taken_from(given)
    join_ranks()
    train(Options(**given), witnessed)
    leave_ranks()


if __name__ == "__main__":
    main()
