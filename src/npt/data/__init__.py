"""Text to batches of token ids, in five stages:

    stage       module       in -> out
    sources     sources      names of files, of a hub data set or of a builtin text -> documents (text or chats)
    packing     packing      documents and a tokenizer -> blocks (datasets.Dataset: input_ids, attention_mask, labels)
    sampling    sampling     a frozen model -> blocks that it writes itself, in place of the two stages above
    streaming   streaming    documents without an end -> blocks one by one, with a place to go on from (StreamedBlocks)
    batches     batches      blocks -> batches on a device (dict[str, Tensor], each (rows, tokens))

All text is opened in `sources`. `readers` has the table of the kinds of file, and a new kind is a reader there; `documents`
finds text or a chat in a row, and `chats` turns a chat into tokens. `npt.runs.texts` decides what a run opens.
"""

from __future__ import annotations

from npt.data.packing import pack, pack_token_ids, split_blocks
from npt.data.sampling import sample_blocks
from npt.data.sources import TextFiles, load_documents

__all__ = ["TextFiles", "load_documents", "pack", "pack_token_ids", "sample_blocks", "split_blocks"]
