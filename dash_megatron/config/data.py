"""Section `data`, and the rules of its `seq_length_curriculum`."""

from __future__ import annotations

import bisect

from pydantic import Field

from dash_megatron.config.section import Section


class DataConfig(Section):
    """What the model reads."""

    tokenizer: str | None = None
    """Path of the tokenizer that the data was tokenized with: a sentencepiece BPE model, as `data_tools.train_tokenizer`
    writes it or Llama 2 has it, or a Hugging Face `tokenizer.json` beside its `tokenizer_config.json`, as Llama 3 and Qwen
    have it. Its end of sequence ends each document. Its begin of sequence is read where a chat template writes it and nowhere
    else, and exports put none before a text."""
    train: tuple[str, ...] = ()
    """Training blend: prefixes of `.bin/.idx` pairs, each optionally preceded by its weight and a space
    (`"0.7 data/web"`); without weights, data sets are mixed in proportion to their tokens. Of conversations
    (`tokenize_corpus --conversations`) the answers alone are learnt."""
    valid: tuple[str, ...] = ()
    """Validation blend, in the form of `train`; empty means no validation."""
    seq_length: int = Field(gt=1, lt=2**31)
    """Tokens in one training sequence."""
    seq_length_curriculum: dict[int, int] | None = Field(default=None, examples=["{0: 2048, 1000: 8192}"])
    """Longest context in tokens, by the step from which it holds, such as `{0: 2048, 1000: 8192, 4000: 16384}`; the last
    length must be `seq_length`. Rows keep `seq_length` tokens, order and targets. Attention is cut at multiples of the
    length, as if a document ended there; the loss is not: the last token before a cut is still asked for the token after
    it. Validation always reads whole rows."""
    pack_documents: bool = True
    """True keeps the documents of one sequence apart: no token attends to another document, and positions restart at each.
    False attends across them."""
    num_workers: int = Field(default=1, ge=0)
    """Background threads per process that read batches ahead; 0 reads in the training thread."""
    cache_dir: str | None = None
    """Folder of the sample-order indices; null means `<run_dir>/index_cache`. Where machines have disks of their own there, each
    makes them."""

    def context_length_at(self, step: int) -> int:
        """Most tokens of context in the step that follows `step` finished steps."""
        if self.seq_length_curriculum is None:
            return self.seq_length
        begins = sorted(self.seq_length_curriculum)
        return self.seq_length_curriculum[begins[bisect.bisect_right(begins, step) - 1]]

    def check_curriculum(self, steps: int, chunk_size: int) -> None:
        """Refuse a curriculum whose lengths do not fit rows, chunks or the run.

        Args:
            steps: optimizer steps of the run.
            chunk_size: tokens of a chunk, of which each length must be a multiple; 1 where no layer has chunks.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        curriculum, seq_length = self.seq_length_curriculum, self.seq_length
        if curriculum is None:
            return
        name = f"data.seq_length_curriculum={curriculum}"
        example = f"such as {{0: {max(chunk_size, seq_length // 4)}, {max(1, steps // 10)}: {seq_length}}}"
        if not curriculum or min(curriculum) != 0:
            raise ValueError(f"{name} must say which length the run begins with, at step 0, {example}")
        for length in curriculum.values():
            if length < 2 or seq_length % length:
                raise ValueError(
                    f"{name}: {length} must divide data.seq_length={seq_length}, so that rows are cut into equal parts, "
                    f"{example}"
                )
            if length % chunk_size:
                raise ValueError(
                    f"{name}: {length} must be a multiple of attention.chunk_size={chunk_size}, so that no cut shortens a "
                    f"chunk, {example}"
                )
        last = max(curriculum)
        if curriculum[last] != seq_length:
            raise ValueError(
                f"{name} must end with data.seq_length={seq_length}: rows and memory have that length from the first step "
                f"on, and the model is evaluated with it; set data.seq_length={curriculum[last]}, or {example}"
            )
        if last >= steps:
            raise ValueError(
                f"{name} reaches data.seq_length at step {last}, but training.steps={steps}: the run would never see it; "
                "switch earlier or train longer"
            )
