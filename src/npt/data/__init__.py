"""Text sources, packed into blocks of token ids."""

from npt.data.packing import pack, pack_token_ids, split_blocks
from npt.data.sampling import sample_blocks
from npt.data.sources import load_documents

__all__ = ["load_documents", "pack", "pack_token_ids", "sample_blocks", "split_blocks"]
