"""Who runs in the next step, over which tokens and blocks. Plain numbers; no tensors, no model.

One rule covers everything: a row has `num_remaining` tokens without keys and values; a step computes some of them, and
when none is left the row gets its next token. Prefill, chunked prefill, decoding and the recompute after a
preemption are the same case. Tokens that stand for media wait for their embeddings, which steps compute ahead of them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from kvkeye.engine.block_manager import BlockManager
from kvkeye.engine.draft import MAX_TREE_ROWS, Draft
from kvkeye.engine.encoder_cache import EncoderCache
from kvkeye.engine.limits import Limits, check_request
from kvkeye.engine.request import Request, Sequence, State
from kvkeye.engine.step import Plan, Step

ERROR_TOKEN = -1


class Drafts(Protocol):
    """What proposes tokens for rows that get their next token, within `budget` tokens for all of them."""

    def propose(self, sequences: SequenceOf[Sequence], budget: int) -> dict[int, Draft]: ...
    def forget(self, sequence: Sequence) -> None: ...


class Scheduler:
    """Continuous batching: decoding rows first, then running prompts, then waiting ones; by priority, then arrival.

    When blocks run out, the row of worst rank goes back to waiting and is recomputed later. Media are encoded in the
    same order. The best-ranked row can always go on, so every request ends. Not thread-safe.
    """

    def __init__(
        self, limits: Limits, blocks: BlockManager, encoder: EncoderCache | None = None, drafts: Drafts | None = None
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.drafts = drafts
        self.encoder = EncoderCache(0) if encoder is None else encoder
        self.requests: dict[str, Request] = {}
        self.waiting: list[Sequence] = []  # both lists are kept in rank order
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._by_id: dict[int, Sequence] = {}
        self._next_arrival = 0
        self._next_seq_id = 0

    # Entry and exit of requests

    def add(self, request: Request) -> None:
        """Queues a request. RequestError or CapacityError if it could never run; nothing has changed then."""
        check_request(request, self.limits, self.blocks, self.requests)
        request.arrival = self._next_arrival
        self._next_arrival += 1
        seq = self._new_sequence(request, index=0, tokens=list(request.prompt))
        seq.width = request.sampling.n
        self.requests[request.request_id] = request
        insort(self.waiting, seq, key=_rank)

    def _new_sequence(self, request: Request, index: int, tokens: list[int]) -> Sequence:
        seq = Sequence(seq_id=self._next_seq_id, request=request, index=index, tokens=tokens)
        self._next_seq_id += 1
        request.sequences.append(seq)
        self._by_id[seq.seq_id] = seq
        return seq

    def abort(self, request_id: str, reason: str = "abort") -> bool:
        """Ends a request wherever it is, also between schedule and finish; False if it is not here any more."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        for seq in list(request.sequences):
            self.end(seq, reason)
        return True

    def end(self, seq: Sequence, reason: str) -> None:
        """Ends one row and frees its blocks. Does nothing for a row that has ended."""
        if seq.state is State.FINISHED:
            return
        (self.running if seq.state is State.RUNNING else self.waiting).remove(seq)
        seq.move_to(State.FINISHED)
        seq.finish_reason = reason
        self.blocks.release(seq)
        self.encoder.release(seq, seq.embeds)
        del self._by_id[seq.seq_id]
        if self.drafts is not None:
            self.drafts.forget(seq)
        if seq.request.is_finished:
            del self.requests[seq.request.request_id]

    def preempt(self, seq: Sequence) -> None:
        """Takes a running row's blocks; it waits at its rank and is recomputed from what the cache still holds."""
        self.running.remove(seq)
        seq.move_to(State.WAITING)
        self.blocks.release(seq)
        self.encoder.release(seq, seq.embeds)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, seq, key=_rank)

    def sequences(self) -> Iterator[Sequence]:
        """All rows that have not ended."""
        return iter(self._by_id.values())

    def sequence(self, seq_id: int) -> Sequence:
        return self._by_id[seq_id]

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    # Planning

    def schedule(self) -> Step:
        """Plans one step and reserves its blocks.

        `finish_encodings` or `fail_encodings` must follow, then `finish` or `fail`, before the next call.
        """
        plan = Plan(self.limits.max_num_batched_tokens, self.limits.max_num_encoder_patches)
        self._yield_to_priority()
        num_preemptions = self.num_preemptions
        for seq in self.running:
            self._encode_ahead(seq, plan)
        decoding = [seq for seq in self.running if seq.num_remaining == 1]
        prompts = [seq for seq in self.running if seq.num_remaining > 1]
        self._propose(decoding, plan)
        for seq in decoding + prompts:
            if seq.state is State.RUNNING:
                self._place(seq, plan)
        # A step that took blocks away must not hand them to a newcomer.
        if self.num_preemptions == num_preemptions:
            self._admit(plan)
        return plan.finished()

    def _propose(self, decoding: list[Sequence], plan: Plan) -> None:
        """Asks for proposals after rows that have drawn a token; what every row needs comes first."""
        plan.num_due = len(decoding)
        spare = plan.budget - len(decoding)
        if self.drafts is None or spare <= 0:
            return
        able = [seq for seq in decoding if seq.width == 1 and seq.num_generated > 0 and seq.max_draft_depth > 0]
        if able:
            plan.drafts = self.drafts.propose(able, spare)

    def _draft(self, seq: Sequence, num_tokens: int, plan: Plan) -> Draft | None:
        """The row's proposals as far as tokens and blocks go round; they take nothing that a decoding row needs."""
        spare = min(plan.budget - num_tokens - plan.num_due, MAX_TREE_ROWS - 1)
        draft = plan.drafts.get(seq.seq_id) or self._draft_after_chunk(seq, num_tokens, spare)
        if draft is None:
            return None
        draft = draft.trimmed(spare, seq.max_draft_depth)
        needed = self.blocks.num_new_blocks(seq, num_tokens + len(draft)) + plan.num_due
        return draft if len(draft) and needed <= self.blocks.pool.num_available else None

    def _draft_after_chunk(self, seq: Sequence, num_tokens: int, budget: int) -> Draft | None:
        """Proposals after a prompt's last chunk, or that of what is recomputed."""
        is_asked = seq.num_remaining == 1 and seq.num_generated > 0
        if self.drafts is None or is_asked or num_tokens < seq.num_remaining or budget <= 0:
            return None
        if seq.width > 1 or seq.max_draft_depth <= 0:
            return None
        return self.drafts.propose([seq], budget).get(seq.seq_id)

    def _chunk(self, seq: Sequence, budget: int) -> int:
        chunk = self.limits.max_prefill_chunk or budget
        return min(seq.num_remaining, chunk, budget)

    def _encode_ahead(self, seq: Sequence, plan: Plan) -> int:
        """Keeps for the row what its coming tokens show, in their order, and plans what nobody has encoded yet.

        Returns how many of its tokens have their embeddings when the step's encodings are done. Who finds the budget
        used up closes it for all that follow: smaller items of others must not overtake for ever.
        """
        for index, span in seq.request.media_from(seq.num_computed):
            if span.num_patches == 0 or span.embeds in seq.embeds:
                continue
            if span.embeds not in self.encoder and not plan.encode(seq, index, span):
                return max(0, span.start - seq.num_computed)
            self.encoder.keep(seq, span)
        return seq.num_remaining

    def has_embeddings(self, seq: Sequence) -> bool:
        """Whether everything that the row's coming tokens show is encoded."""
        spans = seq.request.media_from(seq.num_computed)
        return all(span.num_patches == 0 or span.embeds in seq.embeds for _, span in spans)

    def _place(self, seq: Sequence, plan: Plan) -> None:
        """Adds the row's next tokens to the plan, taking blocks from worse-ranked rows if it must."""
        if seq.num_remaining == 1:
            plan.num_due = max(0, plan.num_due - 1)
        num_tokens = min(self._encode_ahead(seq, plan), self._chunk(seq, plan.budget))
        if num_tokens == 0:
            return
        while not self.blocks.can_reserve(seq, num_tokens):
            victim = next(other for other in reversed(self.running) if other.seq_id not in plan.planned)
            if victim is not seq:
                self.preempt(victim)
                continue
            # Nobody worse is left to take from. Rows planned before this one may still rank below it: then it keeps
            # its place and its blocks until the next step; otherwise it makes room for its betters.
            if seq is self.running[-1]:
                self.preempt(seq)
            return
        draft = self._draft(seq, num_tokens, plan)
        num_drafted = len(draft) if draft is not None else 0
        plan.add(seq, num_tokens, draft, self.blocks.reserve(seq, num_tokens + num_drafted))

    def _admit(self, plan: Plan) -> None:
        """Starts waiting rows in rank order while seats, tokens and blocks for the whole row suffice."""
        while self.waiting and plan.budget and self._has_seat(self.waiting[0]):
            seq = self.waiting[0]
            if not self._attach(seq):
                return
            if seq.num_preemptions == 0:
                seq.num_cached = seq.num_computed
            self.waiting.pop(0)
            seq.move_to(State.RUNNING)
            insort(self.running, seq, key=_rank)
            self._place(seq, plan)

    def _attach(self, seq: Sequence) -> bool:
        """Takes the row's cached prefix if the rest fits as well; otherwise takes nothing."""
        self.blocks.attach(seq)
        if self.blocks.can_reserve(seq, seq.num_remaining):
            return True
        self.blocks.release(seq)
        return False

    def _has_seat(self, seq: Sequence) -> bool:
        return sum(other.width for other in self.running) + seq.width <= self.limits.max_num_seqs

    def _yield_to_priority(self) -> None:
        """Preempts rows of lower priority while the best waiting row cannot start."""
        while self.waiting and self.running:
            head, worst = self.waiting[0], self.running[-1]
            if head.request.priority >= worst.request.priority:
                return
            if self._has_seat(head) and self._attach(head):
                self.blocks.release(head)
                return
            self.preempt(worst)

    # Results

    def finish_encodings(self, step: Step) -> None:
        """The step's embeddings exist."""
        self.encoder.finish([encoding.embeds for encoding in step.encodings])

    def fail_encodings(self, step: Step) -> list[Sequence]:
        """Ends every row that waits for the step's embeddings, which could not be computed."""
        lost = {encoding.embeds for encoding in step.encodings}
        failed = [seq for seq in self._by_id.values() if not lost.isdisjoint(seq.embeds)]
        for seq in failed:
            self.end(seq, "error")
        self.encoder.forget(lost)
        return failed

    def finish(self, step: Step, sampled: Mapping[int, SequenceOf[int]]) -> list[Sequence]:
        """Takes the tokens drawn for each row; returns the rows that got one or ended, forks included.

        Several tokens of a row are answers that start there; after proposals they are one answer's next tokens, each
        but the last a proposal whose keys and values lie in its place now. A token of ERROR_TOKEN (no valid
        probabilities) ends that row with reason "error". Rows that were aborted or preempted since `schedule` are
        passed over.
        """
        changed: list[Sequence] = []
        for row in step.rows:
            seq = self._by_id.get(row.seq_id)
            if seq is None or seq.state is not State.RUNNING:
                continue
            tokens = sampled[row.seq_id] if row.num_samples else []
            if row.parents:
                self._extend(seq, row.root, tokens)
                changed.append(seq)
                continue
            if ERROR_TOKEN in tokens:
                self.end(seq, "error")
                changed.append(seq)
                continue
            self.blocks.commit(seq, len(row.tokens))
            self._release_passed(seq)
            branches = [seq] + [self._fork(seq, index) for index in range(1, len(tokens))]
            for branch, token in zip(branches, tokens):
                self._append(branch, token)
                changed.append(branch)
        return changed

    def _release_passed(self, seq: Sequence) -> None:
        """Gives up the embeddings that no coming token of the row takes."""
        if seq.embeds:
            coming = {span.embeds for _, span in seq.request.media_from(seq.num_computed)}
            self.encoder.release(seq, seq.embeds - coming)

    def _fork(self, parent: Sequence, index: int) -> Sequence:
        child = self._new_sequence(parent.request, index, list(parent.tokens))
        self.blocks.fork(parent, child)
        child.num_cached = parent.num_computed
        child.move_to(State.RUNNING)
        insort(self.running, child, key=_rank)
        parent.width = 1
        return child

    def _append(self, seq: Sequence, token: int) -> None:
        seq.tokens.append(token)
        reason = self._end_reason(seq)
        if reason is not None:
            self.end(seq, reason)

    def _extend(self, seq: Sequence, root: int, tokens: SequenceOf[int]) -> None:
        """Appends what was accepted and the token drawn after it, as far as the row goes; `root` came before."""
        reason, num_passed = None, root
        for token in tokens:
            num_passed += 1
            if token != ERROR_TOKEN:
                seq.tokens.append(token)
            reason = "error" if token == ERROR_TOKEN else self._end_reason(seq)
            if reason is not None:
                break
        self.blocks.commit(seq, num_passed)  # all of their predecessors are computed
        self.blocks.trim(seq)
        self._release_passed(seq)
        if reason is not None:
            self.end(seq, reason)

    def _end_reason(self, seq: Sequence) -> str | None:
        """Why the row ends with the token that it got last, if it does."""
        token, sampling = seq.tokens[-1], seq.request.sampling
        is_eos = not sampling.ignore_eos and token in seq.request.eos_token_ids
        if is_eos or token in sampling.stop_token_ids:
            return "stop"
        return "length" if seq.num_generated >= seq.request.max_tokens else None

    def fail(self, step: Step) -> list[Sequence]:
        """Ends every row of a step that could not be computed; their blocks' content is unknown."""
        failed = [self._by_id[row.seq_id] for row in step.rows if row.seq_id in self._by_id]
        for seq in failed:
            self.end(seq, "error")
        return failed

    def check(self) -> None:
        """RuntimeError unless blocks, owners, states and limits agree. For tests and idle moments."""
        self.blocks.check(self.sequences())
        self.encoder.check(self.sequences())
        for name, rows, state in (("waiting", self.waiting, State.WAITING), ("running", self.running, State.RUNNING)):
            if any(seq.state is not state for seq in rows) or rows != sorted(rows, key=_rank):
                raise RuntimeError(f"the {name} list is out of order or holds rows of another state")
        if len(self.waiting) + len(self.running) != len(self._by_id):
            raise RuntimeError("a row is neither waiting nor running")
        if sum(seq.width for seq in self.running) > self.limits.max_num_seqs:
            raise RuntimeError("more rows are running than max_num_seqs")


def _rank(seq: Sequence) -> tuple[int, int, int]:
    return seq.rank
