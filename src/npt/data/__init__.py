"""Text to blocks of token ids: read it (`sources`), pack and split it (`packing`), sample it (`sampling`)."""

from __future__ import annotations

from npt.data.packing import pack, pack_token_ids, split_blocks
from npt.data.sampling import sample_blocks
from npt.data.sources import TextFiles, load_documents

__all__ = ["TextFiles", "load_documents", "pack", "pack_token_ids", "sample_blocks", "split_blocks"]
