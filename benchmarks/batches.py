"""What each training step is given: full rows, packed documents, padded rows, or their tokens in another form.

The tokens of a case are the same in every form, and so is the loss: the first token of a document or row is never a
target. What a form is made of is what the usual collators make: `DataCollatorWithFlattening` and TRL's packing for
documents told by `position_ids`, the default collator for a padded batch with its mask. The configuration says
`use_cache=False`, as Trainer sets it. Importing this file loads no torch.
"""

from __future__ import annotations

from typing import Any

import shapes
from shapes import Arm, Case

IGNORED = -100


def lengths(case: Case, step: int = 0) -> list[int]:
    """Tokens of each row that are no padding.

    The longest row has none, as where a collator pads to it; the others are spread evenly about their mean. The rows
    take turns, so that no two steps in a row have the same lengths, but all have the same number of tokens.
    """
    if not case.padding:
        return [case.seq] * case.batch
    others = case.batch - 1
    left = round(case.batch * case.seq * (1 - case.padding)) - case.seq
    mean = left / others
    spread = min(mean / 2, case.seq - mean) if others > 1 else 0.0
    rows = [round(mean - spread + 2 * spread * i / max(1, others - 1)) for i in range(others)]
    rows[0] += left - sum(rows)
    turn = step % case.batch
    rows = [case.seq, *rows]
    return rows[turn:] + rows[:turn]


def documents(case: Case, step: int = 0) -> list[int]:
    """Tokens of everything that attends to itself only, in the order of the batch."""
    if case.packed:
        return [case.seq // case.packed] * (case.packed * case.batch)
    return lengths(case, step)


class Batches:
    """The inputs of an arm's steps: `batches[i]` are the keywords of the model's i-th call.

    `Arm.feed` says in which form the arm gets the tokens of the case:

    ""        as the case says: full rows; documents in a row, told by `position_ids`; padded rows with their mask
    "apart"   each document a row of its own
    "flat"    the tokens without padding as documents of one row: what padding-free collators make of a padded batch
    "full"    no padding, every row full of other tokens: what a step costs where nothing is padded

    Unsloth's trainer tells its model where documents end in one keyword more, `packed_seq_lengths` (its pull requests
    3525 and 3672); without it, its model takes a packed row for one document.
    """

    def __init__(self, case: Case, arm: Arm, count: int) -> None:
        import torch

        self.case, self.arm = case, arm
        vocab = shapes.SHAPES[case.model].vocab
        ids = torch.tensor(shapes.text_tokens(vocab, count * case.batch * case.seq))
        self._ids = ids.view(count, case.batch, case.seq).to(case.device)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def tokens(self) -> int:
        """Tokens of a step that are no padding."""
        return self.case.batch * self.case.seq if self.arm.feed == "full" else sum(documents(self.case))

    def __getitem__(self, step: int) -> dict[str, Any]:
        import torch

        ids, case, feed = self._ids[step], self.case, self.arm.feed
        if feed == "apart":
            ids = ids.view(case.batch * case.packed, -1)
        if feed in ("full", "apart") or not (case.packed or case.padding):
            return {"input_ids": ids, "labels": ids}
        positions = torch.arange(case.seq, device=ids.device).expand_as(ids)
        if case.packed:
            return self._told_by_positions(ids, positions % (case.seq // case.packed), step)
        kept = positions < torch.tensor(lengths(case, step), device=ids.device)[:, None]
        if feed == "flat":
            return self._told_by_positions(ids[kept][None], positions[kept][None], step)
        return {
            "input_ids": ids.where(kept, 0), "attention_mask": kept.long(), "labels": ids.where(kept, IGNORED)
        }  # fmt: skip

    def _told_by_positions(self, ids: Any, positions: Any, step: int) -> dict[str, Any]:
        import torch

        inputs = {"input_ids": ids, "position_ids": positions, "labels": ids.where(positions > 0, IGNORED)}
        if self.arm.impl == "unsloth":
            counts = documents(self.case, step)
            inputs["packed_seq_lengths"] = torch.tensor(counts, dtype=torch.int32, device=ids.device)
        return inputs
