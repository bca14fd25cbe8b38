"""A drafter that knows what comes and is right as often as asked: acceptance and rejection at will."""

from __future__ import annotations

import random

from kvkeye.engine.draft import Draft


class ScriptedDrafter:
    """Random trees of at most `width` children and `depth` levels.

    truth      gives the tokens that come after a row's last one; fewer than asked, or none, are fine
    accuracy   chance that the children of a right token hold the next one, at a random place among them
    """

    def __init__(self, truth, vocabulary, accuracy=0.6, width=1, depth=4, seed=0):
        self.truth, self.vocabulary = truth, vocabulary
        self.accuracy, self.width, self.depth = accuracy, width, depth
        self.rng = random.Random(seed)
        self.num_drafts = 0

    def propose(self, sequences, num_tokens):
        limits = num_tokens if isinstance(num_tokens, dict) else {seq.seq_id: num_tokens for seq in sequences}
        found = {}
        for seq in sequences:
            draft = Draft()
            self._grow(draft, 0, 0, self.truth(seq), limits[seq.seq_id])
            if len(draft):
                found[seq.seq_id] = draft
                self.num_drafts += 1
        return found

    def _grow(self, draft, parent, level, coming, limit):
        """Children below row `parent`; `coming` is what would be right there, None below a wrong token."""
        if level == self.depth:
            return
        count = self.rng.randint(1, self.width)
        tokens = self.rng.sample(range(self.vocabulary), count)
        if coming and self.rng.random() < self.accuracy:
            tokens[self.rng.randrange(count)] = coming[0]
        for token in dict.fromkeys(tokens):
            if len(draft) >= limit:
                return
            draft.tokens.append(token)
            draft.parents.append(parent)
            draft.scores.append(1.0)
            right = bool(coming) and token == coming[0]
            if right or self.rng.random() < 0.4:
                self._grow(draft, len(draft), level + 1, coming[1:] if right else None, limit)

    def forget(self, sequence):
        pass
